"""Takes every guard away in turn and asks the tests to notice: ``make mutants``, or ``python -m tests.faults.mutants``.

Each mutant is a scratch copy of the project with one exact replacement. Its tests, which pass without it, must fail
with it, and by what they assert: a missing name, a type that does not fit or a test that takes too long shows nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from xml.etree import ElementTree

import msgspec
from msgspec import Struct

PROJECT = Path(__file__).parents[2]
PAGE = PROJECT / "docs/explanation/faults.md"
BEGIN, END = "<!-- mutants: begin -->", "<!-- mutants: end -->"
COPIED = ("wfm", "tests", "statecharts", "pyproject.toml")
TEST_SECONDS = 150.0
"""After which a test has shown nothing."""

ASSERTED = re.compile(r"(\w+\.)*(AssertionError|assert)\b|Failed: DID NOT RAISE|Failed: .*should not have")
"""How the message of a test begins that failed by what it asserts."""


class Mutant(Struct, frozen=True):
    """One guard, and how it is taken away.

    Attributes:
        name: of the guard. file: below the project. old: a text that stands there exactly once. new: what replaces it.
        tests: the fewest that must notice.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


class Verdict(Struct, frozen=True):
    """What became of a mutant.

    Attributes:
        state: killed; survived: every test passed; error: the table is wrong, or a test failed for another reason.
        test: the first that failed. message: the first line of why.
    """

    name: str
    state: str
    test: str = ""
    message: str = ""
    seconds: float = 0.0


def mutate(mutant: Mutant, root: Path) -> None:
    """Take the guard away below `root`.

    Raises:
        ValueError: the text to replace is not there, or more than once.
    """
    path = root / mutant.file
    text = path.read_text(encoding="utf-8")
    if (n := text.count(mutant.old)) != 1:
        raise ValueError(f"{mutant.file}: the text to replace stands there {n} times instead of once: {mutant.old!r}")
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")


def judge(name: str, code: int, report: Path, output: str, seconds: float) -> Verdict:
    """What a test session says of a mutant."""
    if code == 0:
        return Verdict(name, "survived", seconds=seconds)
    last = output.strip().splitlines()[-1] if output.strip() else ""
    if code != 1 or not report.exists():
        return Verdict(name, "error", message=f"pytest ended with {code}: {last}", seconds=seconds)
    for case in ElementTree.parse(report).iter("testcase"):
        for fault in (*case.findall("failure"), *case.findall("error")):
            message = (fault.get("message") or fault.text or "").strip()
            lines = message.splitlines() or ["(no message)"]
            first = lines[1] if lines[0].endswith("the checker found:") and len(lines) > 1 else lines[0]
            state = "killed" if fault.tag == "failure" and ASSERTED.match(message) else "error"
            return Verdict(name, state, str(case.get("name")), _shown(first), seconds)
    return Verdict(name, "error", message=f"no test failed, but pytest ended with {code}: {last}", seconds=seconds)


def _shown(line: str) -> str:
    """One line without what differs from one time to the next, or tells of this machine."""
    line = re.sub(r"(/[\w.@:+-]+){3,}", "…", line)
    line = re.sub(r"0x[0-9a-f]+|[0-9a-f]{16,}|\b\d{10,}(-\d+)?\b", "…", line)
    return line if len(line) <= 160 else line[:159] + "…"


def run(mutant: Mutant) -> Verdict:
    """Make the mutant and run its tests."""
    with tempfile.TemporaryDirectory(prefix="wfm-mutant-") as directory:
        root = Path(directory, "project")
        copy(root)
        try:
            mutate(mutant, root)
        except (ValueError, OSError) as error:
            return Verdict(mutant.name, "error", message=str(error))
        return session(mutant.name, mutant.tests, root, Path(directory))


def copy(root: Path) -> None:
    """The project as far as its tests need it."""
    root.mkdir()
    for name in COPIED:
        source = PROJECT / name
        if source.is_dir():
            shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, root / name)


def session(name: str, tests: Sequence[str], root: Path, scratch: Path) -> Verdict:
    """Run tests in a copy of the project, with its own modules before the installed ones."""
    environ = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    told = subprocess.run(
        [sys.executable, "-c", "import wfm; print(wfm.__file__)"],
        cwd=root,
        env=environ,
        capture_output=True,
        text=True,
        check=True,
    )
    if not told.stdout.startswith(str(root)):
        raise RuntimeError(f"the tests would import {told.stdout.strip()} instead of the mutant in {root}")
    report = scratch / "report.xml"
    options = ["-x", "-q", "-p", "no:cacheprovider", "--tb=short", f"--timeout={TEST_SECONDS:g}"]
    options += [f"--junitxml={report}", f"--basetemp={scratch / 'tmp'}"]
    began = time.monotonic()
    with (scratch / "output").open("w+b") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, *tests],
            cwd=root,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=TEST_SECONDS * (len(tests) + 1))
        except subprocess.TimeoutExpired:
            code = -1
        finally:
            _end(process, scratch)
        output.seek(0)
        text = output.read().decode(errors="replace")
    return judge(name, code, report, text, time.monotonic() - began)


def _end(process: subprocess.Popen[bytes], scratch: Path) -> None:
    """End what a session started: a mutant may have lost control of roles and jobs; all have its directory's name."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and str(scratch).encode() in (entry / "environ").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)


def baseline(mutants: Iterable[Mutant]) -> Verdict:
    """All tests of these mutants, without any of them; they must pass."""
    tests = sorted({test for m in mutants for test in m.tests})
    with tempfile.TemporaryDirectory(prefix="wfm-mutant-") as directory:
        root = Path(directory, "project")
        copy(root)
        return session("without any mutant", tests, root, Path(directory))


def table(mutants: Sequence[Mutant], verdicts: dict[str, Verdict]) -> str:
    """Markdown: what was taken away, what noticed, and in what words."""
    rows = ["| guard taken away | in | test that fails | with |", "|---|---|---|---|"]
    for m in mutants:
        v = verdicts[m.name]
        said = v.message.replace("|", "\\|").replace("`", "'")
        noticed = f"`{v.test}` | `{said}`" if v.state == "killed" else f"**{v.state}** {v.test} | {said}"
        rows.append(f"| {m.name} | {m.file.removeprefix('wfm/')} | {noticed} |")
    return "\n".join(rows)


def write_page(text: str) -> None:
    """Put the table between its markers."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not rest or not rest.count(END):
        raise SystemExit(f"{PAGE.name} has no markers {BEGIN} and {END}")
    PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    from tests.faults.guards import MUTANTS

    parser = argparse.ArgumentParser(prog="mutants", description="Take every guard away; the tests must notice.")
    parser.add_argument("--only", metavar="NAME", action="append", help="guards whose name has this in it")
    parser.add_argument("--list", action="store_true", help="the guards and their tests")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="mutants at a time (default 2)")
    parser.add_argument("--json", action="store_true", help="verdicts as JSON on standard output")
    parser.add_argument("--no-baseline", action="store_true", help="do not run the tests without mutants first")
    given = parser.parse_args(arguments)
    chosen = [m for m in MUTANTS if not given.only or any(word in m.name for word in given.only)]
    if not chosen:
        print(f"no guard has {' or '.join(given.only)} in its name; see --list", file=sys.stderr)
        return 3
    if given.list:
        for m in chosen:
            print(f"{m.name}\n  {m.file}\n" + "".join(f"  {test}\n" for test in m.tests))
        return 0
    if not given.no_baseline:
        sound = baseline(chosen)
        print(f"{sound.state:9} {sound.seconds:5.0f} s  {sound.name} {sound.test} {sound.message}", file=sys.stderr)
        if sound.state != "survived":
            return 1
    verdicts: dict[str, Verdict] = {}
    with ThreadPoolExecutor(given.jobs) as pool:
        for future in as_completed([pool.submit(run, m) for m in chosen]):
            v = future.result()
            verdicts[v.name] = v
            print(
                f"{len(verdicts):3}/{len(chosen)} {v.state:9} {v.seconds:5.0f} s  {v.name}: {v.test} {v.message}",
                file=sys.stderr,
                flush=True,
            )
    if given.json:
        print(json.dumps([msgspec.to_builtins(verdicts[m.name]) for m in chosen], indent=2))
    if not given.only:
        write_page(table(chosen, verdicts))
    left = [v for v in verdicts.values() if v.state != "killed"]
    print(f"{len(verdicts) - len(left)} of {len(verdicts)} mutants were noticed", file=sys.stderr)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
