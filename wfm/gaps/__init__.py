"""The gap engine: packages into units, units into coverage, gaps into runs.

Truth is level-triggered: what must run is derived from the catalogue and from coverage, never from the order of
messages. An event only says where to look first. Four functions, all set-based, all repeatable:

* `fold` brings the member sets of units up to date for some packages;
* `evaluate` decides for some (step, unit) pairs what coverage says, and turns gaps into runs;
* `pairs_below` names the pairs that depend on others;
* `reconcile` compares everything with the catalogue, and does the first two where something differs.
"""

from wfm.gaps.evaluation import Evaluated, evaluate, pairs_below, request
from wfm.gaps.facts import revoked_results
from wfm.gaps.membership import CHUNK, fold
from wfm.gaps.quarantine import release
from wfm.gaps.reconciliation import mend_tallies, reconcile
from wfm.model import Pair

__all__ = [
    "CHUNK",
    "Evaluated",
    "Pair",
    "evaluate",
    "fold",
    "mend_tallies",
    "pairs_below",
    "reconcile",
    "release",
    "request",
    "revoked_results",
]
