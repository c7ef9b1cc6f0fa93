"""Worlds with a network that can be made bad."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.network import Network
from tests.harness import World


@pytest.fixture
def net(world: World) -> Iterator[Network]:
    network = Network(world)
    yield network
    network.close()
