"""Redis answers, with errors: a replica, a full memory, a full disk, missing rights, a long start."""

from __future__ import annotations

import pytest

from tests.faults import proxy
from tests.faults.network import TWO
from tests.harness import wait_until

CASES = {
    "READONLY": (proxy.READONLY, proxy.WRITES),
    "MISCONF": (proxy.MISCONF, proxy.WRITES),
    "OOM": (proxy.OOM, proxy.GROWING),
    "NOPERM to read": (proxy.NOPERM, proxy.BLOCKING),
    "NOPERM to claim": (proxy.NOPERM, {"XAUTOCLAIM"}),
    "LOADING": (proxy.LOADING, ()),
    "UNBLOCKED": (proxy.UNBLOCKED, proxy.BLOCKING),
}


@pytest.mark.parametrize("case", CASES)
def test_error_replies_stop_nobody_and_make_nobody_run_hot(net, case, caplog):
    """While Redis answers so, all work is done by the sweeps; commands and log lines stay in proportion to these."""
    error, commands = CASES[case]
    world = net.world
    world.environ |= {"WFM_RECONCILE_SECONDS": "0.3", "WFM_SWEEP_SECONDS": "0.1"}
    world.pipeline("p", TWO)
    proxies = net.redis.all()
    with net.roles() as services:
        wait_until(lambda: all(p.seen["XREADGROUP"] >= 3 for p in proxies), what="all listen")
        rules = [p.answer(error, *commands) for p in proxies]
        turns = count_turns(services)
        began = {p: reads(p) for p in proxies}
        caplog.clear()
        world.register(*(world.package(f"a{i}") for i in range(1)))
        wait_until(lambda: world.all_covered(2), what="all covered under errors")
        wait_until(lambda: min(turns()) >= 20, what="20 turns of every relay")
        most = max(turns())
        most_reads = max(reads(p) - began[p] for p in proxies)
        lines = len(caplog.records)
        for p in proxies:
            p.heal()
        world.register(world.package("late"))
        wait_until(lambda: world.all_covered(3), what="all covered when healed")
        world.check()
    assert sum(r.hits for r in rules) >= 1
    # One try to read is up to 7 commands: without a pause between them there would be hundreds in a turn.
    assert most_reads < 15 * most, (most_reads, most)
    assert lines < 5 * most, (lines, most)


def reads(proxy):
    return sum(proxy.seen[name] for name in ("XGROUP", "XREADGROUP", "XAUTOCLAIM"))


def count_turns(services):
    """How often each role's relay has had its turn since now."""
    counts = dict.fromkeys(services, 0)
    for role, service in services.items():
        sweep = next(s for s in service._sweeps if s.name == "relay")

        def work(tx, role=role, original=sweep.work):
            counts[role] += 1
            return original(tx)

        sweep.work = work
    return lambda: list(counts.values())
