"""What must hold after any fault, once everything is healed and quiet.

The one home of these rules. They are judged from the outside as far as possible: what happened comes from the ledger
that jobs and wrappers wrote (`tests.faults.ledger`), what was asked from the clients' own notes
(`tests.faults.history`); wfm's tables are what is being judged.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from tests.faults.ledger import Line
from wfm import grouping
from wfm.model import FINAL_STATES, Role, RunState, Why
from wfm.roles import streams_of
from wfm.service import open_bus
from wfm.store import Tx
from wfm.views import verify
from wfm.views.quarantine import PACKAGES_LEFT_OUT

if TYPE_CHECKING:
    from tests.harness import World

EFFECTS = frozenset({"stage", "submit", "collect", "cancel", "purge"})
"""Kinds of tasks whose effects are recorded."""

PASSING = frozenset({Why.COVERED, Why.RUN, Why.NEWER_INPUT, Why.ARRIVALS, Why.COOLDOWN, Why.BISECTING})
"""Reasons of coverage with which no unit without a result can rest: they pass by themselves."""


class Report(Struct, frozen=True):
    """What the checker looked at, and what was wrong.

    Attributes:
        violations: one line each: the rule, the run or thing, and the evidence.
        (others): how many were looked at. A check that looked at nothing has shown nothing.
    """

    runs: int
    completed: int
    transitions: int
    packages: int
    calls: int
    unknown: int
    jobs: int
    effects: int
    repeated: int
    products: int
    consumers: int
    violations: list[str]


def check(world: World, *, repeats: Collection[str] = (), dead_letters: int = 0, seconds: float = 60.0) -> Report:
    """Wait until nothing moves any more, then look at everything.

    Args:
        repeats: the kinds of effects that may have been repeated after success, because a fault kept their outcome
            from being written: any of `EFFECTS`. A job may never compute twice.
        dead_letters: how many messages the test made that nobody can read.
        seconds: how long to wait for quiet.

    Raises:
        AssertionError: with all violations.
    """
    deadline = time.monotonic() + seconds
    while (stirring := restless(world)) and time.monotonic() < deadline:
        time.sleep(0.1)
    report = examine(world, repeats=repeats, dead_letters=dead_letters, stirring=stirring)
    assert not report.violations, "\n".join(["the checker found:", *report.violations])
    return report


def examine(
    world: World,
    *,
    repeats: Collection[str] = (),
    dead_letters: int = 0,
    stirring: list[str] | None = None,
) -> Report:
    """Look at everything once; see `check`. `stirring`: what `restless` gave, if that was asked already."""
    violations = restless(world) if stirring is None else list(stirring)
    with world.store.begin() as tx:
        seen = _See(tx, world)
        replayed = verify(tx.conn, tx.charts)
        violations += [f"history: {fault}" for fault in replayed.faults]
        violations += _events(seen)
        violations += _effects(seen, frozenset(repeats))
        violations += _results(seen)
        violations += _products(seen)
        violations += _requests(seen)
        dead = tx.all("SELECT id, stream, reason FROM dead_letter WHERE state = 'open' ORDER BY id")
    if len(dead) != dead_letters:
        texts = "; ".join(f"{d.id} on {d.stream}: {d.reason}" for d in dead)
        violations.append(f"dead letters: {len(dead)} instead of {dead_letters}: {texts}")
    consumers, faults = _redis(world)
    violations += faults
    begun = Counter((x.effect, x.phase) for x in seen.lines)
    return Report(
        runs=len(seen.runs),
        completed=len(seen.completed),
        transitions=replayed.transitions,
        packages=len(seen.content),
        calls=len(world.history.calls),
        unknown=sum(c.outcome == "unknown" for c in world.history.calls),
        jobs=sum(x.kind == "job" and x.phase == "begin" for x in seen.lines),
        effects=sum(x.kind in EFFECTS and x.phase == "begin" for x in seen.lines),
        repeated=sum(n > 1 for (effect, phase), n in begun.items() if phase == "end"),
        products=sum(len(p) for p in seen.products.values()),
        consumers=consumers,
        violations=violations,
    )


# --- nothing moves any more ---


def restless(world: World) -> list[str]:
    """What still moves, or should: work that is open, held, or under way."""
    found = []
    with world.store.begin() as tx:
        for r in tx.all("SELECT id, state, attempt, waiting_for FROM run WHERE finished_at IS NULL ORDER BY id"):
            stuck = r.state == "PENDING" and r.waiting_for and not r.waiting_for.startswith(("free ", "a free "))
            if not stuck:
                found.append(f"run {r.id}: neither ended nor stuck: {r.state}, attempt {r.attempt}, {r.waiting_for!r}")
        found += [
            f"event {e.id}: {e.type} of run {e.run_id} is pending for {e.recipient}"
            for e in tx.all("SELECT id, type, recipient, run_id FROM event WHERE done_at IS NULL ORDER BY id")
        ]
        for t in tx.all(
            "SELECT id, kind, run_id, attempt, state, owner, epoch FROM task"
            " WHERE state = 'leased' OR state = 'ready' AND run_id IS NOT NULL ORDER BY id"
        ):
            held = f"the lease is held by {t.owner}, epoch {t.epoch}" if t.state == "leased" else "it is still open"
            found.append(f"task {t.id}: {t.kind} of run {t.run_id}, attempt {t.attempt}: {held}")
        found += [
            f"postgres: session {s.pid} left a transaction open after {s.query!r}"
            for s in tx.all(
                "SELECT pid, query FROM pg_stat_activity a WHERE datname = current_database()"
                " AND pid <> pg_backend_pid() AND state LIKE 'idle in transaction%'"
                # On our tables: who freezes while it connects holds locks of the catalogue, which hinder nobody.
                " AND EXISTS (SELECT 1 FROM pg_locks l WHERE l.pid = a.pid"
                " AND (l.relation >= 16384 OR l.locktype = 'transactionid'))"
            )
        ]
    bus = open_bus(world.settings)
    for key in sorted(bus.client.scan_iter(bus.prefix + "*")):
        if bus.client.type(key) == b"stream" and not key.endswith(b":events"):
            entries = bus.client.xrange(key)
            found.extend(f"stream {key.decode()}: {i.decode()} is left over: {body!r}" for i, body in entries)
            for group in bus.client.xinfo_groups(key):
                if group["pending"]:
                    name = group["name"].decode()
                    found.append(f"stream {key.decode()}: {group['pending']} pending in group {name}")
    bus.client.close()
    return found


# --- what happened ---


class _See:
    """One look at the tables, in one transaction, and at the ledger."""

    def __init__(self, tx: Tx, world: World) -> None:
        self.tx = tx
        self.history = world.history
        self.runs = {
            r.id: r
            for r in tx.all(
                "SELECT r.*, s.name AS step, u.key AS unit FROM run r JOIN reduction_step s ON s.id = r.step_id"
                " JOIN unit u ON u.id = r.unit_id ORDER BY r.id"
            )
        }
        self.completed = {i: r for i, r in self.runs.items() if r.state == RunState.COMPLETED}
        self.aside = {
            (a.step_id, a.unit_id): set(a.packages)
            for a in tx.all(
                "SELECT step_id, unit_id, array_agg(k.name) AS packages"
                f" FROM ({PACKAGES_LEFT_OUT}) x JOIN raw_data_package k ON k.id = x.package_id GROUP BY 1, 2"
            )
        }
        """By step and unit, the packages that are in quarantine."""
        self.products: dict[int, list[Any]] = defaultdict(list)
        for p in tx.all(
            "SELECT d.*, c.status, c.path AS place FROM data_product d"
            " LEFT JOIN physical_copy c ON c.product_id = d.id ORDER BY d.id"
        ):
            self.products[p.run_id].append(p)
        self.content: dict[str, dict[str, str]] = defaultdict(dict)
        """By package, the checksums of its files, as the catalogue has them."""
        for f in tx.all(
            "SELECT p.name AS package, f.name, f.checksum FROM raw_data_package p"
            " LEFT JOIN raw_data_file f ON f.package_id = p.id"
        ):
            if f.name is not None:
                self.content[f.package][f.name] = f.checksum
        self.lines = world.ledger.lines()
        self.job_ends = {(x.run, x.attempt): x for x in self.lines if x.kind == "job" and x.phase == "end"}

    def name(self, run: Any) -> str:
        return f"run {run.id} ({run.step} {run.unit}, attempt {run.attempt})"

    def read_by(self, run_id: int, seen: frozenset[int] = frozenset()) -> dict[str, str]:
        """The raw files that a run's result rests on, by ``package/file``, as the jobs themselves wrote down."""
        run = self.runs.get(run_id)
        end = self.job_ends.get((run_id, run.attempt)) if run else None
        if end is None or run_id in seen:
            return {}
        found = dict(end.more["files"])
        for upstream in end.more["upstream"]:
            found |= self.read_by(upstream, seen | {run_id})
        return found


def _events(seen: _See) -> Iterator[str]:
    """Every change told everybody whom the chart names."""
    told = {
        (e.run_id, e.run_version, e.type, e.recipient)
        for e in seen.tx.all("SELECT run_id, run_version, type, recipient FROM event WHERE run_id IS NOT NULL")
    }
    for t in seen.tx.all("SELECT run_id, version, dest, chart_version FROM transition ORDER BY run_id, version"):
        for emit in seen.tx.charts[t.chart_version].states[t.dest].emits:
            if (t.run_id, t.version, emit.event, emit.to or "") not in told:
                yield f"run {t.run_id}: version {t.version} entered {t.dest}, but {emit.event} was never written"


def _effects(seen: _See, repeats: Collection[str]) -> Iterator[str]:
    """Jobs compute once. Other effects happen once, or are repeated where that was declared; one of them counts."""
    by_effect: dict[str, list[Line]] = defaultdict(list)
    for line in seen.lines:
        by_effect[line.effect].append(line)
    for effect, lines in by_effect.items():
        phases = Counter(x.phase for x in lines)
        kind, run = lines[0].kind, seen.runs.get(lines[0].run)
        evidence = ", ".join(f"{x.phase} by {x.pid}" + (f" epoch {x.epoch}" if x.epoch else "") for x in lines)
        if run is None:
            yield f"run {lines[0].run}: does not exist, but {effect} happened: {evidence}"
        elif kind == "job":
            if phases["begin"] > 1:
                yield f"{seen.name(run)}: {effect} computed {phases['begin']} times: {evidence}"
        else:
            epochs = Counter(x.epoch for x in lines if x.phase == "begin")
            for epoch, n in epochs.items():
                if n > 1:
                    yield f"{seen.name(run)}: {effect} was done {n} times under the one epoch {epoch}: {evidence}"
            if kind not in repeats and phases["begin"] - phases["failed"] > 1:
                yield f"{seen.name(run)}: {effect} was repeated, which nothing here explains: {evidence}"
    ended = {(x.effect, x.epoch) for x in seen.lines if x.phase == "end"}
    for t in seen.tx.all("SELECT * FROM task WHERE state = 'done' AND run_id IS NOT NULL ORDER BY id"):
        effect = f"{t.kind} {t.run_id}.{t.attempt}"
        if (effect, t.epoch) not in ended:
            did = ", ".join(f"{x.phase} epoch {x.epoch}" for x in by_effect[effect]) or "nothing"
            yield f"run {t.run_id}: {effect} is done by epoch {t.epoch}, which never ended it: {did}"
    for run in seen.completed.values():
        for kind in ("stage", "submit", "job", "collect"):
            effect = f"{kind} {run.id}.{run.attempt}"
            if not any(x.phase == "end" for x in by_effect[effect]):
                yield f"{seen.name(run)}: COMPLETED, but {effect} never ended"
    moves = Counter(
        (t.run_id, t.attempt, t.trigger)
        for t in seen.tx.all("SELECT run_id, attempt, trigger FROM transition WHERE trigger IN ('submit', 'collect')")
    )
    for (run_id, attempt, trigger), n in moves.items():
        if n > 1:
            yield f"run {run_id}: {trigger} {run_id}.{attempt} was accepted {n} times"


def _results(seen: _See) -> Iterator[str]:
    """Every package of the catalogue is in the result of its unit at every step, or the unit says why not."""
    coverage = {(c.step_id, c.key): c for c in _coverage(seen.tx)}
    names = dict(tuple(r) for r in seen.tx.all("SELECT id, name FROM raw_data_package"))
    for s in seen.tx.all(
        "SELECT s.id, s.name, s.group_by, g.rules FROM reduction_step s JOIN pipeline p ON p.id = s.pipeline_id"
        " JOIN data_grouping g ON g.id = p.grouping_id WHERE s.active AND p.deleted_at IS NULL AND p.location_id = 1"
        " ORDER BY s.id"
    ):
        wanted: dict[str, dict[str, str]] = defaultdict(dict)
        dims = sorted(s.group_by)
        for row in seen.tx.conn.execute(grouping.select_packages(grouping.rules_from(s.rules), dims)):
            package = names[row[0]]
            unit = grouping.unit_key(dict(zip(dims, row[2:], strict=True)))
            wanted[unit] |= {f"{package}/{file}": sum_ for file, sum_ in seen.content[package].items()}
        for unit, files in sorted(wanted.items()):
            c = coverage.get((s.id, unit))
            if c is None:
                yield f"unit {s.name} {unit}: nobody looked at it; it holds {_some(files)}"
            elif c.state == "covered":
                read = seen.read_by(c.run_id)
                aside = seen.aside.get((s.id, c.unit_id), ())
                due = {f: x for f, x in files.items() if f.rpartition("/")[0] not in aside}
                if read != due:
                    lost = {f: x for f, x in due.items() if read.get(f) != x}
                    more = {f: x for f, x in read.items() if due.get(f) != x}
                    yield (
                        f"run {c.run_id}: covers {s.name} {unit}, but its jobs did not read {_some(lost)}"
                        + (f", and read {_some(more)} instead" if more else "")
                    )
            elif c.state == "active" and c.active is not None:
                pass  # the run is judged as such
            elif c.why in PASSING or not c.reason:
                yield f"unit {s.name} {unit}: no result, no run, no lasting reason: {c.state}, {c.why}, {c.reason!r}"


def _coverage(tx: Tx) -> Any:
    return tx.all(
        "SELECT c.*, u.key, a.id AS active FROM coverage c JOIN unit u ON u.id = c.unit_id LEFT JOIN run a"
        " ON (a.step_id, a.unit_id) = (c.step_id, c.unit_id) AND a.finished_at IS NULL"
    )


def _some(files: Mapping[str, str]) -> str:
    shown = [f"{name} ({checksum[:15]})" for name, checksum in sorted(files.items())]
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "") or "nothing"


def _products(seen: _See) -> Iterator[str]:
    """Products of COMPLETED runs, and of no others, stand on disk as registered and as the job wrote them."""
    for run in seen.runs.values():
        found = seen.products.get(run.id, [])
        name = seen.name(run)
        if run.state not in FINAL_STATES:
            continue
        if run.state != RunState.COMPLETED:
            if found:
                yield f"{name}: {run.state}, but has {len(found)} products"
            if not run.message:
                yield f"{name}: {run.state} without a reason"
            continue
        if run.probe_of is not None:
            if found:
                yield f"{name}: only a probe of run {run.probe_of}, but has {len(found)} products"
            continue
        for p in found:
            path = Path(run.job["directory"], p.path)
            if p.attempt != run.attempt:
                yield f"{name}: product {p.path} is of attempt {p.attempt}"
            if p.place != str(path):
                yield f"{name}: product {p.path} is said to lie at {p.place}"
            if p.status == "deleted":
                continue
            try:
                content = path.read_bytes()
            except OSError as e:
                yield f"{name}: product {p.path} is not on disk: {e.strerror}"
                continue
            checksum = "sha256:" + hashlib.sha256(content).hexdigest()
            if (len(content), checksum) != (p.size, p.checksum):
                yield f"{name}: product {p.path} is {checksum[:15]} on disk, but {p.checksum[:15]} in the tables"
        end = seen.job_ends.get((run.id, run.attempt))
        registered = {p.path: p.checksum for p in found}
        for path, checksum in (end.more["outputs"] if end else {}).items():
            if registered.get(path) != checksum:
                yield f"{name}: its job wrote {path} ({checksum[:15]}), registered is {registered.get(path, 'nothing')}"
    results = (r for r in seen.completed.values() if r.probe_of is None)
    order = sorted(results, key=lambda r: (r.step_id, r.unit_id, r.id))
    covering = seen.tx.all("SELECT run_id FROM coverage WHERE state = 'covered'")
    rests_on = {c.run_id for c in covering}  # an older run, where something went back to what it was
    for _, group in groupby(order, key=lambda r: (r.step_id, r.unit_id)):
        *old, newest = sorted(group, key=lambda r: (r.id in rests_on, r.id))
        for run in old:
            if any(p.superseded_by is None for p in seen.products.get(run.id, ())):
                yield f"{seen.name(run)}: not superseded, though run {newest.id} is newer"
        if any(p.superseded_by is not None for p in seen.products.get(newest.id, ())):
            yield f"{seen.name(newest)}: the newest result of its unit, but superseded"


# --- what was asked ---


def _requests(seen: _See) -> Iterator[str]:
    """What was promised happened, what was refused did not; where nobody knows, both are fine."""
    last: dict[str | int, list[Any]] = defaultdict(list)
    for call in seen.history.of("register"):
        if call.outcome == "ok":  # it overwrote what was accepted before; what is unknown may still have come later
            last[call.target] = [c for c in last[call.target] if c.outcome == "unknown"]
        last[call.target].append(call)
    for package, calls in last.items():
        stored = seen.content.get(str(package))
        possible = [c.content for c in calls if c.outcome != "failed"]
        promised = any(c.outcome == "ok" for c in calls)
        if stored is None and promised:
            yield f"package {package}: its registration was accepted, but the catalogue does not have it"
        elif stored is not None and stored not in possible:
            yield f"package {package}: the catalogue has {_some(stored)}, which nobody was promised or left unsure of"
    counted = Counter(
        (t.trigger, t.run_id)
        for t in seen.tx.all("SELECT trigger, run_id FROM transition WHERE trigger IN ('cancel', 'retry')")
    )
    asked: dict[tuple[str, Any], Counter[str]] = defaultdict(Counter)
    for operation in ("cancel", "retry"):
        for call in seen.history.of(operation):
            asked[operation, call.target][call.outcome] += 1
    for operation, run in sorted({*asked, *counted}):
        n, done = asked[operation, run], counted[operation, run]
        if not n["ok"] <= done <= n["ok"] + n["unknown"]:
            yield f"run {run}: {operation} was asked with {dict(n)}, but happened {done} times"


# --- Redis ---


def _redis(world: World) -> tuple[int, list[str]]:
    """No key but ours, no group but the recipients', no consumer but those that live."""
    bus = open_bus(world.settings)
    recipients = {e: str(r) for e, r in _recipients(world).items()}
    expected = {*recipients, "events", "life"}
    consumers, faults = 0, []
    for raw in sorted(bus.client.scan_iter("*")):
        key = raw.decode()
        name = key.removeprefix(bus.prefix)
        if key == name or name not in expected:
            faults.append(f"redis: key {key} is none of ours")
        elif bus.client.type(key) == b"stream":
            for group in bus.client.xinfo_groups(key):
                if group["name"].decode() != recipients.get(name):
                    faults.append(f"redis: group {group['name'].decode()} on {key}")
                for c in bus.client.xinfo_consumers(key, group["name"]):
                    consumers += 1
                    if not world.lives(consumer := c["name"].decode()):
                        faults.append(f"redis: consumer {consumer} on {key} is left over")
    bus.client.close()
    return consumers, faults


def _recipients(world: World) -> dict[str, Role]:
    chart = world.store.charts[max(world.store.charts)]
    return {kind: role for role in Role for kind in streams_of(role, chart)}
