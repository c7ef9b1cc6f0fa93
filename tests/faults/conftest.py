"""Seeds: every random choice of a fault test comes from one number, which a failure prints with the command."""

from __future__ import annotations

import random
import shlex
from collections.abc import Iterator

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="of the random choices in tests/faults; a new one each time if left out")


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The seed of this test."""
    given = request.config.getoption("--seed", default=None)  # unknown if pytest was not pointed at this directory
    seed = random.SystemRandom().randrange(2**32) if given is None else int(given)
    request.node.user_properties.append(("seed", seed))
    return seed


@pytest.fixture
def chance(seed: int) -> random.Random:
    """All random choices of this test."""
    return random.Random(seed)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.failed:
        seeds = "".join(f" --seed {value}" for name, value in item.user_properties if name == "seed")
        report.sections.append(("again", f"pytest {shlex.quote(item.nodeid)}{seeds}"))
    return report
