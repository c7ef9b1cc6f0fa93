"""Redis Streams, as carriers of hints.

One stream for each event type with a recipient (``wfm:{<location>}:<type>``), with one consumer group (the recipient
role); acknowledged entries are deleted, so a stream's length is its backlog. At the high-water mark it takes no more.
Beside them ``wfm:{<location>}:events``, capped, with a copy of everything for anybody. Needs no command newer than
Redis 6.2; touches no key but ours, and those that somebody names for a copy of the log.

A random ``life`` key stands beside the streams: when it is gone, Redis was emptied and the ledger is published again.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import uuid
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import redis
from msgspec import Struct
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError
from redis.retry import Retry

from wfm.errors import UsageError
from wfm.events import TYPES, Message

log = logging.getLogger(__name__)

FIELD = b"event"

PAGE = 500
"""Messages written in one round trip."""

__all__ = ["Bus", "Entry", "RedisError", "connect"]


class Entry(Struct, frozen=True):
    """One message as delivered. `deliveries` counts how often, where that is known (else 1)."""

    stream: str
    id: str
    body: bytes
    deliveries: int = 1

    @property
    def type(self) -> str:
        """The event type that the stream carries."""
        return self.stream.rsplit(":", 1)[-1]


def connect(url: str, options: Mapping[str, Any], *, timeout: float = 10.0) -> redis.Redis:
    """A client that never waits for ever and never repeats a command by itself: repetition is ours to decide."""
    client: redis.Redis = redis.Redis.from_url(
        url,
        decode_responses=False,
        socket_timeout=timeout,
        socket_connect_timeout=timeout,
        retry=Retry(NoBackoff(), 0),
        **options,
    )
    return client


def check_foreign(stream: str) -> None:
    """Refuse a stream's key that is not one for others to choose.

    Raises:
        UsageError: the key is one of ours, or lies outside what wfm may touch.
    """
    if not re.fullmatch(r"wfm:[\x21-\x7e]+", stream, re.ASCII) or stream.startswith("wfm:{"):
        raise UsageError(
            f"{stream!r}: allowed is a key of your own that begins with wfm: without spaces, such as wfm:mine:replay, "
            "but not with wfm:{, which is for wfm"
        )


class Bus:
    """The streams of one location, as one consumer sees them.

    Args:
        client: a `connect`ed client; blocking reads take their own connection from its pool.
        location_id: see above.
        group: the role that reads. streams: the event types it reads.
        public_length: about how many entries the public stream keeps.
        high_water: how many entries the other streams hold at most.
    """

    def __init__(
        self,
        client: redis.Redis,
        location_id: int,
        group: str = "",
        streams: Sequence[str] = (),
        *,
        public_length: int,
        high_water: int,
    ) -> None:
        self.client = client
        self.group = group
        self.prefix = f"wfm:{{{location_id}}}:"
        self.streams = [self.prefix + s for s in streams]
        self.consumer = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self.public_length = public_length
        self.high_water = high_water
        self._lengths: dict[str, int] = {}
        self._claim_from = dict.fromkeys(self.streams, b"0-0")

    # --- writing ---

    def send(self, messages: Sequence[Message], done: Sequence[Entry] = ()) -> list[Message]:
        """Acknowledge, delete and publish, in one round trip for each `PAGE` of messages.

        A stream at its mark takes no more: its reader has enough to wake up by. Writers that know its length from the
        same moment can go over the mark by a page each.

        Returns:
            the messages that were kept from their streams. The public stream, which is capped, shows them all the same.
        """
        if not messages and not done:
            return []
        pipe = self.client.pipeline(transaction=False)
        by_stream: dict[str, list[str]] = {}
        for entry in done:
            by_stream.setdefault(entry.stream, []).append(entry.id)
        for stream, ids in by_stream.items():
            pipe.xack(stream, self.group, *ids)
            pipe.xdel(stream, *ids)
        kept: list[Message] = []
        for start in range(0, max(len(messages), 1), PAGE):
            page = messages[start : start + PAGE]
            room = self._room({m.type for m in page if m.recipient})
            for m in page:
                if m.recipient and room[m.type] > 0:
                    pipe.xadd(self.prefix + m.type, {FIELD: m.body})
                    room[m.type] -= 1
                elif m.recipient:
                    kept.append(m)
                if m.id is not None:
                    pipe.xadd(self.prefix + "events", {FIELD: m.body}, maxlen=self.public_length, approximate=True)
            self._execute(pipe, list(room))
        return kept

    def _execute(self, pipe: Any, kinds: Sequence[str]) -> None:
        """Send what is in the pipe, and learn how long these streams are now."""
        for kind in kinds:
            pipe.xlen(self.prefix + kind)
        replies = pipe.execute(raise_on_error=False)
        errors = [r for r in replies if isinstance(r, RedisError)]
        if errors:
            raise errors[0]
        self._lengths.update(zip(kinds, replies[len(replies) - len(kinds) :], strict=True))

    def _room(self, kinds: Collection[str]) -> dict[str, int]:
        """How many more entries these streams take. Asks only where a stream was full or is not known."""
        unsure = [k for k in kinds if self._lengths.get(k, self.high_water) >= self.high_water]
        if unsure:
            self.backlog(unsure)
        return {k: self.high_water - self._lengths[k] for k in kinds}

    def append(self, stream: str, bodies: Sequence[bytes]) -> None:
        """Append messages to a stream of somebody else (see `check_foreign`), in one round trip.

        Raises:
            UsageError: the key holds something else.
        """
        pipe = self.client.pipeline(transaction=False)
        for body in bodies:
            pipe.xadd(stream, {FIELD: body})
        errors = [r for r in pipe.execute(raise_on_error=False) if isinstance(r, RedisError)]
        if errors and "WRONGTYPE" in str(errors[0]):
            raise UsageError(f"{stream!r} holds something else than a stream")
        if errors:
            raise errors[0]

    def backlog(self, kinds: Sequence[str]) -> dict[str, int]:
        """The number of undone entries in the streams of these event types."""
        pipe = self.client.pipeline(transaction=False)
        for kind in kinds:
            pipe.xlen(self.prefix + kind)
        lengths = dict(zip(kinds, pipe.execute(), strict=True))
        self._lengths |= lengths
        return lengths

    # --- reading ---

    def join(self) -> None:
        """Make our groups where they are missing, from the beginning of the streams: older entries count too."""
        for stream in self.streams:
            try:
                self.client.xgroup_create(stream, self.group, id="0", mkstream=True)
            except ResponseError as e:
                if not str(e).startswith("BUSYGROUP"):
                    raise

    def read(self, count: int, block_seconds: float) -> list[Entry]:
        """New entries, waiting for some. A group that was destroyed is made again."""
        return self._read(">", count, block_seconds)

    def read_own_pending(self, count: int) -> list[Entry]:
        """Entries delivered to us whose reply we may never have seen: read after every connection error."""
        return self._read("0", count, None)

    def _read(self, start: str, count: int, block_seconds: float | None) -> list[Entry]:
        block = None if block_seconds is None else max(1, int(block_seconds * 1000))
        try:
            reply = self.client.xreadgroup(
                self.group, self.consumer, dict.fromkeys(self.streams, start), count=count, block=block
            )
        except ResponseError as e:
            if "NOGROUP" not in str(e):
                raise
            log.warning("consumer groups are gone (%s); making them again", e)
            self.join()
            return []
        pairs = reply.items() if isinstance(reply, dict) else reply or ()
        return [entry for stream, entries in pairs for entry in _entries(stream, entries)]

    def claim_idle(self, min_idle_seconds: float, count: int) -> list[Entry]:
        """Entries that others took and did not finish. Follows the server's cursor over several calls."""
        claimed: list[Entry] = []
        for stream in self.streams:
            try:
                reply = self.client.xautoclaim(
                    stream,
                    self.group,
                    self.consumer,
                    int(min_idle_seconds * 1000),
                    start_id=self._claim_from[stream],
                    count=count,
                )
            except ResponseError as e:
                if "NOGROUP" not in str(e):
                    raise
                self.join()
                continue
            self._claim_from[stream] = reply[0]
            entries = _entries(stream, reply[1])
            if entries:
                claimed.extend(self._with_deliveries(stream, entries))
        return claimed

    def _with_deliveries(self, stream: str, entries: list[Entry]) -> list[Entry]:
        pending = self.client.xpending_range(
            stream,
            self.group,
            min=entries[0].id,
            max=entries[-1].id,
            count=len(entries) * 4,
            consumername=self.consumer,
        )
        counts = {cast(bytes, p["message_id"]).decode(): int(p["times_delivered"]) for p in pending}
        return [Entry(e.stream, e.id, e.body, counts.get(e.id, 1)) for e in entries]

    # --- upkeep ---

    def mend(self, error: RedisError) -> None:
        """If a key of ours holds something of another type, remove that: the ledger publishes again what it hid."""
        if "WRONGTYPE" not in str(error):
            return
        types = dict.fromkeys((self.prefix + name for name in (*TYPES, "events")), b"stream")
        types[self.prefix + "life"] = b"string"
        pipe = self.client.pipeline(transaction=False)
        for key in types:
            pipe.type(key)
        try:
            found = zip(types.items(), pipe.execute(), strict=True)
            wrong = [key for (key, type_), is_ in found if is_ not in (type_, b"none")]
            if wrong:
                log.warning("removed, for they were not of the type that wfm uses: %s", ", ".join(wrong))
                self.client.delete(*wrong)
        except RedisError as e:
            log.warning("keys of another type could not be removed: %s", e)

    def life(self) -> tuple[str, bool]:
        """The name of this Redis' present life, and whether we have just given it: then Redis was empty."""
        key = self.prefix + "life"
        fresh = uuid.uuid4().hex
        pipe = self.client.pipeline(transaction=True)
        pipe.set(key, fresh, nx=True)
        pipe.get(key)
        born, value = pipe.execute()
        return value.decode(), bool(born)

    def forget_consumers(self, idle_seconds: float = 3600.0) -> None:
        """Delete consumers that hold nothing and have been silent for long.

        Should one lose an entry by this, the ledger publishes it again.
        """
        for stream in self.streams:
            for c in self.client.xinfo_consumers(stream, self.group):
                if not c["pending"] and c["idle"] > idle_seconds * 1000:
                    self.client.xgroup_delconsumer(stream, self.group, c["name"])

    def leave(self) -> None:
        """Take our name off the groups, unless we still hold entries (others will claim those)."""
        for stream in self.streams:
            mine = [c for c in self.client.xinfo_consumers(stream, self.group) if c["name"] == self.consumer.encode()]
            if mine and not mine[0]["pending"]:
                self.client.xgroup_delconsumer(stream, self.group, self.consumer)


def _entries(stream: Any, raw: Any) -> list[Entry]:
    """Entries of a reply. One whose body was deleted comes back empty (its form differs by server version): it is
    handed on with an empty body, for the ledger to judge. One without our field has all its fields for a body."""
    name = stream.decode() if isinstance(stream, bytes) else str(stream)
    if raw and isinstance(raw[0], list) and raw[0] and isinstance(raw[0][0], (list, tuple)):
        raw = raw[0]  # RESP3 nests the entries once more
    out = []
    for item in raw or ():
        if item is None or item[0] is None:
            continue
        fields = item[1] or {}
        foreign = b", ".join(b"%s: %s" % pair for pair in fields.items())
        out.append(Entry(name, item[0].decode(), fields.get(FIELD, foreign)))
    return out
