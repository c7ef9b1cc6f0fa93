"""Whether history replays to the stored states."""

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


def verify(
    conn: Connection, charts: Mapping[int, Chart], run_ids: Collection[int] | None = None, batch: int = 10_000
) -> VerifyReport:
    """Replay the history of runs through their charts and compare it with the runs as they are stored.

    Holds for every run: versions go from 1 to the run's without a gap; the first row enters the chart's initial state
    from nowhere; each next one starts where the last ended and is a move of its chart; the last one ends in the run's
    state; the attempt never decreases and ends as the run's. Runs without history and history without a run are faults.

    Everything is read in one statement, hence in one snapshot, by a server-side cursor: memory does not grow with the
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
    if missing:
        _no_run(conn, min(missing))
    return VerifyReport(seen, transitions, faults, total)


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
