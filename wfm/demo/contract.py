"""The container contract as reduction software sees it: a manifest and files in, files and an exit code out."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

BAD_INPUT = 2
"""Exit code of a program that was given something it cannot work with."""


class BadInputError(Exception):
    """The environment, the manifest, a parameter or an input file is not usable; the text is one line that says why."""


@dataclass(frozen=True)
class Job:
    """One execution of a program.

    Attributes:
        manifest: the parsed ``manifest.json``.
        workspace: directory for anything temporary.
        output: directory for the results.
        logs: directory for the logs.
    """

    manifest: Mapping[str, Any]
    workspace: Path
    output: Path
    logs: Path

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Job:
        """The job that the ``WORKFLOW_*`` variables describe.

        Raises:
            BadInputError: variables are missing (all are named), or the manifest cannot be read.
        """
        names = ("WORKFLOW_MANIFEST", "WORKFLOW_WORKSPACE_DIR", "WORKFLOW_OUTPUT_DIR", "WORKFLOW_LOG_DIR")
        if missing := [name for name in names if not environment.get(name)]:
            raise BadInputError(f"not set in the environment: {', '.join(missing)}")
        manifest, workspace, output, logs = (Path(environment[name]) for name in names)
        try:
            content = json.loads(manifest.read_bytes())
        except (OSError, ValueError) as e:
            raise BadInputError(f"manifest {manifest}: {e}") from e
        if not isinstance(content, dict):
            raise BadInputError(f"manifest {manifest}: an object is expected, not {type(content).__name__}")
        return cls(content, workspace, output, logs)

    @property
    def creator(self) -> str:
        """Name and version of the software, for the headers of its products."""
        software = self.manifest.get("software", {})
        return f"{software.get('name', 'unnamed')} {software.get('version', '')}".strip()

    def inputs(self, key: str, suffix: str) -> list[Path]:
        """The inputs under ``input_files`` or ``input_products`` whose name ends so, sorted by name.

        Raises:
            BadInputError: there is none, two bear the same name, or some do not exist (all are named).
        """
        entries = [e for e in self.manifest.get(key, ()) if e["name"].endswith(suffix)]
        found = sorted((Path(e["path"]) for e in entries), key=lambda path: path.name)
        if not found:
            raise BadInputError(f"the manifest has no {key} named *{suffix}")
        if absent := [str(path) for path in found if not path.is_file()]:
            raise BadInputError(f"{key} that do not exist: {', '.join(absent)}")
        if doubled := sorted({a.name for a, b in pairwise(found) if a.name == b.name}):
            raise BadInputError(f"{key} given more than once: {', '.join(doubled)}")
        return found

    def parameters(self, **types: type) -> dict[str, Any]:
        """The parameters of the config; exactly these names with these types (an int will do for a float).

        Raises:
            BadInputError: parameters are missing, unknown or of another type; all are named.
        """
        given = self.manifest.get("config", {}).get("parameters", {})
        faults = [f"{name} is missing" for name in types if name not in given]
        faults += [f"{name} is unknown (known: {', '.join(types)})" for name in given if name not in types]
        for name in types.keys() & given.keys():
            value, wanted = given[name], types[name]
            if isinstance(value, bool) or not isinstance(value, (int, float) if wanted is float else wanted):
                faults.append(f"{name} is {value!r}, not a {wanted.__name__}")
        if faults:
            raise BadInputError(f"config parameters: {'; '.join(sorted(faults))}")
        return dict(given)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what goes wrong with the content of an input into a `BadInputError` that names the file."""
    try:
        yield
    except (OSError, KeyError, IndexError, TypeError, ValueError) as e:
        raise BadInputError(f"{path.name}: {' '.join(str(e).split())}") from e


def write_json(path: Path, content: object) -> None:
    """Writes JSON that is the same for the same content; NaN, which JSON does not have, is an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def write_log(path: Path, lines: list[str]) -> None:
    """Writes a log without times, so that the same work leaves the same log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def run(program: Callable[[Job], None]) -> NoReturn:
    """Runs a program on the job of this process and leaves: code 0, or `BAD_INPUT` with one line on stderr."""
    try:
        program(Job.from_environment(os.environ))
    except BadInputError as e:
        sys.stderr.write(f"{Path(sys.argv[0]).stem}: {e}\n")
        sys.exit(BAD_INPUT)
    sys.exit(0)
