"""The exceptions of wfm.

::

    WfmError                    everything we raise on purpose; its text says what to change
    ├─ UsageError               wrong usage or configuration                        exit code 2
    │  ├─ ConfigError           settings: name, value and what is allowed
    │  ├─ ChartError            a statechart: every fault at once
    │  └─ DocumentError         a YAML document: every fault at once, with file and line
    ├─ NotFoundError            a thing that was named does not exist               exit code 3
    ├─ RefusedError             the run's chart has no such move from its state     exit code 1
    ├─ UnavailableError         a server or target cannot be reached: try later     exit code 1
    ├─ InputError               a run's input is missing, altered or does not match
    ├─ OutputError              a run's output breaks the container contract
    └─ HeldError                a task must wait (disk space, no reachable copy); not a failure

Whether something may be repeated is a class, not a flag: `UnavailableError` and `HeldError` are
repeated, everything else is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class WfmError(Exception):
    """Base of every error that wfm raises on purpose."""

    exit_code = 1


class UsageError(WfmError):
    """Wrong usage or configuration; the text says what to change."""

    exit_code = 2


class ConfigError(UsageError):
    """One or more settings are wrong.

    Args:
        faults: every fault found, one line each, naming the setting, its value and what is allowed.
    """

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(self.faults))


class ChartError(UsageError):
    """A statechart is broken.

    Args:
        faults: every fault found, one line each.
    """

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(self.faults))


class DocumentError(UsageError):
    """Applied documents are broken; nothing was applied.

    Args:
        faults: every fault found, one line each, as ``file:line: message``.
    """

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(self.faults))


class NotFoundError(WfmError):
    """A thing that was named does not exist; the text gives the nearest names where there are any."""

    exit_code = 3


class RefusedError(WfmError):
    """The chart has no such move from the run's state (a late or doubled message, or a user's request)."""


class UnavailableError(WfmError):
    """A server, scheduler or file system cannot be reached now. Clocks stop; nothing fails."""


class InputError(WfmError):
    """An input of a run is missing, does not match its checksum, or was altered by the job."""


class OutputError(WfmError):
    """What a job left behind breaks the container contract."""


class HeldError(WfmError):
    """A task cannot go on now and must be tried later; nothing has failed.

    Args:
        reason: what people read in `wfm why`, for example ``held: disk: needs 5.0 GB, 1.2 GB free``.
        retry_in: seconds until the next look.
    """

    def __init__(self, reason: str, retry_in: float = 30.0) -> None:
        self.reason = reason
        self.retry_in = retry_in
        super().__init__(reason)


def nearest(name: object, known: Iterable[str], *, likeness: float = 0.6) -> str | None:
    """The known name that somebody probably meant, upper and lower case aside; None where none is near."""
    by_fold = {k.casefold(): k for k in known}
    near = get_close_matches(str(name).casefold(), by_fold, n=1, cutoff=likeness)
    return by_fold[near[0]] if near else None
