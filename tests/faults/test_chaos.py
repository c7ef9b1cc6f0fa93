"""A short, fixed piece of what `make chaos` does for as long as one likes."""

from __future__ import annotations

import json

from tests.faults import chaos


def test_a_short_fixed_piece_of_chaos(tmp_path):
    report = tmp_path / "report.json"
    assert chaos.main(["--minutes", "0.3", "--runs", "60", "--seed", "20260329", "--report", str(report)]) == 0
    told = json.loads(report.read_text())
    assert (told["lost"], told["doubled"], told["violations"]) == (0, 0, [])
    assert told["runs"] >= 60
    assert sum(told["faults"].values()) >= 3
    assert told["completed"] >= 50
