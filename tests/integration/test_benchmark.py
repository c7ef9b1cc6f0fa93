"""What the benchmark of the gap engine begins with is what the engine itself would have made."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.harness import ACTOR, World
from wfm import gaps
from wfm.gaps import evaluation

FILE = Path(__file__).parents[2] / "benchmarks" / "gaps.py"


@pytest.fixture
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_gaps", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_filled_in_is_covered_and_nothing_is_decided_again(
    world: World, bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.fill(world, 40)
    assert {(c.state, c.why) for c in world.coverage().values()} == {("covered", "covered")}
    assert len(world.coverage()) == 40 + 10 + 1
    decided: list[Any] = []
    monkeypatch.setattr(evaluation, "evaluate_chunk", lambda tx, pairs, *_: decided.extend(pairs) or [])
    world.act(lambda tx: gaps.reconcile(tx, 1, ACTOR))
    assert decided == []
    assert world.act(lambda tx: gaps.mend_tallies(tx, 1)) == 0
