"""The command line on real servers, with the four roles as real processes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import redis
from click.testing import CliRunner, Result

from tests.harness import PROGRAM, REPOSITORY, wait_until
from tests.services import Servers
from wfm import views
from wfm.cli import wfm
from wfm.embedded import Daemon, Embedded

PREFIXES = ("WFM_", "CCAT_", "ENV_FOR_DYNACONF")
PROGRAMS = Path(sys.executable).parent


class Cli:
    """Runs commands as somebody whose environment is `environ` and nothing else of wfm."""

    def __init__(self, environ: dict[str, str]) -> None:
        self.environ = environ
        self.hidden = {name: None for name in os.environ if name.startswith(PREFIXES)}

    def __call__(self, *words: object, code: int | None = 0, stdin: str = "", **environ: str) -> Result:
        """In this process."""
        given: dict[str, Any] = {**self.hidden, **self.environ, **environ}
        result = CliRunner(env=given).invoke(wfm, [str(w) for w in words], input=stdin)
        assert code is None or result.exit_code == code, (words, result.exit_code, result.output, result.exception)
        return result

    def json(self, *words: object, **more: Any) -> Any:
        return json.loads(self(*words, "--json", **more).stdout)

    def start(
        self,
        *words: object,
        program: str = "wfm",
        cwd: Path | None = None,
        stdout: int = subprocess.PIPE,
        **environ: str,
    ) -> subprocess.Popen[str]:
        """In a process of its own."""
        inherited = {k: v for k, v in os.environ.items() if k not in self.hidden}
        return subprocess.Popen(
            [PROGRAMS / program, *map(str, words)],
            env={**inherited, **self.environ, **environ},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
        )

    def process(self, *words: object, code: int = 0, **more: Any) -> str:
        with self.start(*words, **more) as process:
            out, err = process.communicate(timeout=120)
        assert process.returncode == code, (words, process.returncode, out, err)
        return out


def environ(home: Path) -> dict[str, str]:
    return {
        "WFM_HOME": str(home),
        "WFM_STAGING_RESERVE_GB": "0",
        "WFM_LOCAL_CPU": "4",
        "WFM_LOCAL_MEMORY_GB": "8",
        "WFM_SWEEP_SECONDS": "0.2",
    }


def processes_of(home: Path) -> dict[int, str]:
    """Processes that were started for a home, other than ourselves."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            variables = (place / "environ").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if int(place.name) != os.getpid() and (f"WFM_HOME={home}\0" in variables or str(home) in words):
            found[int(place.name)] = words
    return found


@pytest.fixture
def nothing(tmp_path: Path) -> Cli:
    """A home where nothing runs."""
    return Cli(environ(tmp_path / "home"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("system")


@pytest.fixture(scope="module")
def cli(home: Path) -> Iterator[Cli]:
    """A whole system, with definitions and an archive of three packages on disk."""
    cli = Cli(environ(home))
    archive = home / "archive"
    archive.mkdir()
    for name in "abc":
        (archive / f"{name}.txt").write_text(f"data of {name}\n")
    (home / "copy.py").write_text(PROGRAM.format(repository=str(REPOSITORY), ledger=str(home / "ledger.jsonl")))
    (home / "all.yaml").write_text(DEFINITIONS.format(home=home))
    cli.process("up")
    try:
        cli("apply", "-f", home / "all.yaml", "--reason", "a test")
        yield cli
    finally:
        cli.process("down")


DEFINITIONS = """\
kind: site
name: here
---
kind: location
name: archive
site: here
type: long_term_archive
root: {home}/archive
---
kind: software
name: copy
versions:
  - version: 1.0.0
    command: [python, {home}/copy.py]
---
kind: config
name: slow
parameters: {{seconds: 600}}
---
kind: config
name: bad
parameters: {{exit: 3}}
---
kind: grouping
name: everything
rules: []
---
kind: grouping
name: only-b
rules: [{{table: raw_data_package, column: name, operator: eq, value: b}}]
---
kind: pipeline
name: demo
grouping: everything
steps:
  - {{name: calibrate, software: copy, version: 1.0.0, group_by: [raw_data_package]}}
  - {{name: combine, software: copy, version: 1.0.0, depends_on: [calibrate], group_by: [source]}}
---
kind: pipeline
name: slow
grouping: only-b
trigger: MANUAL
steps:
  - {{name: wait, software: copy, version: 1.0.0, config: slow, max_retries: 0}}
---
kind: pipeline
name: bad
grouping: only-b
trigger: MANUAL
steps:
  - {{name: break, software: copy, version: 1.0.0, config: bad, max_retries: 0}}
"""

OBSERVATION = ("--module", "mod1", "--instrument", "cam", "--obs-unit", "unit", "--source", "NGC253")


@pytest.fixture(scope="module")
def processed(cli: Cli, home: Path) -> Cli:
    """The system after pipeline demo has worked on all packages."""
    cli("data", "scan", home / "archive", "--pattern", "*.txt", "--add", *OBSERVATION, "--metadata", "night=3")
    cli("runs", "watch")
    return cli


# --- help ---


def commands(group: click.Group, *path: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, *path, name)
        else:
            yield (*path, name), command


@pytest.mark.parametrize("path", [path for path, _ in commands(wfm)], ids=" ".join)
def test_every_command_has_help_with_an_example(path: tuple[str, ...], nothing: Cli) -> None:
    said = nothing(*path, "--help").stdout
    assert "Example:  wfm " + " ".join(path).replace("celery-worker", "worker") in said


PRINTS_NO_DATA = {
    *("up", "down", "demo", "trigger-manager", "workflow-manager", "worker", "celery-worker", "result-manager"),
    *("runs logs", "completion"),
}
"""These say how they get on, or print a text that is not ours."""


def test_every_command_that_prints_data_takes_json() -> None:
    without = {" ".join(path) for path, command in commands(wfm) if not any("--json" in p.opts for p in command.params)}
    assert without == PRINTS_NO_DATA


def test_help_lists_every_command(nothing: Cli) -> None:
    said = nothing("--help").stdout
    for name in set(wfm.commands) - {"celery-worker"}:
        assert f"\n  {name} " in said


def test_help_imports_nothing_that_takes_time() -> None:
    script = (
        "import sys\nfrom wfm.cli import wfm\ntry: wfm(['--help'])\n"
        "except SystemExit: pass\nprint('IMPORTED', *sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    imported = set(out.rpartition("IMPORTED")[2].split())
    assert imported & {"sqlalchemy", "rich", "dynaconf", "transitions", "redis", "psycopg2", "alembic", "yaml"} == set()


def test_both_names_are_the_same_program(nothing: Cli) -> None:
    first, second = (nothing.process("--help", program=p) for p in ("wfm", "ccat_workflow_manager"))
    assert first.replace("wfm", "") == second.replace("ccat_workflow_manager", "").replace("wfm", "")
    assert nothing.process("celery-worker", "--help", program="ccat_workflow_manager")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell: str, nothing: Cli) -> None:
    assert "_WFM_COMPLETE" in nothing("completion", shell).stdout


# --- errors ---


def test_without_servers_it_says_what_to_do(nothing: Cli, tmp_path: Path) -> None:
    said = nothing("runs", "list", code=1).stderr
    assert said.startswith("error: nothing runs in ")
    assert "`wfm up`" in said
    assert not (tmp_path / "home").exists()


def test_wrong_settings_are_all_reported(nothing: Cli) -> None:
    said = nothing("runs", "list", code=2, WFM_LEASE_SECONDS="soon", WFM_BATCH_SIZE="0").stderr
    assert said.count("error: ") == 2
    assert "WFM_LEASE_SECONDS" in said
    assert "WFM_BATCH_SIZE" in said


def test_wrong_usage_ends_with_2(nothing: Cli) -> None:
    nothing("runs", "show", "abc", code=2)
    nothing("runs", "cancel", code=2)
    nothing("nosuch", code=2)
    assert "did you mean 'pipeline'" in nothing("get", "pipelin", code=2).stderr


def test_postgres_out_of_reach(nothing: Cli) -> None:
    away = "postgresql://ada:secret@127.0.0.1:1/wfm"
    said = nothing("runs", "list", code=1, WFM_DATABASE_URL=away).stderr
    assert said.startswith("error: Postgres cannot be reached")
    assert "WFM_DATABASE_URL" in said
    assert "secret" not in said
    assert "Traceback" not in said
    said = nothing("--debug", "runs", "list", code=1, WFM_DATABASE_URL=away).stderr
    assert "Traceback" in said


def test_a_defect_is_one_line_unless_it_is_asked_for_more(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("somewhere deep inside")

    monkeypatch.setattr(views, "runs", broken)
    said = cli("runs", "list", code=1).stderr
    assert said.startswith("error: ZeroDivisionError: somewhere deep inside\n")
    assert "Traceback" not in said
    assert "in broken" in cli("--debug", "runs", "list", code=1).stderr
    assert "in broken" in cli("runs", "list", code=1, WFM_LOG_LEVEL="DEBUG").stderr
    logging.getLogger().setLevel(logging.WARNING)


def test_a_pipe_that_is_closed_is_no_error(nothing: Cli) -> None:
    with nothing.start("charts", "show") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""


def test_an_interrupt_is_quiet(processed: Cli) -> None:
    with processed.start("events", "tail", "--after", "0-0") as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")


# --- charts, db ---


def test_charts_need_no_database(nothing: Cli, tmp_path: Path) -> None:
    assert "no fault" in nothing("charts", "check").stdout
    assert nothing("charts", "show").stdout.startswith("stateDiagram-v2")
    _, checked = nothing.json("charts", "check")
    chart = nothing.json("charts", "show")
    assert (chart["name"], chart["initial"]) == (checked["name"], "PENDING")
    assert (len(chart["states"]), len(chart["transitions"])) == (checked["states"], checked["transitions"])
    assert {"trigger", "source", "dest", "guard"} <= chart["transitions"][0].keys()
    nothing("charts", "show", "--version", 99, code=3)
    nothing("charts", "check", tmp_path / "nosuch.yaml", code=3)
    chart = tmp_path / "broken.yaml"
    chart.write_text(
        "chart: run\nversion: one\ninitial: A\nstates:\n  A: {meaning: a, owner: nobody}\ntransitions: []\n"
    )
    said = nothing("charts", "check", chart, code=2).stderr.splitlines()
    assert len(said) > 3
    assert all(line.startswith(f"error: {chart}:") for line in said)


def test_tables_are_made_and_checked(nothing: Cli, servers: Servers) -> None:
    with servers.database() as url, servers.redis() as redis_url:
        nothing.environ |= {"WFM_DATABASE_URL": url, "WFM_REDIS_URL": redis_url}
        assert "`wfm db upgrade`" in nothing("runs", "list", code=2).stderr
        assert "`wfm db upgrade`" in nothing("worker", code=2).stderr
        assert nothing.json("db", "check", code=1)["revision"] is None
        first, again = nothing.json("db", "upgrade"), nothing.json("db", "upgrade")
        assert (first["before"], again["before"]) == (None, first["revision"])
        found = nothing.json("db", "check")
        assert found["revision"] == found["newest"]
        assert found["differences"] == []
        said = nothing("worker", code=2).stderr
        assert "PROCESSING_LOCATION_ID is 1" in said
        assert "kind: location" in said


# --- the system ---


def test_up_status_down(tmp_path: Path) -> None:
    home = tmp_path / "home"
    cli = Cli(environ(home))
    assert "down" in cli("status", code=1).stdout
    assert "nothing ran" in cli("down").stdout
    assert not home.exists()
    assert cli.json("status", code=1)["counts"] is None
    # The roles find the same home and the same program, wherever `up` was started and however the home was given.
    (tmp_path / "queue.py").write_text("raise SystemExit('this is not the queue of Python')")
    elsewhere = Cli({**environ(home), "WFM_HOME": "", "CCAT_WORKFLOW_MANAGER_HOME": "home"})
    try:
        assert elsewhere.process("up", cwd=tmp_path).startswith(f"home {home}\n")
        first = cli.json("status")
        assert first["running"]
        assert [r["name"] for r in first["roles"]] == [
            *("trigger-manager", "workflow-manager", "worker-1", "result-manager")
        ]
        assert first["counts"]["runs"]["COMPLETED"] == 0
        assert all(len(copies) == 1 for copies in cli.json("health").values())
        assert cli.json("health", "worker").keys() == {"worker"}

        pids = {r["name"]: r["pid"] for r in first["roles"]}
        os.kill(pids["result-manager"], signal.SIGKILL)
        wait_until(lambda: Daemon(home, "result-manager").pid() is None)
        killed = cli.json("status", code=1)
        assert "down" in [r["state"] for r in killed["roles"] if r["name"] == "result-manager"]

        said = cli.process("up", "--workers", "2")
        assert "2 roles started" in said
        after = {r["name"]: r["pid"] for r in cli.json("status")["roles"]}
        same = pids.keys() - {"result-manager"}
        assert {name: after[name] for name in same} == {name: pids[name] for name in same}
        assert after.keys() - pids.keys() == {"worker-2"}
        assert "already" in cli.process("up")
        assert len(processes_of(home)) >= 5
    finally:
        cli.process("down")
    assert processes_of(home) == {}
    assert not [s for s in cli.json("status", code=1)["servers"] if s["state"] == "ok"]
    assert "nothing ran" in cli.process("down")


def test_up_and_down_in_a_subfolder_are_those_of_the_project_and_say_so(tmp_path: Path) -> None:
    home, below = tmp_path / ".wfm", tmp_path / "pipelines"
    home.mkdir()
    below.mkdir()
    cli = Cli({**environ(home), "WFM_HOME": ""})
    try:
        said = cli.process("up", cwd=below)
        assert said.startswith(f"home {home} (found above the working directory; ")
        assert json.loads(cli.process("status", "--json", cwd=below))["home"] == str(home)
    finally:
        said = cli.process("down", cwd=below)
    assert said.startswith(f"home {home} (found above the working directory; ")
    assert not (below / ".wfm").exists()
    assert processes_of(home) == {}


def test_a_role_that_does_not_start_is_named_with_its_log(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    try:
        said = cli("up", "--workers", 2, code=1).stderr
        assert said.startswith("error: worker-2 ended. The last lines of ")
        assert "worker-2.log" in said
    finally:
        Daemon(Path(cli.environ["WFM_HOME"]), "worker-2").stop(1)


def test_doctor(cli: Cli, nothing: Cli) -> None:
    found = cli.json("doctor")
    verdicts = {c["check"]: c["verdict"] for c in found["checks"]}
    checks = {
        "charts",
        "Postgres",
        "clock",
        "tables",
        "location",
        "Redis",
        "Redis rights",
        "pipeline_base_dir",
        "backend",
    }
    assert {check: verdicts.get(check) for check in checks} == dict.fromkeys(checks, "ok")
    assert {s["name"] for s in found["settings"]} >= {"env", "home", "database_url", "hpc_backend"}
    assert "ok" in cli("doctor").stdout

    sick = nothing.json("doctor", code=1, WFM_NOSUCH="1", WFM_PIPELINE_BASE_DIR="/proc/nosuch")
    failed = {c["check"]: c for c in sick["checks"] if c["verdict"] == "fail"}
    assert failed["embedded servers"]["change"] == "wfm up"
    assert failed["pipeline_base_dir"]["change"]
    assert any("WFM_NOSUCH" in c["seen"] for c in sick["checks"] if c["verdict"] == "warn")


def test_doctor_leaves_no_key_in_redis(cli: Cli, home: Path) -> None:
    cli("doctor")
    with redis.Redis(unix_socket_path=str(valkey_socket(cli))) as client:
        assert not client.exists("wfm:{1}:doctor")


def valkey_socket(cli: Cli) -> Path:
    return Embedded(Path(cli.environ["WFM_HOME"])).status()["valkey"].socket


# --- definitions ---


FIVE_FAULTS = """\
kind: pipeline
name: bad
groupin: everything
grouping: everythin
steps:
  - {name: one, software: copy, version: 9.9.9, version_policy: pinned, group_by: [source], max_retries: -1}
  - {name: two, software: copi, group_by: [source]}
"""


@pytest.mark.parametrize("command", ["apply", "diff"])
def test_faults_with_and_without_the_database_come_together(command: str, cli: Cli, tmp_path: Path) -> None:
    """What a document has against itself, and what the database has against it, of all files in one round."""
    file, more = tmp_path / "bad.yaml", tmp_path / "more.yaml"
    file.write_text(FIVE_FAULTS)
    more.write_text(
        "kind: software\nname: tool\nversions:\n  - {version: one, command: []}\n---\n"
        "kind: pipeline\nname: sound\ngrouping: everything\nlocation: archive\n"
        "steps:\n  - {name: one, software: tool, version: 2.0.0, version_policy: pinned}\n"
    )
    said = cli(command, "-f", file, more, code=2)
    assert [line.removeprefix(f"error: {tmp_path}/") for line in said.stderr.splitlines()] == [
        "bad.yaml:3: unknown key 'groupin', did you mean 'grouping'?; allowed: kind, name, renamed_from, description, "
        "grouping, location, trigger, trigger_config, enabled, priority, weight, max_in_flight, stale_priority, steps",
        "bad.yaml:4: unknown grouping 'everythin', did you mean 'everything'?; allowed: everything, only-b",
        "bad.yaml:6: steps[0].max_retries: expected a whole number from 0 to 1000, got '-1'",
        "bad.yaml:6: unknown version of 'copy' '9.9.9'; allowed: 1.0.0",
        "bad.yaml:7: unknown software 'copi', did you mean 'copy'?; allowed: copy, tool",
        "more.yaml:4: versions[0].command: must not be empty",
        "more.yaml:4: 'one' is not a version such as 1.4.0",
        "more.yaml:9: location 'archive' is of type long_term_archive; allowed: processing",
    ]
    assert said.stdout == ""
    cli("get", "software", "tool", code=3)


def test_what_cannot_be_read_may_be_what_another_names(cli: Cli, tmp_path: Path) -> None:
    pipeline = "kind: pipeline\nname: p\ngrouping: everything\nsteps: [{name: s, software: NAME}]\n"
    file = tmp_path / "bad.yaml"
    for broken in ("kind: softwear\nname: tool\n", "- tool\n", "kind: software\nname: tool\ncommand: [\n"):
        file.write_text(pipeline.replace("NAME", "tool") + "---\n" + broken)
        assert len(cli("apply", "-f", file, code=2).stderr.splitlines()) == 1
        file.write_text(pipeline.replace("NAME", "other") + "---\n" + broken)
        assert "unknown software 'other'" in cli("apply", "-f", file, code=2).stderr.splitlines()[0]


def test_faults_of_files_are_told_without_a_database(nothing: Cli, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(FIVE_FAULTS)
    for words in (("apply",), ("diff",)):
        assert [line.split(": ")[1] for line in nothing(*words, "-f", file, code=2).stderr.splitlines()] == [
            f"{file}:3",
            f"{file}:6",
        ]
    file.write_text("kind: site\nname: here\n")
    assert "wfm up" in nothing("apply", "-f", file, code=1).stderr


def test_apply_says_what_changes_and_what_it_touches(processed: Cli, home: Path) -> None:
    again = processed.json("apply", "-f", home / "all.yaml")
    assert {c["action"] for c in again["changes"]} == {"unchanged"}
    assert again["pipelines"] == []
    config = "kind: config\nname: bad\nparameters: {exit: 4}\n"
    planned = processed.json("diff", "-f", "-", stdin=config)
    assert planned["changes"] == [
        {
            "kind": "config",
            "name": "bad",
            "action": "update",
            "differences": [{"field": "parameters.exit", "old": 3, "new": 4}],
            "renamed_from": "",
            "renamed_steps": {},
        }
    ]
    assert [(p["pipeline"], p["units"]) for p in planned["pipelines"]] == [("bad", 1)]
    assert "exit: 3" in processed("get", "config", "bad").stdout
    processed("apply", "-f", "-", stdin=config)
    assert processed.json("get", "config", "bad")[0]["parameters"] == {"exit": 4}
    # Several files after one -f, as a shell's wildcard gives them.
    more = home / "more.yaml"
    more.write_text("kind: site\nname: there\n")
    changes = processed.json("diff", "-f", home / "all.yaml", more)["changes"]
    assert {"site here unchanged", "site there create"} <= {f"{c['kind']} {c['name']} {c['action']}" for c in changes}
    processed("get", "site", "there", code=3)


def test_names_that_do_not_exist(cli: Cli) -> None:
    assert "did you mean 'demo'" in cli("get", "pipeline", "demoo", code=3).stderr
    assert "did you mean 'demo'" in cli("why", "demoo", code=3).stderr
    cli("runs", "show", 999, code=3)
    for command in ("list", "tail"):
        assert "unknown run 999; " in cli("events", command, "--run", 999, code=3).stderr
        assert "did you mean 'demo'" in cli("events", command, "--pipeline", "demoo", code=3).stderr
        assert "unknown unit 'nosuch'" in cli("events", command, "--unit", "nosuch", code=3).stderr
        assert "did you mean 'run.failed'" in cli("events", command, "--type", "run.faild", code=3).stderr
    cli("lineage", "nosuch", code=3)
    cli("trigger", "nosuch", code=3)
    cli("apply", "-f", "nosuch.yaml", code=3)
    assert "nosuch.fits does not exist" in cli("data", "add", "nosuch.fits", "--package", "x", code=3).stderr
    cli("data", "scan", "nosuch", "--pattern", "*", code=3)


def test_delete_refuses_what_is_used(cli: Cli) -> None:
    assert "everything" in cli("delete", "grouping", "everything", code=1).stderr
    cli("apply", "-f", "-", stdin="kind: source\nname: M82\n")
    assert cli.json("delete", "source", "M82") == {"kind": "source", "name": "M82", "deleted": True}
    cli("get", "source", "M82", code=3)


# --- data ---


def test_scan_shows_before_it_adds(cli: Cli, home: Path) -> None:
    found = cli.json("data", "scan", home / "archive", "--pattern", "*.txt")
    assert [(p["name"], p["files"]) for p in found] == [("a", 1), ("b", 1), ("c", 1)]
    cli("data", "scan", home / "archive", "--pattern", "*.fits", code=3)


def test_add_registers_files_as_one_package(processed: Cli, home: Path) -> None:
    night = home / "archive" / "night"
    night.mkdir()
    for name in ("1.dat", "2.dat"):
        (night / name).write_text(name)
    words = ("data", "add", night, "--package", "whole-night", "--executed-obs-unit", "e1", *OBSERVATION)
    assert processed.json(*words) == {"new": 1, "changed": 0, "unchanged": 0}
    assert processed.json(*words) == {"new": 0, "changed": 0, "unchanged": 1}
    (package,) = processed.json("data", "list", "whole*")
    assert (package["files"], package["copies"]) == (2, {"archive": "present"})
    (document,) = processed.json("get", "raw_data_package", "whole-night")
    assert (document["location"], document["path"]) == ("archive", "night")
    again = processed.json("data", "add", "-f", "-", stdin=json.dumps(document))
    assert again == {"new": 0, "changed": 0, "unchanged": 1}
    processed("runs", "watch")


def test_add_needs_a_location_that_holds_the_files(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "x.dat"
    file.touch()
    words = ("data", "add", file, "--package", "x", "--executed-obs-unit", "x", *OBSERVATION)
    said = cli(*words, code=2).stderr
    assert str(tmp_path) in said
    assert "kind: location" in said
    assert "did you mean 'archive'" in cli(*words, "--location", "archiv", code=3).stderr
    assert "--module" in cli("data", "add", file, "--package", "x", code=2).stderr
    cli("data", "add", "-f", "-", code=2, stdin="kind: source\nname: M31\n")


# --- runs ---


def test_what_was_made_can_be_looked_at(processed: Cli) -> None:
    runs = processed.json("runs", "list", "--pipeline", "demo", "--limit", 1000)
    assert {"id", "pipeline", "step", "unit", "state", "attempt"} <= runs[0].keys()
    by_step = {r["step"]: r for r in runs if r["state"] == "COMPLETED"}
    assert by_step.keys() == {"calibrate", "combine"}
    last = by_step["combine"]
    listed = processed("runs", "list", "--pipeline", "demo").stdout
    assert f"{last['id']}  demo      combine" in listed
    assert last["unit"] in listed

    detail = processed.json("runs", "show", last["id"])
    assert [t["dest"] for t in detail["history"]][-1] == "COMPLETED"
    assert "SCIENCE" in processed("runs", "show", last["id"]).stdout
    assert processed("runs", "logs", last["id"]).stdout == ""
    processed("runs", "logs", last["id"], "--attempt", 7, code=3)

    lines = processed.json("why", "demo")
    assert {line["state"] for line in lines} == {"covered"}
    (line,) = processed.json("why", "demo/combine", "ngc253")
    assert line["unit"] == last["unit"]
    assert processed.json("why", "--package", "b")["units"]

    tree = processed("lineage", last["id"]).stdout
    assert "package a" in tree
    assert processed.json("lineage", f"run:{last['id']}")["kind"] == "run"
    assert processed("lineage", "a", "--mermaid").stdout.startswith("flowchart")
    status = processed.json("status")
    assert {(c["pipeline"], c["step"]): c["states"]["covered"] for c in status["coverage"]}["demo", "combine"] == 1


def test_a_narrow_terminal_cuts_nothing(processed: Cli) -> None:
    (last,) = processed.json("runs", "list", "--limit", 1)
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    shown = b""
    with processed.start("runs", "list", "--limit", 1, stdout=end):
        os.close(end)
        with contextlib.suppress(OSError):  # Linux' way to say that the other end is closed
            while block := os.read(terminal, 4096):
                shown += block
    os.close(terminal)
    assert "\x1b[" in shown.decode()
    assert last["unit"] in shown.decode()


def test_watch_cancel_and_retry(processed: Cli) -> None:
    processed("trigger", "slow")
    run = wait_until(
        lambda: next(iter(processed.json("runs", "list", "--pipeline", "slow", "--state", "RUNNING")), None)
    )
    with processed.start("runs", "watch", run["id"], "--json") as watching:
        said = processed.json("runs", "cancel", "--pipeline", "slow", "--reason", "too slow")
        assert said == {"moved": {str(run["id"]): "CANCELLING"}, "refused": {}}
        out, _ = watching.communicate(timeout=60)
    assert watching.returncode == 1
    seen = [json.loads(line) for line in out.splitlines()]
    assert [c["state"] for c in seen][-2:] == ["CANCELLING", "CANCELLED"]
    assert "too slow" in seen[-1]["message"]

    refused = processed("runs", "cancel", run["id"], code=1)
    assert f"run {run['id']}: refused" in refused.stderr
    resumed = {"pipeline": "slow", "step": None, "unit": None, "paused": False, "was_paused": False}
    assert processed.json("resume", "slow") == resumed
    assert processed.json("runs", "retry", run["id"])["moved"] == {str(run["id"]): "PENDING"}
    processed("runs", "cancel", run["id"], "--reason", "enough")
    processed("runs", "watch", run["id"], code=1)


def test_logs_follow_a_job_to_its_end(processed: Cli) -> None:
    assert processed.json("trigger", "bad/break") == {"pipeline": "bad", "step": "break", "units": 1}
    run = wait_until(lambda: next(iter(processed.json("runs", "list", "--pipeline", "bad")), None))
    assert "does not like its input" in processed("runs", "logs", run["id"], "-f").stdout
    processed("runs", "watch", run["id"], code=1)
    (line,) = processed.json("why", "bad")
    assert (line["state"], line["why"]) == ("blocked", "failed")
    history = processed.json("runs", "show", run["id"])["history"]
    assert (history[-1]["dest"], history[-1]["reason"]) == ("FAILED", line["failed"]["message"])
    assert "nothing is under way" in processed("runs", "watch").stderr


def test_enable_and_disable(processed: Cli) -> None:
    assert processed("disable", "slow").stdout == "slow is disabled\n"
    wait_until(lambda: not processed.json("status")["counts"]["pending"])
    assert processed.json("get", "pipeline", "slow")[0]["enabled"] is False
    assert processed.json("enable", "slow") == {"pipeline": "slow", "enabled": True}


def test_try_registers_nothing(processed: Cli, tmp_path: Path) -> None:
    before = [processed.json("runs", "list"), processed.json("data", "list")]
    found = processed.json("try", "demo/combine", "ngc253", "--directory", tmp_path)
    assert found["fault"] == ""
    assert found["report"]["exit_code"] == 0
    products = {p["type"]: p["path"] for p in found["collected"]["products"]}
    made = Path(found["directory"], products["SCIENCE"])
    assert made.is_relative_to(tmp_path)
    assert "data of a" in made.read_text()
    assert [processed.json("runs", "list"), processed.json("data", "list")] == before

    said = processed(
        "try", "demo/calibrate", "a", "--directory", tmp_path, "--command", "sh -c 'echo no; exit 5'", code=1
    )
    assert "no\n" in said.stdout
    assert "exit code  5" in said.stdout
    processed("try", "demo", "a", code=2)
    processed("try", "demo/calibrate", "nosuch", code=3)


# --- events ---


def test_events_are_listed_followed_and_verified(processed: Cli) -> None:
    page = processed.json("events", "list", "--type", "run.collected")
    assert {e["type"] for e in page["events"]} == {"run.collected"}
    event = page["events"][0]
    assert processed.json("events", "show", event["id"])["body"]["state"] == "COMPLETED"
    later = processed.json("events", "list", "--after", page["cursor"], "--type", "run.collected")
    assert later["events"] == []
    with processed.start("events", "tail", "--after", "0-0", "--type", "run.collected", "--json") as tail:
        assert tail.stdout is not None
        assert json.loads(tail.stdout.readline())["id"] == event["id"]
        tail.send_signal(signal.SIGINT)
    report = processed.json("events", "verify")
    assert report["runs"] > 0
    assert report["faults"] == []
    processed("events", "verify", 999, code=3)
    processed("events", "show", 10**9, code=3)
    processed("events", "list", "--after", "nonsense", code=2)


def test_events_are_selected_by_type_and_time_and_paged(processed: Cli) -> None:
    kinds = ("--type", "run.collected", "--type", "gap.detected")
    everything = processed.json("events", "list", *kinds, "--limit", 10_000)["events"]
    assert {e["type"] for e in everything} == {"run.collected", "gap.detected"}
    read, cursor = [], "0-0"
    while page := processed.json("events", "list", *kinds, "--after", cursor, "--limit", 3):
        read += [e["id"] for e in page["events"]]
        cursor = page["cursor"]
        if not page["events"]:
            break
    assert read == [e["id"] for e in everything]
    assert processed.json("events", "list", *kinds, "--since", "1d", "--limit", 10_000)["events"] == everything
    assert processed.json("events", "list", "--until", "1d")["events"] == []
    with processed.start("events", "tail", "--since", "1d", "--type", "gap.detected", "--json") as tail:
        assert tail.stdout is not None
        first = next(e for e in everything if e["type"] == "gap.detected")
        assert json.loads(tail.stdout.readline())["id"] == first["id"]
        tail.send_signal(signal.SIGINT)
    said = processed.process("events", "tail", *kinds, "--after", "0-0", "--until", "0s", "--json")
    assert [json.loads(line)["id"] for line in said.splitlines()] == read, "it ends by itself"
    assert "nor how long ago" in processed("events", "list", "--since", "2 hours", code=2).stderr
    said = processed("events", "list", "--type", "run.faild", "--pipeline", "dem", code=3).stderr
    assert "'dem', did you mean 'demo'" in said
    assert "'run.faild', did you mean 'run.failed'" in said


def test_what_is_named_by_mistake_leads_on(processed: Cli) -> None:
    package = processed.json("data", "list")[0]["name"]
    assert f"`wfm why --package {package}`" in processed("why", package, code=3).stderr
    assert "no product has the id 999999" in processed("revoke", "product", 999_999, "--plan", code=3).stderr


def without_redis(cli: Cli, tmp_path: Path) -> dict[str, Any]:
    """Settings with the same database, and a Redis that is away."""
    database_url = Embedded(Path(cli.environ["WFM_HOME"])).database_url
    return {"WFM_DATABASE_URL": database_url, "WFM_REDIS_URL": f"unix://{tmp_path}/nobody.sock"}


def test_what_redis_was_not_told_is_in_the_ledger(processed: Cli, tmp_path: Path) -> None:
    away = without_redis(processed, tmp_path)
    cursor = processed.json("events", "list", "--limit", 1)["cursor"]
    said = processed("pause", "slow", "--reason", "Redis is away", **away)
    assert "warning: committed, but Redis cannot be told now" in said.stderr
    with processed.start("events", "tail", "--after", cursor, "--json", **away) as tail:
        assert tail.stdout is not None
        event = json.loads(tail.stdout.readline())
        tail.send_signal(signal.SIGINT)
    assert (event["type"], event["reason"]) == ("pipeline.changed", "Redis is away")
    assert event["actor"].startswith("user:")
    processed("events", "replay", "--pending")
    wait_until(lambda: processed.json("events", "show", event["id"])["done_at"])
    processed("events", "replay", event["id"], code=3)
    processed("resume", "slow")


def test_an_ended_run_is_driven_again(processed: Cli) -> None:
    run = next(r["id"] for r in processed.json("runs", "list", "--pipeline", "demo") if r["step"] == "combine")
    for begin, state in (("COLLECTING_RESULTS", "COLLECTING_RESULTS"), ("PENDING", "PENDING")):
        said = processed.json("events", "replay", "--run", run, "--from", begin, "--reason", "a new disk")
        assert said == {"moved": {str(run): state}, "refused": {}}
        processed("runs", "watch", run)
    shown = processed.json("runs", "show", run)
    assert shown["accepted"]
    assert shown["attempt"] == 3
    assert {p["attempt"]: p["superseded_by"] for p in shown["products"]} == {1: run, 2: run, 3: None}
    asked = [t for t in shown["history"] if t["trigger"] in ("recollect", "redrive")]
    assert {t["reason"] for t in asked} == {"a new disk"}
    assert asked[0]["actor"].startswith("user:")
    assert processed.json("events", "verify")["faults"] == []
    said = processed("events", "replay", "--run", run, 7, "--from", "PENDING", "--pending", code=2).stderr
    assert "given: EVENT, --pending, --run" in said
    said = processed("events", "replay", "--from", "PENDING", "--reason", "x", code=2).stderr
    assert "given: none" in said
    assert "--from goes only with --run" in said
    assert "--reason goes only with --run" in said
    processed("events", "replay", "--run", 999, code=3)


def test_dead_letters(processed: Cli, tmp_path: Path) -> None:
    with redis.Redis(unix_socket_path=str(valkey_socket(processed))) as client:
        client.xadd("wfm:{1}:data.arrived", {"event": "this is no JSON"})
    (letter,) = wait_until(lambda: processed.json("events", "dead", "list"))
    assert processed.json("events", "dead", "show", letter["id"])["text"] == "this is no JSON"
    processed("events", "dead", "resend", letter["id"], code=1, **without_redis(processed, tmp_path))
    assert processed.json("events", "dead", "list") == [letter]
    assert processed.json("events", "dead", "resend", letter["id"], "--reason", "try again") == {"resent": 1}
    (second,) = wait_until(lambda: processed.json("events", "dead", "list"))
    assert second["id"] != letter["id"]
    assert "Missing option '--reason'" in processed("events", "dead", "drop", second["id"], code=2).stderr
    assert "dropped 1 message" in processed("events", "dead", "drop", second["id"], "--reason", "a test").stdout
    assert processed.json("events", "dead", "list") == []
    assert processed.json("events", "replay", "--all").keys() == {"published"}
    assert len(processed.json("events", "dead", "list", "--state", "all")) == 2
    (shown,) = processed.json("events", "dead", "list", "--state", "dropped")
    assert (shown["actor_reason"], bool(shown["settled_at"])) == ("a test", True)
    said = processed("events", "dead", "drop", second["id"], letter["id"], "--reason", "x", code=1).stderr
    assert f"dead letter {second['id']} was dropped by user:" in said
    assert f"dead letter {letter['id']} was resent by user:" in said
    processed("events", "dead", "show", 999, code=3)
