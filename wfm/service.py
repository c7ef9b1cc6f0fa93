"""The loop, the same for every role; the relay; signals; and the wiring of a role.

One thread reads Redis and puts messages into the inbox; task threads put their outcomes there; the main thread takes
from it, and does all work on Postgres in batches::

    read → decode or bury → one transaction → commit → acknowledge, delete and publish, in one round trip

When Postgres is away, the loop waits and repeats; nothing is acknowledged before its commit. When Redis is away, the
sweeps go on and the ledger keeps what is to be published.
"""

from __future__ import annotations

import logging
import os
import queue
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import msgspec

from wfm import backfill, events
from wfm.backends import open_backend
from wfm.bus import Bus, Entry, RedisError, connect
from wfm.charts import Chart, parse
from wfm.config import Settings
from wfm.decide import GUARDS, ApprovalLimits, Capacity, backoff
from wfm.errors import WfmError
from wfm.model import Role
from wfm.roles import ResultManager, RoleWork, Sweep, TriggerManager, Worker, WorkflowManager, streams_of
from wfm.store import Store, Tx, is_connection_error
from wfm.tasks import Outcome

log = logging.getLogger(__name__)

T = TypeVar("T")

GRACE_SECONDS = 8.0
"""How long a role waits for its tasks after SIGTERM before it hands them back."""


# --- the loop ---


class _Messages(msgspec.Struct):
    entries: list[Entry]


class _Wake(msgspec.Struct):
    pass


class _StopError(Exception):
    """The role was told to stop while it waited for a server."""


class Service:
    """One role at work."""

    def __init__(
        self, settings: Settings, store: Store, bus: Bus, work: RoleWork, inbox: queue.SimpleQueue[Any]
    ) -> None:
        self.settings = settings
        self.store = store
        self.bus = bus
        self.work = work
        self.inbox = inbox
        self.stopping = threading.Event()
        self.abandoned = False
        """Whether tasks were handed back whose threads may never return."""
        self._consumed = threading.Event()
        self._life = ""
        self._kinds = [name for name, t in events.TYPES.items() if t.durable]
        self._sweeps = [
            *work.sweeps,
            Sweep("relay", settings.sweep_seconds, self._relay_turn),
        ]
        self._reader = threading.Thread(target=self._read, name="read-streams", daemon=True)

    def run(self) -> None:
        """Work until told to stop; then finish or hand back what is in hand."""
        log.info("%s %s is at work", self.work.role, self.bus.consumer)
        try:
            self._transact(lambda tx: None)  # who cannot reach Postgres takes no messages from others
            self._reader.start()
            while not self.stopping.is_set():
                self.turn(self._patience())
        except _StopError:
            pass
        finally:
            self._finish()

    def stop(self) -> None:
        """Ask the loop to end; safe in a signal handler."""
        self.stopping.set()
        self._consumed.set()
        self.inbox.put(_Wake())

    def _patience(self) -> float:
        return max(0.0, min(s.next_at for s in self._sweeps) - time.monotonic())

    def turn(self, wait_seconds: float) -> None:
        """Take what lies in the inbox, act on it, and look at what is due."""
        outcomes: list[Outcome] = []
        entries: list[Entry] = []
        wait: float | None = wait_seconds
        while len(outcomes) < self.settings.batch_size:
            try:
                item = self.inbox.get(timeout=wait) if wait else self.inbox.get_nowait()
            except queue.Empty:
                break
            wait = None
            if isinstance(item, Outcome):
                outcomes.append(item)
            elif isinstance(item, _Messages):
                entries.extend(item.entries)
        if outcomes:
            self._settle(outcomes)
        if entries:
            self._deal(entries)
        for sweep in self._sweeps:
            if sweep.next_at <= time.monotonic():
                sweep.next_at = time.monotonic() + sweep.seconds * random.uniform(0.9, 1.1)  # noqa: S311
                try:
                    self._commit(sweep.work)
                except (_StopError, KeyboardInterrupt):
                    raise
                except Exception:
                    log.exception("sweep %r failed; it comes again", sweep.name)

    # --- messages ---

    def _deal(self, entries: Sequence[Entry]) -> None:
        """Consume a batch; what cannot even be buried stays in the group, to be claimed again."""
        try:
            self._consume(entries)
        except _StopError:
            raise
        except Exception:
            log.exception("%d messages could not be dealt with; they come again", len(entries))
        finally:
            self._consumed.set()

    def _consume(self, entries: Sequence[Entry]) -> None:
        fresh: list[tuple[Entry, events.Event]] = []
        again: list[tuple[Entry, events.Event]] = []
        for entry in entries:
            if not entry.body:
                # Deleted while pending: if it still matters, the ledger publishes it again.
                self._send([], [entry])
                continue
            try:
                event = events.decode(entry.type, entry.body)
            except (msgspec.DecodeError, UnicodeDecodeError, KeyError) as e:
                self._bury(entry, f"cannot be decoded: {e}")
            else:
                (again if entry.deliveries > 1 else fresh).append((entry, event))
        if fresh:
            self._handle(fresh)
        for one in again:
            self._handle_again(*one)

    def _handle_again(self, entry: Entry, event: events.Event) -> None:
        """One that somebody took and did not finish: it may be what ended him.

        So it is handled alone, and counted before: its neighbours are not blamed for it, and no copy of it starts anew.
        """
        tries = entry.deliveries - 1
        if event.id is not None:
            tries = self._count_failure(event.id)
            if not tries:  # it is done meanwhile
                self._send([], [entry])
                return
        if tries >= self.settings.max_deliveries:
            self._bury(entry, f"handed out {tries} times without success", event.id)
        else:
            self._handle([(entry, event)])

    def _handle(self, batch: Sequence[tuple[Entry, events.Event]]) -> None:
        def work(tx: Tx) -> Callable[[], None] | None:
            after = self.work.handle(tx, [event for _, event in batch])
            tx.mark_done([event.id for _, event in batch if event.id is not None])
            return after

        try:
            self._commit(work, done=[entry for entry, _ in batch])
        except _StopError:
            raise
        except Exception as e:
            if len(batch) > 1:
                log.warning("a batch of %d messages failed (%s); one by one now", len(batch), e)
                for one in batch:
                    self._handle([one])
            else:
                self._failed(*batch[0], e)

    def _failed(self, entry: Entry, event: events.Event, error: Exception) -> None:
        """A message whose handling breaks comes again after a back-off, and is buried when that does not help."""
        log.exception("message %s on %s failed", entry.id, entry.stream, exc_info=error)
        if event.id is None:
            self._bury(entry, f"{type(error).__name__}: {error}")
            return
        most = self.settings.max_deliveries
        if self._count_failure(event.id) >= most:
            self._bury(entry, f"failed {most} times; the last time {type(error).__name__}: {error}", event.id)
        else:
            self._send([], [entry])

    def _count_failure(self, event_id: int) -> int:
        """How often handling an event failed, now included; 0 if it is done. The ledger publishes it again later."""

        def work(tx: Tx) -> int:
            row = tx.all("SELECT failures FROM event WHERE id = :id", id=event_id)
            wait = backoff(row[0].failures + 1 if row else 1, 5.0, 600.0)
            return tx.count_failure(event_id, wait)

        return self._transact(work)[0]

    def _bury(self, entry: Entry, reason: str, event_id: int | None = None) -> None:
        log.error("message %s on %s goes to the dead letters: %s", entry.id, entry.stream, reason)
        reason = reason.replace("\0", "\\0")  # a text that quotes the message; Postgres has no zero in texts

        def work(tx: Tx) -> None:
            location = self.settings.processing_location_id
            tx.bury(location, entry.stream, entry.id, entry.body, reason, event_id)
            if event_id is not None:
                tx.mark_done([event_id])

        self._commit(work, done=[entry])

    # --- outcomes ---

    def _settle(self, outcomes: Sequence[Outcome]) -> None:
        try:
            self._commit(lambda tx: self.work.settle(tx, outcomes))
        except _StopError:
            raise
        except Exception as e:
            if len(outcomes) > 1:
                log.warning("%d outcomes could not be written together (%s); one by one now", len(outcomes), e)
                for outcome in outcomes:
                    self._settle([outcome])
                return
            log.exception("the outcome of task %s could not be written", outcomes[0].task.id)
            if outcomes[0].error is None:
                self._settle([Outcome(outcomes[0].task, error=e)])

    # --- Postgres ---

    def _commit(self, work: Callable[[Tx], Callable[[], None] | None], done: Sequence[Entry] = ()) -> None:
        """Do `work` in one transaction; after the commit publish, acknowledge, and call what it returned."""
        after, outbox = self._transact(work)
        if after is not None:
            after()
        self._send(outbox, done)

    def _transact(self, work: Callable[[Tx], T]) -> tuple[T, list[events.Message]]:
        """As `Store.retrying`, and for as long as Postgres is away.

        Repeating is safe: every write is guarded by the state it found, so a commit whose reply was lost is met again
        as already done.
        """
        tries = 0
        while True:
            try:
                return self.store.retrying(work)
            except Exception as e:
                if not is_connection_error(e):
                    raise
                tries += 1
                wait = backoff(tries, 0.1, 5.0) * random.uniform(0.5, 1.5)  # noqa: S311
                if tries in (1, 10):
                    log.warning("Postgres is away (%s); trying again", str(e).splitlines()[0])
                if self.stopping.wait(wait) and tries > 3:
                    raise _StopError from e

    # --- Redis ---

    def _send(self, outbox: Sequence[events.Message], done: Sequence[Entry]) -> None:
        """Publish and acknowledge, at best: what fails here, or finds its stream full, stays pending in the ledger or
        in the group."""
        hints = {m.type: m for m in outbox if m.id is None}
        messages = [m for m in outbox if m.id is not None] + list(hints.values())
        try:
            self.bus.send(messages, done)
        except RedisError as e:
            log.warning("Redis did not take %d messages and %d acknowledgements: %s", len(messages), len(done), e)
            self.bus.mend(e)

    def _relay_turn(self, tx: Tx) -> None:
        """Publish again what is pending for too long, or at once when Redis was emptied."""
        location = self.settings.processing_location_id
        try:
            life, born = self.bus.life()
            backlog = self.bus.backlog(self._kinds)
        except RedisError as e:
            self.bus.mend(e)
            return
        if born and self._life != life:
            n = tx.republish_all(location)
            log.warning("Redis is empty; publishing %d pending events again", n)
        self._life = life
        page = self.settings.batch_size * 5
        tx.due_events(location, {k: min(page, self.settings.stream_high_water - n) for k, n in backlog.items()})

    def _read(self) -> None:
        """Bring messages to the inbox, one batch at a time, so that none ages here unread."""
        failures = 0
        next_claim = 0.0
        next_janitor = time.monotonic() + 60.0
        fresh = True
        while not self.stopping.is_set():
            try:
                if fresh:
                    self.bus.join()
                    entries = self.bus.read_own_pending(self.settings.batch_size)
                    fresh = bool(entries)
                elif time.monotonic() >= next_claim:
                    next_claim = time.monotonic() + self.settings.claim_idle_seconds * random.uniform(0.4, 0.6)  # noqa: S311
                    entries = self.bus.claim_idle(self.settings.claim_idle_seconds, self.settings.batch_size)
                else:
                    entries = self.bus.read(self.settings.batch_size, self.settings.block_seconds)
                if time.monotonic() >= next_janitor:
                    next_janitor = time.monotonic() + 60.0
                    self.bus.forget_consumers()
                failures = 0
            except RedisError as e:
                failures += 1
                fresh = True  # the reply that was lost may have assigned entries to us
                if failures in (1, 10):
                    log.warning("Redis is away (%s); trying again", e)
                self.bus.mend(e)
                self.stopping.wait(backoff(failures, 0.1, 5.0) * random.uniform(0.5, 1.5))  # noqa: S311
                continue
            if entries:
                self._consumed.clear()
                self.inbox.put(_Messages(entries))
                while not self._consumed.wait(1.0) and not self.stopping.is_set():
                    pass

    # --- the end ---

    def _finish(self) -> None:
        log.info("%s stops", self.work.role)
        self.work.stop()
        deadline = time.monotonic() + GRACE_SECONDS
        try:
            # The reader's last read may still bring messages; unread here, they would wait for somebody to claim them.
            while time.monotonic() < deadline and (self.work.busy or self._reader.is_alive() or not self.inbox.empty()):
                try:
                    item = self.inbox.get(timeout=0.1)
                except queue.Empty:
                    continue
                if isinstance(item, Outcome):
                    self._settle([item])
                elif isinstance(item, _Messages):
                    self._deal(item.entries)
            if self.work.busy:
                self.abandoned = True
                self._transact(self.work.hand_back)
            self.bus.leave()
        except (_StopError, RedisError, WfmError) as e:
            log.warning("left something to others: %s", e)
        self.work.close()
        self.store.close()


# --- wiring ---


def load_charts(directory: Path | None = None) -> dict[int, Chart]:
    """The versions of the run chart that this installation knows, by number.

    They ship in the wheel; a checkout has them at its top.
    """
    if directory is None:
        inside = Path(__file__).with_name("statecharts")
        directory = inside if inside.is_dir() else Path(__file__).parent.parent / "statecharts"
    charts = [
        parse(path.read_text(encoding="utf-8"), source=str(path), guards=GUARDS, events=events.TYPES)
        for path in sorted(directory.glob("run*.yaml"))
    ]
    return {c.version: c for c in charts}


def open_store(settings: Settings) -> Store:
    """The configured database."""
    return Store(
        settings.database_url,
        settings.database_schema,
        load_charts(),
        republish_seconds=settings.republish_seconds,
        outbox_most=settings.stream_high_water,
        approval=ApprovalLimits(settings.approval_units, settings.approval_core_hours),
    )


def open_bus(settings: Settings, role: Role | None = None, chart: Chart | None = None) -> Bus:
    """The configured Redis, as a consumer of the role's streams, or only to write."""
    url, options = settings.redis_address()
    client = connect(url, options, timeout=settings.block_seconds + 8.0)
    streams = streams_of(role, chart) if role and chart else ()
    return Bus(
        client,
        settings.processing_location_id,
        role or "",
        streams,
        public_length=settings.public_stream_max_length,
        high_water=settings.stream_high_water,
    )


def capacity(settings: Settings) -> Capacity:
    """What the location holds at once. Cores and memory are counted where wfm itself is the scheduler."""
    if settings.hpc_backend != "local":
        return Capacity(settings.max_in_flight)
    cpu = settings.local_cpu or float(len(os.sched_getaffinity(0)))
    memory = settings.local_memory_gb or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return Capacity(settings.max_in_flight, cpu, memory)


def build(settings: Settings, role: Role, *, name: str = "worker", slots: int = 4) -> Service:
    """A role, wired to the configured database, Redis and backend."""
    store = open_store(settings)
    chart = store.charts[max(store.charts)]
    bus = open_bus(settings, role, chart)
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    work: RoleWork
    match role:
        case Role.TRIGGER_MANAGER:
            work = TriggerManager(settings)
            feed = backfill.feeder(settings.processing_location_id)
            work.sweeps.append(Sweep("backfills", settings.sweep_seconds, feed))
        case Role.WORKFLOW_MANAGER:
            work = WorkflowManager(settings, capacity(settings))
        case Role.WORKER:
            work = Worker(settings, store, open_backend(settings), inbox, name, slots)
        case Role.RESULT_MANAGER:
            work = ResultManager(settings, store, open_backend(settings), inbox)
    return Service(settings, store, bus, work, inbox)


def serve(settings: Settings, role: Role, *, name: str = "worker", slots: int = 4) -> None:
    """Run a role in the foreground. SIGTERM and SIGINT end it in good order, a second one at once."""
    service = build(settings, role, name=name, slots=slots)

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        if service.stopping.is_set():
            os._exit(1)
        service.stop()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    service.run()
    if service.abandoned:
        logging.shutdown()
        os._exit(0)  # Python would wait for the threads of tasks, and a file system may hold one for ever
