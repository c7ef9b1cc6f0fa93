"""What work will cost, from what the same work has cost: the one estimate that plans, revocations and backfills use."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from msgspec import Struct
from sqlalchemy import Connection

from wfm.views.sql import _all

RECENT = 200
"""Units, the newest of a step, whose runs are looked at: enough for a median, and its price does not grow."""


class StepCost(Struct, frozen=True):
    """What one run of a step took: medians over COMPLETED runs.

    Attributes:
        runs: how many were looked at; where there are none, nothing is known.
        wall_seconds: from start to end of the job. core_hours: cores that it held × hours.
    """

    runs: int = 0
    wall_seconds: float | None = None
    core_hours: float | None = None


def step_costs(conn: Connection, steps: Collection[int]) -> dict[int, StepCost]:
    """By id of each of these steps, what a run of it took lately: of the runs that its newest units rest on."""
    rows = _all(
        conn,
        """
        SELECT q.step_id, count(*) AS runs, percentile_cont(0.5) WITHIN GROUP (ORDER BY z.wall) AS wall_seconds,
            percentile_cont(0.5) WITHIN GROUP (ORDER BY z.cpu * z.wall / 3600) AS core_hours
        FROM unnest(CAST(:steps AS bigint[])) AS q(step_id)
        CROSS JOIN LATERAL (
            SELECT r.cpu, r.wall_seconds AS wall FROM coverage c JOIN run r ON r.id = c.run_id
            WHERE c.step_id = q.step_id AND r.wall_seconds IS NOT NULL ORDER BY c.unit_id DESC LIMIT :recent) z
        GROUP BY q.step_id
        """,
        steps=sorted(steps),
        recent=RECENT,
    )
    known = {r["step_id"]: StepCost(r["runs"], r["wall_seconds"], r["core_hours"]) for r in rows}
    return {step: known.get(step, StepCost()) for step in steps}


def hours(core_hours: float | None) -> str:
    """Core-hours as people read them."""
    if core_hours is None:
        return "unknown"
    return "less than 0.01" if 0 < core_hours < 0.01 else f"{core_hours:.3g}"


def about(core_hours: float) -> str:
    """The same within a sentence."""
    return f"{hours(core_hours)} core-hours" if core_hours < 0.01 else f"about {hours(core_hours)} core-hours"


class Estimate(Struct, frozen=True):
    """What some runs will take.

    Attributes:
        runs: how many. unknown: of these, those of steps without a COMPLETED run; the hours are without them.
        core_hours: None where nothing is known of any of them.
    """

    runs: int
    unknown: int
    core_hours: float | None

    def __str__(self) -> str:
        if self.core_hours is None:
            return "nothing" if not self.runs else "unknown: no run of these steps has completed yet"
        rest = f", and {self.unknown} of unknown cost" if self.unknown else ""
        return about(self.core_hours) + rest


def estimate(costs: Mapping[int, StepCost], runs: Mapping[int, int]) -> Estimate:
    """The cost of so many runs of each step (by its id), from what `step_costs` gave for these steps."""
    known = {step: each for step in runs if (each := costs[step].core_hours) is not None}
    count = sum(runs.values())
    unknown = count - sum(runs[step] for step in known)
    total = sum(each * runs[step] for step, each in known.items())
    return Estimate(count, unknown, total if count > unknown else None)
