"""Redis answers, with errors: a replica, a full memory, a full disk, missing rights, a long start."""

from __future__ import annotations

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


def test_error_replies_stop_nobody_and_make_nobody_run_hot(net, caplog):
    """While Redis answers so, all work is done by the sweeps; commands and log lines stay in proportion to these."""
    world = net.world
    world.environ |= {"WFM_RECONCILE_SECONDS": "0.3", "WFM_SWEEP_SECONDS": "0.1"}
    world.pipeline("p", TWO)
    proxies = net.redis.all()
    with net.roles() as services:
        turns = count_turns(services)
        for n, (case, (error, commands)) in enumerate(CASES.items(), start=1):
            reading = {p: p.seen["XREADGROUP"] for p in proxies}
            wait_until(lambda r=reading: all(p.seen["XREADGROUP"] > r[p] for p in proxies), what=f"{case}: all listen")
            caplog.clear()
            began, first = {p: reads(p) for p in proxies}, dict(turns)
            rules = [p.answer(error, *commands) for p in proxies]
            world.register(world.package(f"a{n}"))
            wait_until(lambda n=n: world.all_covered(n + 1), what=f"{case}: all covered under errors")
            wait_until(lambda r=rules: all(x.hits for x in r), what=f"{case}: every role met it")
            wait_until(lambda f=first: all(turns[r] >= f[r] + 6 for r in turns), what=f"{case}: 6 relay turns")
            most = max(turns[r] - first[r] for r in turns)
            most_reads, lines = max(reads(p) - began[p] for p in proxies), len(caplog.records)
            for p in proxies:
                p.heal()
            # One try to read is up to 7 commands: without a pause between them there would be hundreds in a turn.
            assert most_reads < 15 * most, (case, most_reads, most)
            assert lines < 6 * most, (case, lines, most)
        world.check()


def reads(proxy):
    return sum(proxy.seen[name] for name in ("XGROUP", "XREADGROUP", "XAUTOCLAIM"))


def count_turns(services):
    """How often each role's relay has had its turn, as it grows."""
    counts = dict.fromkeys(services, 0)
    for role, service in services.items():
        sweep = next(s for s in service._sweeps if s.name == "relay")

        def work(tx, role=role, original=sweep.work):
            counts[role] += 1
            return original(tx)

        sweep.work = work
    return counts
