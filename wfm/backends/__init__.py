"""Where jobs execute: one port, and the table of its implementations.

Every backend obeys the same rules (``tests/contract/test_backend.py`` holds each of them to it):

* a job's first act is an atomic claim in its attempt directory (`CLAIM`); it is refused when somebody holds the claim
  or a `CANCELLED` mark lies there, and then the job exits with `REFUSED_EXIT` and touches nothing;
* the job's last act is to write its exit record (`EXIT_RECORD`) atomically; success needs that record;
* `submit` of a job that already exists by name adopts it: it returns its handle and starts nothing;
* absence from a queue is never success; a target that cannot be asked makes `UNKNOWN`, never a failure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from wfm.errors import ConfigError
from wfm.model import JobRef, JobSpec, Report

if TYPE_CHECKING:
    from wfm.config import Settings

CLAIM = "claim"
"""Directory made by the job that owns the attempt; holds ``owner.json``."""
CANCELLED = "cancelled"
"""File whose presence forbids the job to start."""
EXIT_RECORD = "exit.json"
"""What the job wrote when it ended: exit code, times, resource use."""
JOB_LOG = "logs/job.log"
"""Standard output and error of the software."""
REFUSED_EXIT = 86
"""Exit code of a job that did not get the claim."""


class Backend(Protocol):
    """A place where jobs execute."""

    name: str
    poll_seconds: float
    """Shortest useful time between two polls."""

    def submit(self, specs: Sequence[JobSpec]) -> Mapping[str, JobRef | Exception]:
        """Start or adopt jobs; by name, the job, or why not.

        An `UnavailableError` means "not known whether it happened; ask again"; any other `WfmError` is a refusal
        for good.
        """
        ...

    def poll(self, jobs: Sequence[JobRef]) -> Mapping[str, Report]:
        """What became of these jobs, in one question to the target; by name."""
        ...

    def find(self, jobs: Sequence[JobRef]) -> Mapping[str, Report]:
        """Look jobs up by name alone, handles ignored; `ABSENT` only when that is certain."""
        ...

    def cancel(self, jobs: Sequence[JobRef]) -> Mapping[str, Report]:
        """Make the `CANCELLED` marks durable, stop what runs (whole process groups), and report what is seen then."""
        ...

    def logs(self, job: JobRef) -> str:
        """Path of the job's log file, or its text when it is elsewhere."""
        ...


def _local(settings: Settings) -> Backend:
    from wfm.backends.local import LocalBackend

    return LocalBackend(poll_seconds=settings.poll_seconds)


BACKENDS: dict[str, Callable[[Settings], Backend]] = {"local": _local}
"""Backends by the name that the setting HPC_BACKEND takes."""


def open_backend(settings: Settings) -> Backend:
    """The configured backend.

    Raises:
        ConfigError: this version has no such backend.
    """
    try:
        return BACKENDS[settings.hpc_backend](settings)
    except KeyError:
        raise ConfigError(
            [f"HPC_BACKEND: {settings.hpc_backend!r} is not in this version; allowed: {', '.join(BACKENDS)}"]
        ) from None
