"""The gap engine against a plain re-computation: whatever happened and whatever got lost, coverage ends the same.

People, telescopes and clusters do what they like: packages come, change and move to other units, rules and configs
are edited, steps, pipelines and groupings renamed, versions are released and revoked, runs end well and badly, are
cancelled and retried, some of what was to be told is deleted from the ledger, and what is told comes late, doubled
and in any order. After a reconciliation, coverage must be what one gets by looking at everything, with dictionaries
of Python in place of digests, generations and increments. Only the decision itself (`decide.gap`, which has tests of
its own) is taken from wfm.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from msgspec import Struct

from tests.services import Servers
from wfm import acts, catalogue, documents, events, grouping
from wfm.config import load
from wfm.decide import (
    ActiveRun,
    Capacity,
    EndedRun,
    GapFacts,
    MoveFacts,
    Search,
    SoftwareVersion,
    Tried,
    Upstream,
    choose_version,
    gap,
)
from wfm.errors import DocumentError
from wfm.model import (
    FINAL_STATES,
    OF_DATA,
    Actor,
    CoverageState,
    FailureClass,
    Probe,
    RunState,
    TriggerType,
    VersionPolicy,
)
from wfm.revoke import Kind, State, Thing, set_state
from wfm.roles import TriggerManager, WorkflowManager
from wfm.schema import PINNED
from wfm.service import open_store
from wfm.store import WITHDRAWN, Move, Tx, failed, message
from wfm.views import quarantine

EXAMPLES = int(os.environ.get("WFM_TEST_EXAMPLES", "0"))
"""How many histories to try, each of them another one every time; 0: the few of `make test`, always the same."""

ACTOR = Actor("user:test", "a test")
NAMES = 6
SOURCES = ("A", "B")
CONTENTS = ("one", "two")

Pair = tuple[str, str, str]
"""(pipeline, step, unit key)"""


# --- the plain re-computation ---


class Said(Struct, frozen=True):
    """What coverage says of a pair, or should say."""

    state: CoverageState
    why: str


class Plain:
    """Coverage from the catalogue, the definitions and the runs alone, by looking at all of them.

    What a run is worth is what it read: its packages with their contents, and of each result that it read the same,
    down to the raw data; with the versions and configs of all of them. Where such results were revoked, it also counts
    which of them it is. No digest takes part, but to tell that.
    """

    def __init__(self, tx: Tx) -> None:
        self.tx = tx
        self.packages = tx.all(
            """
            SELECT p.id, p.name, p.item, p.state, p.metadata, e.name AS executed_obs_unit, o.name AS obs_unit,
                s.name AS source
            FROM raw_data_package p JOIN executed_obs_unit e ON e.id = p.executed_obs_unit_id
            JOIN obs_unit o ON o.id = e.obs_unit_id LEFT JOIN source s ON s.id = o.source_id WHERE p.revoked_by = ''
            """
        )
        self.configs = {c.id: c.hash for c in tx.all("SELECT id, hash FROM config_revision")}
        self.revoked = {d.run_id for d in tx.all("SELECT run_id FROM data_product WHERE revoked_by <> ''")}
        self.made: dict[Hashable, list[Any]] = defaultdict(list)
        self.runs: dict[tuple[int, str], list[Any]] = defaultdict(list)
        for r in tx.all("SELECT r.*, u.key FROM run r JOIN unit u ON u.id = r.unit_id ORDER BY r.id"):
            self.runs[r.step_id, r.key].append(r)
        self.all_runs = {r.id: r for runs in self.runs.values() for r in runs}
        self.members_read: dict[int, set[tuple[int, int]]] = defaultdict(set)
        self.results_read: dict[int, set[int]] = defaultdict(set)
        self.read = self._what_was_read()
        self.quarantine: dict[tuple[int, str], list[Any]] = defaultdict(list)
        for q in tx.all(
            "SELECT q.*, u.key, l.key AS member, l.dims FROM quarantine q JOIN unit u ON u.id = q.unit_id"
            " LEFT JOIN unit l ON l.id = q.member_id ORDER BY q.id"
        ):
            self.quarantine[q.step_id, q.key].append(q)
        self.names: dict[Hashable, str] = {}
        self.coverage: dict[Pair, Said] = {}
        self.problems: list[str] = []

    def _what_was_read(self) -> dict[int, Hashable]:
        """By run, everything its result comes from."""
        members, inputs = self.members_read, self.results_read
        for m in self.tx.all(
            "SELECT r.id, m.package_id, m.item FROM run r JOIN unit_member m ON m.unit_id = r.unit_id"
            " AND m.added <= r.generation AND (m.removed IS NULL OR m.removed > r.generation)"
        ):
            if _reads(self.all_runs[m.id].subset, m.package_id):
                members[m.id].add((m.package_id, int(m.item)))
        for i in self.tx.all("SELECT run_id, upstream_run_id FROM run_input"):
            inputs[i.run_id].add(i.upstream_run_id)
        read: dict[int, Hashable] = {}
        for r in sorted(self.all_runs.values(), key=lambda r: int(r.id)):
            # Upstream runs are always older: they were done before this one was made.
            upstream = frozenset(read[i] for i in inputs[r.id])
            config = self.configs.get(r.config_revision_id)
            worth = _worth(r.step_id, r.key, members[r.id], upstream, r.software_version_id, config)
            if r.probe_of is None:
                self.made[worth].append(r)
                read[r.id] = worth, self._places(worth).index(r.wanted)
        return read

    def _places(self, worth: Hashable) -> list[str]:
        """The first result of this worth, that in its place when it was revoked, that in the place of this one."""
        return list(dict.fromkeys(r.wanted for r in self.made[worth]))

    def _in_place(self, worth: Hashable) -> Hashable:
        """Which of these is wanted now: the first of which none is revoked."""
        bad = {r.wanted for r in self.made[worth] if r.id in self.revoked}
        places = self._places(worth)
        return worth, next((n for n, wanted in enumerate(places) if wanted not in bad), len(places))

    def compute(self) -> dict[Pair, Said]:
        for p in self.tx.all(
            "SELECT p.*, g.rules FROM pipeline p JOIN data_grouping g ON g.id = p.grouping_id"
            " WHERE p.deleted_at IS NULL ORDER BY p.id"
        ):
            self._pipeline(p, [x for x in self.packages if all(_holds(rule, x) for rule in p.rules)])
        return self.coverage

    def _pipeline(self, p: Any, packages: Sequence[Any]) -> None:
        covered: dict[int, dict[str, Hashable | None]] = {}
        blocked: dict[int, set[str]] = {}
        inside: dict[int, dict[str, set[tuple[int, int]]]] = {}
        names: dict[int, str] = {}
        self.dims: dict[int, str] = {}
        for s in self.tx.all("SELECT * FROM reduction_step WHERE pipeline_id = :p ORDER BY position", p=p.id):
            names[s.id], self.dims[s.id] = s.name, s.dims
            upstream = [d.upstream_id for d in self.tx.all("SELECT * FROM step_dependency WHERE step_id = :s", s=s.id)]
            units: dict[str, set[tuple[int, int]]] = defaultdict(set)
            for x in packages:
                units[_key(s.group_by, x)].add((x.id, int(x.item)))
            inside[s.id] = units
            covered[s.id], blocked[s.id] = {}, set()
            asked = {
                c.key: c.requested
                for c in self.tx.all(
                    "SELECT u.key, c.requested FROM coverage c JOIN unit u ON u.id = c.unit_id WHERE step_id = :s",
                    s=s.id,
                )
            }
            # Of a step that is gone, only what it had has to be told.
            for key in sorted({*units, *asked} if s.active else asked):
                results: list[tuple[str, Sequence[str], int]] = []
                for i in upstream:
                    ids = {package for package, _ in units.get(key, ())}
                    results.append((names[i], [k for k, m in inside[i].items() if ids & {n for n, _ in m}], i))
                facts, worth = self._facts(p, s, key, units.get(key, set()), results, covered, blocked)
                facts = msgspec.structs.replace(facts, requested=asked.get(key, False))
                decision = gap(facts)
                if decision.run or decision.withdraw or decision.probe or decision.guilty or decision.release:
                    self.problems.append(f"{p.name}/{s.name} {key}: left undone: {decision}")
                self.coverage[p.name, s.name, key] = Said(decision.state, decision.why)
                if decision.state is CoverageState.COVERED:
                    covered[s.id][key] = worth
                elif decision.state is CoverageState.BLOCKED:
                    blocked[s.id].add(key)

    def _facts(
        self,
        p: Any,
        s: Any,
        key: str,
        members: set[tuple[int, int]],
        upstream: Sequence[tuple[str, Sequence[str], int]],
        covered: Mapping[int, Mapping[str, Hashable | None]],
        blocked: Mapping[int, set[str]],
    ) -> tuple[GapFacts, Hashable]:
        versions = [
            SoftwareVersion(v.id, v.version, v.state)
            for v in self.tx.all("SELECT * FROM software_version WHERE software_id = :s", s=s.software_id)
        ]
        version, fault = choose_version(VersionPolicy(s.version_policy), s.version, versions)
        config = self.tx.all(
            "SELECT id FROM config_revision WHERE config_id = :c AND revoked_by = '' ORDER BY revision DESC LIMIT 1",
            c=s.config_id or 0,
        )
        unusable = "all are revoked" if s.config_id and not config else ""
        parameters = self.configs[config[0].id] if config else None
        aside = self._aside(s, key, members, upstream, covered, version.id if version else None, parameters)
        whole = members
        members = {m for m in members if m[0] not in {q.package_id for q in aside}}
        left_out = {(q.dims, q.member) for q in aside}
        upstream = [(n, [k for k in keys if (self.dims[i], k) not in left_out], i) for n, keys, i in upstream]
        results = frozenset(covered[i][k] for _, keys, i in upstream for k in keys if k in covered[i])
        worth = self._in_place(_worth(s.id, key, members, results, version.id if version else None, parameters))
        known = version is not None and not unusable
        runs = self.runs.get((s.id, key), [])
        active = [r for r in runs if r.state not in FINAL_STATES]
        ended = [
            r
            for r in runs
            if r.state in FINAL_STATES and r.failure != WITHDRAWN and r.probe_of is None and known
            if self.read[r.id] == worth
        ]
        ended.sort(key=lambda r: (r.state == RunState.COMPLETED, r.id))
        facts = GapFacts(
            members=len(whole),
            wanted=self._name(worth) if known else "",
            version_fault=fault,
            config_fault=unusable,
            upstream=tuple(
                Upstream(
                    step=name,
                    total=len(keys),
                    covered=sum(k in covered[i] for k in keys),
                    blocked=sum(k in blocked[i] for k in keys),
                    digest=0,
                )
                for name, keys, i in upstream
            ),
            active=ActiveRun(
                active[0].id,
                RunState(active[0].state),
                self._aims_at(active[0], worth),
                probe=msgspec.convert(active[0].probe, Probe | None),
            )
            if active
            else None,
            ended=EndedRun(ended[-1].id, RunState(ended[-1].state), ended[-1].message, failure=ended[-1].failure)
            if ended
            else None,
            quarantine_at_most=s.quarantine_at_most,
            quarantined=tuple(str(q.id) for q in aside),
            search=self._search(s, key, ended[-1], members, upstream, covered, aside)
            if ended and s.quarantine_at_most and ended[-1].failure in OF_DATA and ended[-1].state == RunState.FAILED
            else None,
            step_active=s.active,
            enabled=p.enabled,
            paused=p.paused_by or s.paused_by,
            trigger=TriggerType(p.trigger_type),
        )
        return facts, worth

    def _aside(
        self,
        s: Any,
        key: str,
        members: set[tuple[int, int]],
        upstream: Sequence[tuple[str, Sequence[str], int]],
        covered: Mapping[int, Mapping[str, Hashable | None]],
        version: int | None,
        parameters: Any,
    ) -> list[Any]:
        """What is in quarantine: the member as the failed run read it, and what is to run the same."""
        found = []
        for q in self.quarantine[s.id, key]:
            failed = self.all_runs[q.run_id]
            config = self.configs.get(failed.config_revision_id)
            if q.released_at is not None or (failed.software_version_id, config) != (version, parameters):
                continue
            if q.package_id is not None:
                was = {m for m in self.members_read[failed.id] if m[0] == q.package_id}
                now = {m for m in members if m[0] == q.package_id}
                same = not upstream and bool(now) and was == now
            else:
                read = (self.all_runs[i] for i in self.results_read[failed.id])
                was_read = {(r.step_id, self.read[r.id]) for r in read if self._is(r, q)}
                inside = [i for _, keys, i in upstream if self.dims[i] == q.dims and q.member in keys]
                is_read = {(i, covered[i][q.member]) for i in inside if q.member in covered[i]}
                same = bool(is_read) and was_read == is_read and q.dims != s.dims
            if same:
                found.append(q)
        return found[: s.quarantine_at_most]

    def _is(self, run: Any, q: Any) -> bool:
        """Whether a run is of the finer unit that is in quarantine."""
        return bool(run.unit_id == q.member_id)

    def _search(
        self,
        s: Any,
        key: str,
        failed: Any,
        members: set[tuple[int, int]],
        upstream: Sequence[tuple[str, Sequence[str], int]],
        covered: Mapping[int, Mapping[str, Hashable | None]],
        aside: Sequence[Any],
    ) -> Search:
        finer: dict[str, set[str]] = defaultdict(set)
        for _, keys, i in upstream:
            if self.dims[i] != s.dims:
                finer[self.dims[i]] |= {k for k in keys if k in covered[i]}
        tried = []
        for r in self.runs[s.id, key]:
            if r.probe_of == failed.id and r.probe["version"] == failed.version and r.state in FINAL_STATES:
                passed = True if r.state == RunState.COMPLETED else False if r.failure in OF_DATA else None
                if r.failure != WITHDRAWN:
                    tried.append(Tried(r.id, r.probe["first"], r.probe["last"], passed, r.message))
        results = [r.id for r in self.runs[s.id, key] if r.state == RunState.COMPLETED and r.probe_of is None]
        over = [
            q.released_reason
            for q in self.quarantine[s.id, key]
            if (q.run_id, q.run_version) == (failed.id, failed.version) and q.released_at is not None
        ]
        return Search(
            members=max(map(len, finer.values()), default=0) if upstream else len(members),
            most=s.quarantine_at_most,
            tried=tuple(tried),
            unproven=tuple(str(q.id) for q in aside if max(results, default=0) < q.run_id),
            over=over[0] if over else "",
        )

    def _name(self, worth: Hashable) -> str:
        return self.names.setdefault(worth, str(len(self.names)))

    def _aims_at(self, run: Any, worth: Hashable) -> str:
        """What an active run is made for. Until it is built, nothing but its digest says which results it will read."""
        if run.probe_of is not None:
            return self._name(self.read[run.probe_of])
        if run.state != RunState.PENDING:
            return self._name(self.read[run.id])
        (now,) = self.tx.all(
            "SELECT wanted FROM coverage WHERE (step_id, unit_id) = (:s, :u)", s=run.step_id, u=run.unit_id
        )
        return self._name(worth) if now.wanted == run.wanted else "something else"


def _worth(step: int, key: str, members: set[tuple[int, int]], upstream: frozenset[Any], *made_by: Any) -> Hashable:
    return step, key, frozenset(members), upstream, made_by


def _reads(subset: Mapping[str, Any] | None, package: int) -> bool:
    """Whether a run that reads this of its unit reads a package."""
    if subset is None or subset["of"] != "packages":
        return True
    first, last = subset["first"] or package, subset["last"] or package
    return bool(first <= package <= last and package not in subset["without"])


def _key(group_by: Sequence[str], package: Any) -> str:
    return grouping.unit_key({d: getattr(package, d) for d in group_by})


def _holds(rule: Mapping[str, Any], package: Any) -> bool:
    """The few rules of this test, by Python."""
    match rule:
        case {"table": "source", "operator": "eq", "value": value}:
            return bool(package.source == value)
        case {"table": "raw_data_package", "column": "metadata", "operator": "gt", "value": value}:
            found = package.metadata.get("band")
            return isinstance(found, int) and found > value
    raise AssertionError(f"this test does not know {rule}")


# --- the world ---

RULES: tuple[list[dict[str, Any]], ...] = (
    [],
    [{"table": "source", "column": "name", "operator": "eq", "value": "A"}],
    [{"table": "raw_data_package", "column": "metadata", "operator": "gt", "value": 1, "json_path": "band"}],
)

DEFINITIONS = """
kind: site
name: here
---
kind: location
name: archive
site: here
type: long_term_archive
root: /archive
---
kind: location
id: 1
name: processing
site: here
type: processing
root: /pipelines
---
kind: software
name: copy
versions:
  - {version: 1.0.0, command: [copy]}
---
kind: config
name: settings
parameters: {n: 0}
---
kind: grouping
name: chosen
rules: []
---
kind: pipeline
name: maps
grouping: chosen
steps:
  - {name: scan, software: copy, version: 1.0.0, group_by: [executed_obs_unit]}
  - name: source
    software: copy
    version_policy: latest
    group_by: [source]
    depends_on: [scan]
    quarantine_at_most: 2
  - name: everything
    software: copy
    version: 1.0.0
    config: settings
    group_by: []
    depends_on: [source, scan]
    quarantine_at_most: 1
---
kind: pipeline
name: pinned
grouping: chosen
steps:
  - {name: check, software: copy, version_policy: pinned, version: 1.0.0, config: settings, group_by: [obs_unit],
     quarantine_at_most: 2}
  - {name: copy, software: copy, version: 1.0.0, group_by: [obs_unit], depends_on: [check]}
"""

numbers = st.integers(min_value=0, max_value=10**6)
ALL = -1


class Engine(RuleBasedStateMachine):
    """What may happen, in any order."""

    servers: Servers
    template: str

    def __init__(self) -> None:
        super().__init__()
        self._open = ExitStack()
        url = self._open.enter_context(self.servers.database(template=self.template))
        self.settings = load(
            {"WFM_DATABASE_URL": url, "WFM_REDIS_URL": "redis://127.0.0.1:1/0", "WFM_HOME": "/nowhere"}
        )
        self.store = open_store(self.settings)
        self._open.callback(self.store.close)
        self.workflow = WorkflowManager(self.settings, Capacity(runs=1000))
        self.versions = ["1.0.0"]
        self.called = {"maps": "maps", "pinned": "pinned", "chosen": "chosen"}
        self.names = 0
        self.apply(DEFINITIONS)

    def teardown(self) -> None:
        self._open.close()

    def act(self, work: Callable[[Tx], Any]) -> Any:
        return self.store.retrying(work)[0]

    def apply(self, text: str) -> None:
        read = documents.load([("test.yaml", text)])
        self.act(lambda tx: documents.apply(tx.conn, read, location_id=1, actor=ACTOR.name))

    # --- the telescope ---

    @rule(
        names=st.sets(st.integers(0, NAMES - 1), min_size=1),
        content=st.sampled_from(CONTENTS),
        band=st.integers(1, 2),
        shift=st.sampled_from([0, 0, 0, 1]),
        named=st.sampled_from([True, True, False]),
    )
    def register(self, names: set[int], content: str, band: int, shift: int, named: bool) -> None:
        """New packages, other content or another scan of old ones, or the same again; the source may come later."""
        packages = [
            catalogue.PackageIn(
                name=f"p{n}",
                executed_obs_unit=catalogue.ExecutedObsUnitIn(
                    name=f"scan{n // 2 + shift}",
                    obs_unit=f"unit{(n // 2 + shift) // 2}",
                    source=SOURCES[(n // 2 + shift) // 2] if named else None,
                ),
                instrument="cam",
                module="mod",
                metadata={"band": band},
                files=(catalogue.FileIn("raw", 1, f"sha256:{'ab' if content == 'one' else 'cd'}{'0' * 62}"),),
                location="archive",
                path=f"p{n}",
            )
            for n in sorted(names)
        ]
        self.act(lambda tx: catalogue.register(tx.conn, packages, location_ids=[1], actor=ACTOR.name))

    # --- people ---

    @rule(rules=st.sampled_from(RULES))
    def edit_rules(self, rules: list[dict[str, Any]]) -> None:
        self.apply(json.dumps({"kind": "grouping", "name": self.called["chosen"], "rules": rules}))

    @rule(n=st.integers(0, 2))
    def edit_config(self, n: int) -> None:
        with suppress(DocumentError):  # what was revoked cannot be applied
            self.apply(json.dumps({"kind": "config", "name": "settings", "parameters": {"n": n}}))

    @rule(kind=st.sampled_from(["config", "package", "product", "product"]), which=numbers, back=st.booleans())
    def revoke(self, kind: str, which: int, back: bool) -> None:
        """A config, a package or a product is revoked, or one that was is not any more."""
        tables = {"config": "config_revision", "package": "raw_data_package", "product": "data_product"}

        def work(tx: Tx) -> None:
            there = f"SELECT id FROM {tables[kind]} WHERE (revoked_by <> '') = :back ORDER BY id"
            if ids := [r.id for r in tx.all(there, back=back)]:
                before, after = (State.REVOKED, State.ACTIVE) if back else (State.ACTIVE, State.REVOKED)
                thing = Thing(kind=Kind(kind), id=ids[which % len(ids)], name="x", state=before)
                set_state(tx, thing, after, ACTOR)

        self.act(work)

    @rule(major=st.integers(1, 2))
    def release(self, major: int) -> None:
        self.versions.append(f"{major}.{len(self.versions)}.0")
        self._version(self.versions[-1], "active")

    @rule(which=numbers, state=st.sampled_from(["active", "deprecated", "revoked"]))
    def judge_version(self, which: int, state: str) -> None:
        self._version(self.versions[which % len(self.versions)], state)

    def _version(self, version: str, state: str) -> None:
        versions = [{"version": version, "command": ["copy"], "state": state}]
        self.apply(json.dumps({"kind": "software", "name": "copy", "versions": versions}))

    @rule(step=st.sampled_from([None, 0, 1]))
    def pause(self, step: int | None) -> None:
        self.act(lambda tx: acts.pause(tx, self.called["maps"], self._step(tx, step), None, ACTOR))

    @rule(step=st.sampled_from([None, 0, 1]))
    def resume(self, step: int | None) -> None:
        self.act(lambda tx: acts.resume(tx, self.called["maps"], self._step(tx, step), None, ACTOR))

    def _step(self, tx: Tx, n: int | None) -> str | None:
        """What a step of the first pipeline is called now."""
        (document,) = documents.get(tx.conn, "pipeline", self.called["maps"])
        return None if n is None else document["steps"][n]["name"]

    @rule(on=st.booleans())
    def enable(self, on: bool) -> None:
        self.act(lambda tx: acts.set_enabled(tx, self.called["pinned"], on, ACTOR))

    @rule(
        which=numbers, what=st.sampled_from(["maps", "pinned", "chosen"]), how=st.sampled_from(["itself", "one", "all"])
    )
    def rename(self, which: int, what: str, how: str) -> None:
        """A grouping or pipeline, one step of it, or all, each of which takes over the name of the next."""
        kind = "grouping" if what == "chosen" else "pipeline"

        def read(tx: Tx) -> tuple[dict[str, Any], Any]:
            (document,) = documents.get(tx.conn, kind, self.called[what])
            return document, self._decided(tx)

        document, before = self.act(read)
        self.names += 1
        fresh = f"n{self.names}"
        old = [s["name"] for s in document.get("steps", ())]
        first = which % max(len(old), 1)
        new = {n: n for n in old}
        if how == "itself" or kind == "grouping":
            document |= {"name": fresh, "renamed_from": self.called[what]}
            self.called[what] = fresh
        elif how == "one":
            new[old[first]] = fresh
        else:
            new |= dict(zip(old, [*old[1:], fresh], strict=True))
        for s in document.get("steps", ()):
            s["depends_on"] = [new[n] for n in s["depends_on"]]
            if new[s["name"]] != s["name"]:
                s |= {"name": new[s["name"]], "renamed_from": s["name"]}
        for _ in range(2):
            self.apply(json.dumps(document))
            assert self.act(self._decided) == before

    def _decided(self, tx: Tx) -> Any:
        """Everything that is decided, was made or is to be, under no name."""
        return [
            tx.all(sql)
            for sql in (
                "SELECT step_id, unit_id, state, why, wanted, result::text, run_id, basis, requested FROM coverage"
                " ORDER BY 1, 2",
                "SELECT id, state, version, wanted, pipeline_name, step_name FROM run ORDER BY 1",
                "SELECT id, active, identity, paused_by, position, final, dims FROM reduction_step ORDER BY 1",
                "SELECT * FROM step_dependency ORDER BY 1, 2",
            )
        ]

    @rule(trigger=st.sampled_from(["MANUAL", "CONTINUOUS"]), steps=st.integers(1, 2), most=st.integers(0, 2))
    def edit_pipeline(self, trigger: str, steps: int, most: int) -> None:
        """Manual or not; with both of its steps or one; with so many members that may be left out.

        What its steps were renamed to is removed, and they are new.
        """
        pinned = {"version_policy": "pinned", "config": "settings", "quarantine_at_most": most}
        both = [
            {"name": "check", "group_by": ["obs_unit"], **pinned},
            {"name": "copy", "group_by": ["obs_unit"], "depends_on": ["check"]},
        ]
        body = [{"software": "copy", "version": "1.0.0", **s} for s in both[:steps]]
        self.apply(
            json.dumps(
                {
                    "kind": "pipeline",
                    "name": self.called["pinned"],
                    "grouping": self.called["chosen"],
                    "trigger": trigger,
                    "steps": body,
                }
            )
        )

    @rule()
    def trigger(self) -> None:
        self.act(lambda tx: acts.trigger(tx, self.called["pinned"], None, None, ACTOR))

    @rule(which=numbers, all_of_it=st.booleans())
    def release_quarantine(self, which: int, all_of_it: bool) -> None:
        def work(tx: Tx) -> None:
            if found := quarantine(tx.conn, location_id=1):
                q = found[which % len(found)]
                member = None if all_of_it else q.member
                acts.release_quarantine(tx, q.pipeline, q.step, q.unit, member, ACTOR)

        self.act(work)

    @rule(which=numbers)
    def cancel(self, which: int) -> None:
        self._some("finished_at IS NULL", which, lambda tx, i: acts.cancel_runs(tx, [i], ACTOR))

    @rule(which=numbers)
    def retry(self, which: int) -> None:
        self._some("state IN ('FAILED', 'CANCELLED')", which, lambda tx, i: acts.retry_runs(tx, [i], ACTOR))

    @rule(which=numbers)
    def redrive(self, which: int) -> None:
        self._some("state = 'COMPLETED'", which, lambda tx, i: acts.redrive_runs(tx, [i], RunState.PENDING, ACTOR))

    def _some(self, where: str, which: int, work: Callable[[Tx, int], Any]) -> None:
        def act(tx: Tx) -> None:
            ids = [r.id for r in tx.all(f"SELECT id FROM run WHERE {where} ORDER BY id")]
            if ids:
                work(tx, ids[which % len(ids)])

        self.act(act)

    # --- the roles ---

    @rule()
    def admit(self) -> None:
        self.act(self.workflow.admit)

    @rule(
        seed=numbers,
        ends=st.sampled_from(["well", "badly", "both"]),
        of_data=st.sampled_from([True, True, True, False]),
    )
    def end_runs(self, seed: int, ends: str, of_data: bool = True) -> None:
        """Some of what was built comes to an end."""

        def work(tx: Tx) -> None:
            found = tx.find_runs("r.state = ANY(:s)", s=["STAGING_DATA", "SUBMITTED", "CANCELLING"])
            some = [i for n, i in enumerate(sorted(found)) if seed >> n & 1]
            runs = tx.lock_runs(some)
            for n, run in enumerate(list(runs.values())):
                well = ends == "well" or (ends == "both" and n % 2 == 0)
                self._end(tx, run, well, of_data)

        self.act(work)

    def _end(self, tx: Tx, run: Any, well: bool, of_data: bool) -> None:
        if run.state is RunState.CANCELLING:
            tx.move([Move(run, "confirm_cancel", ACTOR)])
        elif well:
            for step in ("submit", "finish", "collect")[run.state is RunState.SUBMITTED :]:
                moved, refused = tx.move([Move(run, step, ACTOR, MoveFacts(exit_record=True))])
                assert not refused
                run = moved[run.id]
            product = "INSERT INTO data_product (run_id, attempt, type, path, size, checksum)"
            if run.probe_of is None:
                tx.run(f"{product} VALUES (:run, :attempt, 'SCIENCE', 'p', 1, 'c')", run=run.id, attempt=run.attempt)
        else:
            failure = FailureClass.OUTPUT if of_data else FailureClass.REJECTED
            moved, refused = tx.move([failed(run, failure, "it is bad", ACTOR, 0.0)])
            assert not refused

    @rule(seed=numbers, twice=st.booleans(), backwards=st.booleans())
    def deliver(self, seed: int, twice: bool, backwards: bool) -> None:
        """About 30 % of what is to be told is deleted; some comes now, some later, in any order, and twice."""

        def work(tx: Tx) -> None:
            told: list[events.Event] = []
            for n, e in enumerate(self._pending(tx)):
                chance = (seed * 2654435761 + n * 40503) % 100 if seed != ALL else 79
                if chance < 30:
                    tx.run("DELETE FROM event WHERE id = :i", i=e.id)
                elif chance < 80:
                    told.append(events.decode(e.type, message(e).body))
                    tx.mark_done([e.id])
            told = [e for e in (told[::-1] if backwards else told) for _ in range(1 + twice)]
            self.trigger_manager().handle(tx, told)

        self.act(work)

    @rule(waves=st.sampled_from([2, 4, 8, 16]), bad=st.sets(st.integers(0, NAMES - 1), min_size=1, max_size=2))
    def go_on_with_bad_packages(self, waves: int, bad: set[int]) -> None:
        """All packages are there, and for a while all goes as it should, but for what rests on bad ones."""
        self.register(set(range(NAMES)), "one", 2, 0, True)
        for _ in range(waves):
            self.deliver(ALL, False, False)
            self.admit()

            def work(tx: Tx) -> None:
                found = tx.find_runs("r.state = ANY(:s)", s=["STAGING_DATA", "SUBMITTED", "CANCELLING"])
                for run in list(tx.lock_runs(sorted(found)).values()):
                    self._end(tx, run, not self._rests_on(tx, run.id, [f"p{n}" for n in bad]), True)

            self.act(work)

    def _rests_on(self, tx: Tx, run: int, packages: Sequence[str]) -> bool:
        """Whether a run of one of the steps that may leave members out rests on one of these packages."""
        found = tx.all(
            f"""
            WITH RECURSIVE up(id) AS (SELECT CAST(:run AS bigint)
                UNION SELECT i.upstream_run_id FROM up JOIN run_input i ON i.run_id = up.id)
            SELECT 1 FROM run x JOIN reduction_step s ON s.id = x.step_id AND s.name NOT IN ('scan', 'copy')
            WHERE x.id = :run AND EXISTS (SELECT 1 FROM up JOIN run r ON r.id = up.id JOIN unit_member m ON {PINNED}
                JOIN raw_data_package k ON k.id = m.package_id
                WHERE k.name = ANY(:packages) AND NOT EXISTS (SELECT 1 FROM run_input i WHERE i.run_id = r.id))
            """,
            run=run,
            packages=packages,
        )
        return bool(found)

    @rule(waves=st.integers(1, 4))
    def go_on_well(self, waves: int) -> None:
        """For a while everything goes as it should."""
        for _ in range(waves):
            self.deliver(ALL, False, False)
            self.admit()
            self.end_runs(ALL, "well")

    def trigger_manager(self) -> TriggerManager:
        return TriggerManager(self.settings)

    def _pending(self, tx: Tx) -> Sequence[Any]:
        return tx.all("SELECT * FROM event WHERE done_at IS NULL AND recipient = 'trigger-manager' ORDER BY id")

    @rule()
    def reconcile(self) -> None:
        """What the trigger-manager does when it starts; then coverage is what one gets by looking at everything."""
        self.act(self.trigger_manager().reconcile_when_due)
        self.act(self.compare)

    def compare(self, tx: Tx) -> None:
        plain = Plain(tx)
        expected = plain.compute()
        rows = tx.all(
            "SELECT p.name AS pipeline, s.name AS step, u.key, c.state, c.why FROM coverage c"
            " JOIN reduction_step s ON s.id = c.step_id JOIN pipeline p ON p.id = s.pipeline_id"
            " JOIN unit u ON u.id = c.unit_id"
        )
        said = {(r.pipeline, r.step, r.key): Said(CoverageState(r.state), r.why) for r in rows}
        differ = [
            f"{k}: {said.get(k)}, not {expected.get(k)}" for k in said | expected if said.get(k) != expected.get(k)
        ]
        assert not differ, "coverage says otherwise than everything there is:\n" + "\n".join(differ)
        assert not plain.problems, "\n".join(plain.problems)

    @initialize(names=st.sets(st.integers(0, NAMES - 1)), named=st.booleans())
    def begin(self, names: set[int], named: bool) -> None:
        if names:
            self.register(names, "one", 2, 0, named)
        self.reconcile()


class Ending(Engine):
    """Each history ends with a reconciliation."""

    def teardown(self) -> None:
        try:
            self.reconcile()
        finally:
            super().teardown()


class Searching(Ending):
    """Each history begins in the middle of searches for what units fail on, or after them."""

    begin = None  # type: ignore[assignment]

    @initialize(waves=st.integers(4, 16), bad=st.sets(st.integers(0, NAMES - 1), min_size=1, max_size=3))
    def search(self, waves: int, bad: set[int]) -> None:
        self.reconcile()
        self.go_on_with_bad_packages(waves, bad)
        self.reconcile()

    @rule(waves=st.integers(1, 6), bad=st.sets(st.integers(0, NAMES - 1), max_size=2))
    def go_on(self, waves: int, bad: set[int]) -> None:
        self.go_on_with_bad_packages(waves, bad)


@pytest.mark.parametrize("machine", [Ending, Searching])
def test_coverage_is_what_a_plain_recomputation_finds(
    servers: Servers, migrated: str, machine: type[RuleBasedStateMachine]
) -> None:
    Engine.servers, Engine.template = servers, migrated
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES or 15,
            stateful_step_count=20 if machine is Ending else 10,
            deadline=None,
            derandomize=not EXAMPLES,
            # To make a history shorter takes minutes: where somebody looks for one, not in each run of the suite.
            phases=list(Phase) if EXAMPLES else [Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
