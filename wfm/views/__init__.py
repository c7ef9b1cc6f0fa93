"""Every read that people make: set-based SQL in, frozen structs out.

A question costs a fixed number of statements, however many rows it touches. Answers become JSON through
`msgspec.to_builtins`; all times are aware and in UTC. Statements name tables without a schema, so the connection's
search path decides. A name that does not exist is a `NotFoundError` that gives the nearest one.
"""

from wfm.views.backfills import BackfillLine, BackfillNote, backfills
from wfm.views.cost import Estimate, StepCost, estimate, step_costs
from wfm.views.coverage import (
    CHANGE,
    CoverageLine,
    NotSelected,
    PackageWhy,
    RunBrief,
    UpstreamUnit,
    WhyLine,
    coverage_summary,
    why,
    why_package,
)
from wfm.views.ledger import (
    START,
    DeadLetter,
    DeadLetterLine,
    DeadLetterState,
    EventDetail,
    EventLine,
    EventPage,
    dead_letter,
    dead_letters,
    event_detail,
    events,
    is_before,
    log_end,
)
from wfm.views.lists import Counts, PackageLine, PausedLine, PendingLine, counts, packages
from wfm.views.provenance import LineageKind, LineageNode, lineage, mermaid, tree
from wfm.views.run_lines import (
    SHOWN,
    ProductLine,
    RunDetail,
    RunLine,
    RunRef,
    TaskLine,
    TransitionLine,
    run_detail,
    runs,
)
from wfm.views.selection import RuleCount, Selection, explain, explain_pipeline
from wfm.views.verification import MOST_FAULTS, VerifyReport, verify

__all__ = [
    "CHANGE",
    "MOST_FAULTS",
    "SHOWN",
    "START",
    "BackfillLine",
    "BackfillNote",
    "Counts",
    "CoverageLine",
    "DeadLetter",
    "DeadLetterLine",
    "DeadLetterState",
    "Estimate",
    "EventDetail",
    "EventLine",
    "EventPage",
    "LineageKind",
    "LineageNode",
    "NotSelected",
    "PackageLine",
    "PackageWhy",
    "PausedLine",
    "PendingLine",
    "ProductLine",
    "RuleCount",
    "RunBrief",
    "RunDetail",
    "RunLine",
    "RunRef",
    "Selection",
    "StepCost",
    "TaskLine",
    "TransitionLine",
    "UpstreamUnit",
    "VerifyReport",
    "WhyLine",
    "backfills",
    "counts",
    "coverage_summary",
    "dead_letter",
    "dead_letters",
    "estimate",
    "event_detail",
    "events",
    "explain",
    "explain_pipeline",
    "is_before",
    "lineage",
    "log_end",
    "mermaid",
    "packages",
    "run_detail",
    "runs",
    "step_costs",
    "tree",
    "verify",
    "why",
    "why_package",
]
