"""A network that can be made bad: a proxy before Postgres or Redis that understands just enough of both protocols.

It loses the *reply* of a chosen request (the thing has happened, the client cannot know) or the request itself, answers
Redis commands with errors of its own, refuses, delays, and holds everything back until it is healed (what was held then
goes on its way, as after a retransmission). One thread with an event loop serves all connections of a proxy.

Requests have names: the first word of a simple query (`COMMIT`; psycopg2 sends no others), or a Redis command. A
`COMMIT` counts only where its transaction changed rows, and a reply to `XREADGROUP` only where it brings entries: to
lose the others is no fault.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NamedTuple, Self, TypeVar
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from sqlalchemy import make_url

T = TypeVar("T")

WRITES = frozenset({"SET", "DEL", "XADD", "XDEL", "XACK", "XTRIM", "XGROUP", "XREADGROUP", "XAUTOCLAIM"})
"""Commands that a server which takes no writes refuses."""
GROWING = frozenset({"SET", "XADD", "XGROUP"})
"""Commands that a server whose memory is full refuses."""
BLOCKING = frozenset({"XREADGROUP"})

READONLY = "READONLY You can't write against a read only replica."
MISCONF = "MISCONF Valkey is configured to save RDB snapshots, but it's currently unable to persist to disk."
OOM = "OOM command not allowed when used memory > 'maxmemory'."
NOPERM = "NOPERM User default has no permissions to run this command"
LOADING = "LOADING Valkey is loading the dataset in memory"
UNBLOCKED = "UNBLOCKED force unblock from blocking operation, instance state changed (master -> replica?)"


class Rule:
    """What befalls requests of these names.

    Args:
        names: empty: every request. skip: the first so many are spared. times: so many are met, then no more.
        every: of the others, the first of so many is met. p: probability that it really is. seed: of the choice.

    Attributes:
        hits: how many were met.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        skip: int = 0,
        times: float = float("inf"),
        every: int = 1,
        p: float = 1.0,
        seed: float = 0,
    ) -> None:
        self.names = frozenset(names)
        self.hits = 0
        self._seen = -skip
        self._times = times
        self._every = every
        self._p = p
        self._random = random.Random(seed)

    def meets(self, name: str) -> bool:
        """Whether this request is to be met; it then counts as met."""
        if self.hits >= self._times or (self.names and name not in self.names):
            return False
        self._seen += 1
        if self._seen <= 0 or (self._seen - 1) % self._every:
            return False
        if self._random.random() >= self._p:
            return False
        self.hits += 1
        return True


class _CutError(Exception):
    """This connection ends here."""


class _Link(NamedTuple):
    """One connection through the proxy: its two ends."""

    from_client: asyncio.StreamReader
    to_client: asyncio.StreamWriter
    from_server: asyncio.StreamReader
    to_server: asyncio.StreamWriter


class Proxy:
    """Both proxies' better half: connections, rules, weather. Use as a context manager.

    Attributes:
        url: what clients use instead of the server's.
        seen: how many requests of each name came by, answered or not.
    """

    url: str

    def __init__(self, unix_path: str | None, host: str, port: int) -> None:
        self.seen: Counter[str] = Counter()
        self._target = (unix_path, host, port)
        self._lost_requests: list[Rule] = []
        self._lost_replies: list[Rule] = []
        self._refusing = False
        self._delay = 0.0
        self._links: set[_Link] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self.port = self._do(self._listen())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # --- what tests ask for ---

    def lose_replies(self, *names: str, **which: Any) -> Rule:
        """Cut the connection when the server has answered such a request, before the client sees it; see `Rule`."""
        self._lost_replies.append(rule := Rule(names, **which))
        return rule

    def lose_requests(self, *names: str, **which: Any) -> Rule:
        """Cut the connection when such a request comes, before the server sees it; see `Rule`."""
        self._lost_requests.append(rule := Rule(names, **which))
        return rule

    def cut(self) -> None:
        """Break all connections; new ones are welcome."""
        self._now(self._cut)

    def refuse(self) -> None:
        """Break all connections, and any new one at once."""
        self._refusing = True
        self.cut()

    def stall(self) -> None:
        """Let nothing through, either way, and say nothing; connections stay open and new ones are made."""
        self._now(self._flowing.clear)

    def delay(self, seconds: float) -> None:
        """Hold every request and every reply back for so long."""
        self._delay = seconds

    def heal(self) -> None:
        """A good network again: no rules, nothing refused, delayed or held."""
        self._lost_requests.clear()
        self._lost_replies.clear()
        self._refusing = False
        self._delay = 0.0
        self._now(self._flowing.set)

    # --- connections ---

    async def _listen(self) -> int:
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def _serve(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        if self._refusing:
            to_client.transport.abort()
            return
        path, host, port = self._target
        try:
            opened = asyncio.open_unix_connection(path) if path else asyncio.open_connection(host, port)
            link = _Link(from_client, to_client, *await opened)
        except OSError:  # the server is away: so are we
            to_client.transport.abort()
            return
        self._links.add(link)
        pumps = [asyncio.ensure_future(pump) for pump in self._pumps(link)]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            ended = await asyncio.gather(*pumps, return_exceptions=True)
            self._links.discard(link)
            lost = any(isinstance(e, _CutError) for e in ended)
            link.to_client.transport.abort() if lost else link.to_client.close()
            link.to_server.close()  # what was passed on before arrives
        for error in ended:
            if error is not None and not isinstance(error, (OSError, EOFError, _CutError, asyncio.CancelledError)):
                self._loop.call_exception_handler({"message": "the proxy is broken", "exception": error})

    def _pumps(self, link: _Link) -> tuple[Coroutine[Any, Any, None], Coroutine[Any, Any, None]]:
        """What carries requests, and what carries replies. The end of one is the end of the connection."""
        raise NotImplementedError

    async def _pass(self, to: asyncio.StreamWriter, data: bytes) -> None:
        if self._delay:
            await asyncio.sleep(self._delay)
        await self._flowing.wait()
        to.write(data)
        await to.drain()

    def _request(self, name: str) -> None:
        self.seen[name] += 1
        if any(rule.meets(name) for rule in self._lost_requests):
            raise _CutError

    def _reply(self, name: str) -> None:
        if any(rule.meets(name) for rule in self._lost_replies):
            raise _CutError

    def _cut(self) -> None:
        for link in self._links:
            link.to_client.transport.abort()
            link.to_server.transport.abort()

    async def _close(self) -> None:
        self._server.close()
        self._flowing.set()
        self._cut()
        others = asyncio.all_tasks() - {asyncio.current_task()}  # type: ignore[arg-type]
        await asyncio.wait_for(asyncio.gather(*others, return_exceptions=True), 30)

    def _now(self, act: Callable[[], None]) -> None:
        """Have something done by the loop's thread, and wait until it is."""

        async def work() -> None:
            act()

        self._do(work())

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)


class PostgresProxy(Proxy):
    """Before Postgres.

    Args:
        url: of the server, as SQLAlchemy writes it; a Unix socket is the directory in ``host``.
    """

    def __init__(self, url: str) -> None:
        at = make_url(url)
        host = str(at.query.get("host") or at.host or "localhost")
        port = int(str(at.query.get("port") or at.port or 5432))
        super().__init__(f"{host}/.s.PGSQL.{port}" if host.startswith("/") else None, host, port)
        here = at.difference_update_query(["host", "port"]).set(host="127.0.0.1", port=self.port)
        plain = here.update_query_dict({"sslmode": "disable", "gssencmode": "disable"})
        self.url = plain.render_as_string(hide_password=False)

    def _pumps(self, link: _Link) -> tuple[Coroutine[Any, Any, None], Coroutine[Any, Any, None]]:
        return self._requests(link), self._replies(link)

    async def _requests(self, link: _Link) -> None:
        size = await link.from_client.readexactly(4)  # the first message has no letter
        await self._pass(link.to_server, size + await link.from_client.readexactly(int.from_bytes(size) - 4))
        while True:
            head, body = await self._message(link.from_client)
            if head[:1] == b"Q":
                self._request(body.split(None, 1)[0].rstrip(b";\0").decode().upper())
            await self._pass(link.to_server, head + body)

    async def _replies(self, link: _Link) -> None:
        changed = False
        while True:
            head, body = await self._message(link.from_server)
            if head[:1] == b"C":  # CommandComplete, with a tag as "UPDATE 3" or "INSERT 0 3"
                verb, *counts = body.rstrip(b"\0").decode().split()
                changed |= verb in ("INSERT", "UPDATE", "DELETE") and counts[-1] != "0"
                if changed and verb == "COMMIT":
                    self._reply(verb)
            elif head[:1] == b"Z" and body == b"I":  # ReadyForQuery, outside of a transaction
                changed = False
            await self._pass(link.to_client, head + body)

    async def _message(self, reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
        head = await reader.readexactly(5)
        return head, await reader.readexactly(int.from_bytes(head[1:]) - 4)


_ENTRY = b"\r\n$5\r\nevent\r\n"


class _Asked(NamedTuple):
    """A command whose reply is still to come. `answer`: ours, the server was not asked. `hidden`: not the client's."""

    name: str
    answer: bytes | None = None
    hidden: bool = False


class RedisProxy(Proxy):
    """Before Redis or Valkey.

    Args:
        url: of the server, for `redis.Redis.from_url`.
    """

    def __init__(self, url: str) -> None:
        self._answers: list[tuple[Rule, str]] = []
        at = urlsplit(url)
        query = dict(parse_qsl(at.query))
        database = query.pop("db", at.path.strip("/") if at.scheme != "unix" else "") or "0"
        unix_path = unquote(at.path) if at.scheme == "unix" else None
        super().__init__(unix_path, at.hostname or "localhost", at.port or 6379)
        user = f"{at.netloc.rpartition('@')[0]}@" if "@" in at.netloc else ""
        self.url = f"redis://{user}127.0.0.1:{self.port}?{urlencode({**query, 'db': database})}"

    def answer(self, error: str, *names: str, **which: Any) -> Rule:
        """Answer such commands with this error, in the server's place; see `Rule`."""
        self._answers.append((rule := Rule(names, **which), error))
        return rule

    def heal(self) -> None:
        self._answers.clear()
        super().heal()

    def _pumps(self, link: _Link) -> tuple[Coroutine[Any, Any, None], Coroutine[Any, Any, None]]:
        asked: deque[_Asked] = deque()
        some = asyncio.Event()
        return self._requests(link, asked, some), self._replies(link, asked, some)

    async def _requests(self, link: _Link, asked: deque[_Asked], some: asyncio.Event) -> None:
        aborted = False  # a command of this MULTI was answered with an error: EXEC may not run the others
        inside = False
        while True:
            raw, name = await self._command(link.from_client)
            self._request(name)
            error = next((error for rule, error in self._answers if rule.meets(name)), None)
            inside = name == "MULTI" or (inside and name not in ("EXEC", "DISCARD"))
            if name == "EXEC" and aborted:
                error = "EXECABORT Transaction discarded because of previous errors."
                asked.append(_Asked("DISCARD", hidden=True))
                await self._pass(link.to_server, b"*1\r\n$7\r\nDISCARD\r\n")
            aborted = inside and (aborted or error is not None)
            asked.append(_Asked(name, None if error is None else f"-{error}\r\n".encode()))
            some.set()
            if error is None:
                await self._pass(link.to_server, raw)

    async def _replies(self, link: _Link, asked: deque[_Asked], some: asyncio.Event) -> None:
        while True:
            while not asked:
                some.clear()
                await some.wait()
            one = asked.popleft()
            reply = one.answer or await self._frame(link.from_server)
            while reply[:1] == b">":  # a push message is nobody's reply
                await self._pass(link.to_client, reply)
                reply = await self._frame(link.from_server)
            if one.hidden:
                continue
            if one.answer is None and (one.name != "XREADGROUP" or _ENTRY in reply):
                self._reply(one.name)
            await self._pass(link.to_client, reply)

    async def _command(self, reader: asyncio.StreamReader) -> tuple[bytes, str]:
        raw = await self._frame(reader)
        return raw, raw.split(b"\r\n", 3)[2].decode().upper()

    async def _frame(self, reader: asyncio.StreamReader) -> bytes:
        """One value of the protocol, of version 2 or 3, as its bytes."""
        parts: list[bytes] = []
        left = 1
        while left:
            left -= 1
            line = await reader.readuntil(b"\r\n")
            parts.append(line)
            kind, size = line[:1], line[1:-2]
            if kind in b"$!=" and size != b"-1":
                parts.append(await reader.readexactly(int(size) + 2))
            elif kind in b"*~>" and size != b"-1":
                left += int(size)
            elif kind in b"%|":
                left += 2 * int(size) + (kind == b"|")  # an attribute stands before the value it belongs to
        return b"".join(parts)
