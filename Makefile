# The README's two commands are `make demo` and `make test`; each sets up all it needs.
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: demo test check bench bench-gaps chaos recovery mutants clean help

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

demo: $(VENV)/.demo ## real telescope data through a three-step pipeline to maps and plots
	$(BIN)/wfm demo $(ARGS)

# Most tests wait for processes most of the time: three at once take little longer than one.
test: $(VENV)/.dev ## the whole suite, on real servers
	$(BIN)/python -m pytest -n 3 --dist loadfile $(ARGS)

check: $(VENV)/.dev ## style, strict types, import contract, statecharts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/wfm charts check

bench: $(VENV)/.dev ## hand-over times, idle cost, runs per second: REPORT=FILE
	$(BIN)/python benchmarks/main_path.py $(if $(REPORT),--report $(REPORT)) $(ARGS)

SIZES ?= 10000 100000 1000000

bench-gaps: $(VENV)/.dev ## the gap engine at 10,000 to 1,000,000 packages: SIZES="..." REPORT=FILE
	$(BIN)/python benchmarks/gaps.py $(SIZES) $(if $(REPORT),--report $(REPORT)) $(ARGS)

MINUTES ?= 10
_CHAOS = $(BIN)/python -m tests.faults.chaos $(if $(SEED),--seed $(SEED)) $(if $(REPORT),--report $(REPORT))

chaos: $(VENV)/.dev ## random faults against the whole system: MINUTES=10 SEED=... REPORT=FILE
	$(_CHAOS) --minutes $(MINUTES) $(ARGS)

recovery: $(VENV)/.dev ## each kind of fault once, 1,000 runs in flight, at the default intervals: SEED=... REPORT=FILE
	$(_CHAOS) --recovery $(ARGS)

mutants: $(VENV)/.dev ## take every guard away in turn; the tests must notice
	$(BIN)/python -m tests.faults.mutants $(ARGS)

clean: ## remove the virtual environment and caches (not .wfm: `wfm down` first, then remove it by hand)
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache build dist

$(VENV)/bin/python:
	@for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	  if command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
	    echo "making $(VENV) with $$($$p --version)"; exec $$p -m venv $(VENV); fi; done; \
	  echo "wfm needs Python 3.11 or newer (with its venv module); none was found on PATH" >&2; exit 1

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml
	@echo "installing wfm into $(VENV)"
	@$(PIP) install -e '.[embedded,demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	@echo "installing the test tools into $(VENV)"
	@$(PIP) install -e '.[embedded,demo,dev]'
	@touch $@
