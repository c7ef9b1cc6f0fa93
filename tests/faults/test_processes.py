"""Processes that freeze, are told to stop in the middle, are killed at random, or whose clocks are wrong."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.faults.bench import Bench, bench
from tests.faults.checker import EFFECTS
from tests.harness import wait_until
from wfm.model import Role

STEP = {"name": "one", "group_by": ["executed_obs_unit"]}


@pytest.fixture
def here(servers, migrated, tmp_path) -> Iterator[Bench]:
    with bench(servers, migrated, tmp_path) as made:
        yield made


PATIENT = {"WFM_LEASE_SECONDS": "10"}
"""For tests in which no lease is to run out, however slow the machine is: so nothing may be repeated."""


def begin(here: Bench, role: Role, *arguments: str, cancel: bool = False, purge: bool = False):
    """A pipeline with something to do for a role, which is played by a victim alone; all others are at work."""
    world = here.world
    world.pipeline("p", [{**STEP, "retention_days": 0 if purge else None}])
    here.start()
    if purge:
        world.register(world.package("a"))
        wait_until(lambda: world.all_covered(1))
        world.register(world.package("a", "changed\n"))
        world.check()
    here.stop(role)
    world.register(world.package("b"), world.package("c"))
    if cancel:
        wait_until(lambda: world.states()["one", "STAGING_DATA"] == 2)
        world.cancel(max(r.id for r in world.runs()))
    return here.victim(role, *arguments)


# --- frozen for longer than its lease ---


@pytest.mark.parametrize(
    ("role", "point"),
    [
        *((role, point) for role in Role for point in ("after-read", "before-publish")),
        *((Role.WORKER, f"after-{kind}") for kind in ("stage", "submit", "collect", "cancel")),
        (Role.RESULT_MANAGER, "after-poll"),
        # with locks in hand that others wait for, until Postgres ends the transaction:
        *((role, "before-commit") for role in Role),
        (Role.WORKER, "before-settle-commit"),
    ],
)
def test_a_frozen_role_is_replaced_and_changes_nothing_when_it_thaws(here, role, point):
    world = here.world
    kind = point.removeprefix("after-")
    zombie = begin(here, role, "--freeze", point, cancel=kind == "cancel")
    wait_until(lambda: zombie.is_frozen, what="frozen")
    held = world.query("SELECT id, kind, run_id, epoch FROM task WHERE state = 'leased' AND kind = :kind", kind=kind)
    here.start(role)
    world.check(repeats=EFFECTS)
    zombie.send(signal.SIGCONT)
    if held:
        texts = ("lost the lease", "came too late")
        wait_until(lambda: any(t in zombie.log.read_text() for t in texts), what="it is told that it is late")
    for task in held:
        (now,) = world.query("SELECT state, epoch, owner FROM task WHERE id = :id", id=task.id)
        assert now.epoch > task.epoch
        assert f":{zombie.pid}:" not in now.owner or kind == "poll"
    world.register(world.package("d"))
    world.check(repeats=EFFECTS)
    zombie.send(signal.SIGTERM)
    assert zombie.wait(10) == 0
    world.check(repeats=EFFECTS)
    assert bool(held) == (kind in {*EFFECTS, "poll"})


def test_a_thawed_role_is_not_heard_while_another_holds_its_task(here):
    zombie = begin(here, Role.WORKER, "--freeze", "after-stage")
    wait_until(lambda: zombie.is_frozen, what="frozen")
    holder = here.victim(Role.WORKER, "--hold", "after-stage")
    wait_until(lambda: holder.came_by("after-stage"), what="the other one has it")
    zombie.send(signal.SIGCONT)
    wait_until(lambda: "came too late" in zombie.log.read_text(), what="its outcome is refused")
    holder.send(signal.SIGKILL)
    here.world.check(repeats=EFFECTS)


def test_a_frozen_job_goes_on_when_it_thaws_and_is_not_repeated(here):
    world = here.world
    world.environ |= {**PATIENT, "WFM_VANISH_GRACE_SECONDS": "0.2"}
    world.config("c", seconds=0.5)
    world.pipeline("p", [{**STEP, "config": "c", "max_retries": 3}])
    here.start()
    world.register(world.package("a"))
    wait_until(lambda: world.states()["one", "RUNNING"] == 1 and world.executions())
    supervisor = int(world.runs()[0].handle.split(":")[0])
    os.kill(supervisor, signal.SIGSTOP)
    polls = "SELECT epoch FROM task WHERE kind = 'poll'"
    (seen,) = world.query(polls)
    wait_until(lambda: world.query(polls)[0].epoch > seen.epoch + 3, what="it was looked at, again and again")
    assert world.states() == {("one", "RUNNING"): 1}
    os.kill(supervisor, signal.SIGCONT)
    assert world.check().completed == 1


# --- told to stop ---

HANDED_BACK = 10.0
"""s after SIGTERM at which a role is gone: this is the promise."""


@pytest.mark.parametrize("kind", ["stage", "submit", "collect", "cancel", "purge", "poll"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_sigterm_in_the_middle_of_a_task_loses_and_repeats_nothing(here, kind, when):
    """The effect takes a little longer than until the signal: it is given up and handed back, or its outcome counts."""
    role = Role.RESULT_MANAGER if kind == "poll" else Role.WORKER
    point = f"{when}-{kind}"
    here.world.environ |= PATIENT
    victim = begin(here, role, "--dawdle", point, cancel=kind == "cancel", purge=kind == "purge")
    wait_until(lambda: victim.came_by(point), what=point)
    victim.send(signal.SIGTERM)
    assert victim.wait(HANDED_BACK) == 0, victim.tail()
    assert not here.world.query("SELECT * FROM task WHERE state = 'leased' AND owner LIKE :me", me=f"%:{victim.pid}:%")
    here.start(role)
    here.world.check()


@pytest.mark.parametrize(("role", "point"), [(Role.WORKER, "after-stage"), (Role.RESULT_MANAGER, "before-poll")])
def test_sigterm_ends_a_role_whose_task_never_returns_and_its_work_is_handed_back(here, role, point):
    here.world.environ |= PATIENT
    victim = begin(here, role, "--hold", point)
    wait_until(lambda: victim.came_by(point), what=point)
    victim.send(signal.SIGTERM)
    assert victim.wait(HANDED_BACK) == 0, victim.tail()
    assert not here.world.query("SELECT * FROM task WHERE state = 'leased' AND owner LIKE :me", me=f"%:{victim.pid}:%")
    here.start(role)
    here.world.check(repeats={"stage"})


@pytest.mark.parametrize(("role", "point"), [(Role.WORKER, "after-stage"), (Role.RESULT_MANAGER, "before-poll")])
def test_a_second_sigterm_ends_a_role_at_once_and_its_leases_run_out(here, role, point):
    victim = begin(here, role, "--hold", point)
    wait_until(lambda: victim.came_by(point), what=point)
    victim.send(signal.SIGTERM)
    wait_until(lambda: f"{role} stops" in victim.log.read_text(), what="it is stopping")
    victim.send(signal.SIGTERM)
    assert victim.wait(HANDED_BACK) == 1, victim.tail()
    here.start(role)
    here.world.check(repeats=EFFECTS)


# --- killed at random ---


@pytest.mark.parametrize("attempt", range(2))
def test_roles_killed_at_random_lose_nothing_and_compute_nothing_twice(here, chance, attempt):
    world = here.world
    world.pipeline("p", [STEP, {"name": "two", "depends_on": ["one"], "group_by": []}])
    victims = {role: here.victim(role) for role in Role}
    for n in range(4):
        world.register(*(world.package(f"a{n}{i}") for i in range(chance.randint(1, 4))))
        for _ in range(chance.randint(1, 3)):
            lines = len(world.ledger.lines()) + chance.randint(0, 6)
            wait_until(lambda lines=lines: len(world.ledger.lines()) >= lines or not pending(world))
            for role in chance.sample(list(Role), chance.choice([1, 1, 2, 4])):
                victims[role].send(signal.SIGKILL)
                assert victims[role].wait() == -9
                victims[role] = here.victim(role)
    report = world.check(repeats=EFFECTS)
    assert report.packages >= 4
    assert report.completed > report.packages


def pending(world):
    return world.query(
        "SELECT 1 FROM run WHERE finished_at IS NULL UNION ALL SELECT 1 FROM event WHERE done_at IS NULL"
    )


# --- clocks that are wrong ---


def _libfaketime() -> Path:
    for path in (
        *Path("/usr/lib").glob("*/faketime/libfaketime.so.1"),
        *Path("/usr/lib").glob("faketime/libfaketime.so.1"),
    ):
        return path
    if os.environ.get("CI"):
        pytest.fail("CI needs libfaketime (Debian: faketime); .ci/run installs it")
    pytest.skip("no libfaketime on this machine (Debian: faketime), so no clock can be wrong")


@pytest.mark.parametrize("role", Role)
def test_clocks_an_hour_fast_and_an_hour_slow(here, role):
    """Two copies of a role whose clocks are two hours apart share the work with three that are right."""
    library = _libfaketime()
    world = here.world
    world.environ |= PATIENT
    world.config("c", seconds=0.1)
    world.pipeline("p", [{**STEP, "config": "c", "max_retries": 1}])
    here.start(*set(Role) - {role})
    real = {"DONT_FAKE_MONOTONIC": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1"}
    now = datetime.now(UTC)
    skewed = [world.spawn(role, LD_PRELOAD=str(library), FAKETIME=f"{h:+d}h", **real) for h in (-1, 1)]
    for n in range(6):
        world.register(world.package(f"a{n}"))
    wait_until(lambda: world.all_covered(6))
    assert world.check().completed == 6
    for process in skewed:
        process.terminate()
        assert process.wait(HANDED_BACK) == 0
    log = (world.directory / f"{role}.log").read_text()
    began = [datetime.fromisoformat(line.split()[0]) for line in log.splitlines() if line.endswith("is at work")]
    assert sorted(round((t - now) / timedelta(hours=1)) for t in began) == [-1, 1], "their clocks were wrong indeed"


# --- killed in the middle of a search ---


@pytest.mark.parametrize("role", Role)
def test_a_role_killed_in_the_middle_of_a_search_costs_time_only(here, role):
    """Nothing of a search is kept but its runs: whoever looks next goes on with them."""
    world = here.world
    world.config("c", chokes_on={"POISON": 1}, seconds=0.2)
    world.pipeline("p", [{"name": "map", "config": "c", "quarantine_at_most": 1}])
    for i in range(1, 9):
        world.register(world.package(f"p{i}", "POISON\n" if i == 6 else ""))
    here.start(*(r for r in Role if r is not role))

    def probes():
        return [r for r in world.runs() if r.probe_of is not None]

    for n in (1, 3):
        victim = here.victim(role)
        wait_until(lambda n=n: len(probes()) >= n, what=f"probe {n}")
        victim.send(signal.SIGKILL)
        victim.wait()
    here.start(role)
    wait_until(lambda: world.all_covered(1), what="the rest is covered")
    report = world.check(repeats=EFFECTS)
    places = [(p.probe["first"], p.probe["last"], p.state) for p in probes() if p.failure != "withdrawn"]
    assert places == [(1, 4, "COMPLETED"), (5, 6, "FAILED"), (5, 5, "COMPLETED"), (6, 6, "FAILED")]
    assert report.runs == 6
    (aside,) = world.query("SELECT k.name FROM quarantine w JOIN raw_data_package k ON k.id = w.package_id")
    assert aside.name == "p6"
