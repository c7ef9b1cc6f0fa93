"""Whether history replays to the stored states, and whether events and coverage agree with the runs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from msgspec import Struct
from sqlalchemy import Connection, text

from wfm.charts import Chart
from wfm.views.sql import _no_run


class VerifyReport(Struct, frozen=True):
    """What replaying history gave.

    Attributes:
        runs, transitions: how many were looked at.
        faults: one line each, at most `MOST_FAULTS` of `faults_total`.
    """

    runs: int
    transitions: int
    faults: list[str]
    faults_total: int


MOST_FAULTS = 1000
"""So many faults are listed; the others are counted."""

UNDER_WAY_SECONDS = 600.0
"""So long an event of a run that has ended since may still be on its way to its recipient."""


def verify(
    conn: Connection, charts: Mapping[int, Chart], run_ids: Collection[int] | None = None, batch: int = 10_000
) -> VerifyReport:
    """Replay the history of runs through their charts and compare it with the runs as they are stored.

    Holds for every run: versions go from 1 to the run's without a gap; the first row enters the chart's initial state
    from nowhere; each next one starts where the last ended and is a move of its chart; the last one ends in the run's
    state; the attempt never decreases and ends as the run's. Runs without history and history without a run are faults.

    So are events of a run that is not there, or of a transition that it has not made; events that are pending although
    their run has gone on and ended long ago; events that readers of the log never see; and coverage that rests on a run
    that is not COMPLETED, or that has another step, unit, digest or result.

    Each question is one statement, hence one snapshot, read by a server-side cursor: memory does not grow with the
    number of runs. The connection must be in a transaction.

    Args:
        charts: by version, all that history may name.
        run_ids: look at these runs only.
        batch: rows per fetch.

    Raises:
        NotFoundError: neither a run nor history has one of `run_ids`.
    """
    rows = conn.execute(
        text(
            """
            SELECT coalesce(r.id, t.run_id) AS run, r.state, r.version AS run_version, r.attempt AS run_attempt,
                t.version, t.attempt, t.trigger, t.source, t.dest, t.chart_version
            FROM (SELECT id, state, version, attempt FROM run WHERE :every OR id = ANY(:ids)) r
            FULL JOIN (SELECT * FROM transition WHERE :every OR run_id = ANY(:ids)) t ON t.run_id = r.id
            ORDER BY 1, t.version
            """
        ),
        {"every": run_ids is None, "ids": sorted(run_ids or ())},
        execution_options={"yield_per": batch},
    )
    moves = {version: {(t.trigger, t.source, t.dest) for t in chart.transitions} for version, chart in charts.items()}
    initial = {version: chart.initial for version, chart in charts.items()}
    seen = transitions = total = 0
    faults: list[str] = []
    missing = set(run_ids or ())
    for run_id, group in groupby(rows, key=lambda row: row.run):
        history = list(group)
        missing.discard(run_id)
        seen += history[0].state is not None
        transitions += sum(row.version is not None for row in history)
        for fault in _replay(history, moves, initial):
            total += 1
            if total <= MOST_FAULTS:
                faults.append(f"run {run_id}: {fault}")
    for question in (_EVENTS, _LEFT_PENDING, _UNSEEN, _COVERAGE):
        answers = conn.execute(
            text(question),
            {"every": run_ids is None, "ids": sorted(run_ids or ()), "under_way": UNDER_WAY_SECONDS},
            execution_options={"yield_per": batch},
        )
        for (fault,) in answers:
            total += 1
            if total <= MOST_FAULTS:
                faults.append(fault)
    if missing:
        _no_run(conn, min(missing))
    return VerifyReport(seen, transitions, faults, total)


# Each gives one line per fault.

_EVENTS = """
SELECT format('event %s %s: ', e.id, e.type) || CASE WHEN r.id IS NULL THEN format('run %s does not exist', e.run_id)
    ELSE format('is of version %s of run %s, which is at version %s', e.run_version, r.id, r.version) END
FROM event e LEFT JOIN run r ON r.id = e.run_id
WHERE e.run_id IS NOT NULL AND (:every OR e.run_id = ANY(:ids)) AND (r.id IS NULL OR e.run_version > r.version)
ORDER BY e.id
"""

# The event of a run's last move may wait for its recipient as long as that one is not at work.
_LEFT_PENDING = """
SELECT format('event %s %s: is pending for %s since %s, but run %s went on and is %s', e.id, e.type, e.recipient,
    to_char(e.created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"'), r.id, r.state)
FROM event e JOIN run r ON r.id = e.run_id
WHERE e.done_at IS NULL AND (:every OR e.run_id = ANY(:ids)) AND e.run_version < r.version
    AND greatest(e.created_at, r.finished_at) < now() - :under_way * interval '1 s' AND r.finished_at IS NOT NULL
ORDER BY e.id
"""

# A row that is visible has a number that was given out (to us, or before), unless it came from another server.
_UNSEEN = """
SELECT format('event %s and %s more: their transactions have numbers that this server has not reached, so nobody who '
    'reads the log sees them; were the tables restored from another server? See docs/how-to/replay-and-repair.md',
    min(e.id), count(*) - 1)
FROM event e WHERE :every AND e.txid >= pg_snapshot_xmax(pg_current_snapshot())
    AND e.txid IS DISTINCT FROM pg_current_xact_id_if_assigned() HAVING count(*) > 0
"""

_COVERAGE = """
SELECT format('coverage of %s/%s %s rests on run %s, which ', p.name, s.name, u.key, r.id) || CASE
    WHEN r.state <> 'COMPLETED' THEN format('is %s', r.state)
    WHEN (r.step_id, r.unit_id) <> (c.step_id, c.unit_id) THEN 'is of another step or unit'
    WHEN r.wanted <> c.wanted THEN format('has digest %s, but %s is wanted', r.wanted, c.wanted)
    ELSE 'has another result' END
FROM coverage c JOIN run r ON r.id = c.run_id JOIN reduction_step s ON s.id = c.step_id
JOIN pipeline p ON p.id = s.pipeline_id JOIN unit u ON u.id = c.unit_id
WHERE c.state = 'covered' AND (:every OR r.id = ANY(:ids)) AND (r.state <> 'COMPLETED'
    OR (r.step_id, r.unit_id, r.wanted, r.result) IS DISTINCT FROM (c.step_id, c.unit_id, c.wanted, c.result))
ORDER BY s.id, u.id
"""


def _replay(
    history: Sequence[Any], moves: Mapping[int, Collection[tuple[str, str, str]]], initial: Mapping[int, str]
) -> Iterator[str]:
    """The faults of one run. Its rows carry the run's own columns too; these, or those of history, may be None."""
    run = history[0]
    if run.version is None:
        yield f"has no history, but is {run.state} at version {run.run_version}"
        return
    version, state, attempt = 0, "", 1
    for row in history:
        where = f"version {row.version}"
        if row.version != version + 1:
            yield f"{where} follows version {version}"
        elif row.source != state:
            yield f"{where} leaves {row.source or 'nowhere'}, but version {version} entered {state or 'nothing'}"
        if row.chart_version not in moves:
            yield f"{where} names chart version {row.chart_version}, which is not known"
        elif row.version == 1:
            if row.dest != initial[row.chart_version]:
                yield f"{where} enters {row.dest}, but the chart begins with {initial[row.chart_version]}"
        elif (row.trigger, row.source, row.dest) not in moves[row.chart_version]:
            yield f"{where}: chart {row.chart_version} has no move {row.source} --{row.trigger}--> {row.dest}"
        if row.attempt < attempt:
            yield f"{where} is of attempt {row.attempt}, after attempt {attempt}"
        version, state, attempt = row.version, row.dest, row.attempt
    if run.state is None:
        yield f"has {len(history)} transitions, but does not exist"
        return
    if version != run.run_version:
        yield f"is at version {run.run_version}, but its history ends with version {version}"
    if state != run.state:
        yield f"is {run.state}, but its history ends in {state}"
    if attempt != run.run_attempt:
        yield f"is in attempt {run.run_attempt}, but its history ends in attempt {attempt}"
