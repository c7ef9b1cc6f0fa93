"""What test clients asked of wfm, and what they were told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

from msgspec import Struct
from redis.exceptions import RedisError
from sqlalchemy.exc import DBAPIError

from wfm.errors import WfmError
from wfm.store import is_connection_error

T = TypeVar("T")


class Call(Struct):
    """One request.

    Attributes:
        operation: register, cancel, retry, xadd, ...
        target: the name of a package, or the id of a run.
        content: for register, the checksum of each file by its name.
        outcome: unknown until told otherwise, and for good if the reply was lost: it may have happened or not.
    """

    operation: str
    target: str | int
    content: dict[str, str] = {}
    outcome: Literal["ok", "failed", "unknown"] = "unknown"


class History:
    """All requests of a test's clients, in order. Safe to use from several threads."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def call(self, calls: Sequence[Call], work: Callable[[], T]) -> T | None:
        """Do `work`, and note how it ended for all these requests.

        Returns:
            its value; None if the reply was lost.

        Raises:
            WfmError: it was refused.
        """
        self.calls += calls
        try:
            value = work()
        except WfmError:
            self._settle(calls, "failed")
            raise
        except (DBAPIError, RedisError) as e:
            if isinstance(e, DBAPIError) and not is_connection_error(e):
                self._settle(calls, "failed")
                raise
            return None
        self._settle(calls, "ok")
        return value

    def _settle(self, calls: Sequence[Call], outcome: Any) -> None:
        for call in calls:
            call.outcome = outcome

    def of(self, operation: str) -> list[Call]:
        """The requests of one kind."""
        return [c for c in self.calls if c.operation == operation]
