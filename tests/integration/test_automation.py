"""The door for other systems, as its page describes it: the page's own program under the page's own rights."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import redis
import yaml
from click.testing import CliRunner
from redis.exceptions import NoPermissionError

from tests.harness import World, wait_until
from wfm.cli import wfm
from wfm.embedded import Embedded
from wfm.events import TYPES
from wfm.views import verify

TOP = Path(__file__).parents[2]
PAGE = TOP / "docs" / "how-to" / "automation.md"
PROGRAM = TOP / "docs" / "how-to" / "automation_example.py"
SCHEMA = TOP / "docs" / "reference" / "events.yaml"
ONE = [{"name": "one", "group_by": ["executed_obs_unit"]}]


# --- rights ---


@pytest.fixture
def guarded():
    """The socket of a Valkey of our own, and its administrator; users are as the page makes them."""
    with tempfile.TemporaryDirectory(prefix="wfm-acl-") as directory:
        socket = Path(directory, "v.sock")
        program = Embedded(Path(directory))._servers[1].program
        words = {"port": "0", "unixsocket": socket, "save": "", "appendonly": "no", "dir": directory, "logfile": "log"}
        process = subprocess.Popen([program, *(str(w) for k, v in words.items() for w in (f"--{k}", v))])
        admin = redis.Redis(unix_socket_path=str(socket))
        try:
            wait_until(lambda: socket.exists() and admin.ping(), what="Valkey answers")
            lines = re.findall(r"^ACL SETUSER .*$", PAGE.read_text(), re.MULTILINE)
            for line in lines:
                admin.execute_command(*shlex.split(line.replace(">PASSWORD", ">secret")))
            assert set(admin.acl_users()) == {"default", "quicklook", "wfm"}
            yield socket, admin
        finally:
            admin.close()
            process.terminate()
            process.wait(timeout=20)


def address(socket, user):
    return f"unix://{user}:secret@{socket}?db=0"


@pytest.mark.parametrize(
    "words",
    [
        "XADD wfm:{1}:events * event x",
        "XADD wfm:{1}:job.built * event x",
        "XADD other * event x",
        "XREADGROUP GROUP quicklook me STREAMS wfm:{1}:data.arrived >",
        "XGROUP CREATE wfm:{1}:data.arrived g 0 MKSTREAM",
        "XGROUP DESTROY wfm:{1}:events trigger-manager",
        "XRANGE wfm:{1}:data.arrived - +",
        "XTRIM wfm:{1}:events MAXLEN 0",
        "GET wfm:{1}:life",
        "DEL wfm:{1}:events",
        "KEYS *",
        "FLUSHALL",
        "CONFIG GET *",
        "ACL LIST",
        "SUBSCRIBE x",
    ],
)
def test_the_other_system_may_do_nothing_else(guarded, words):
    socket, _ = guarded
    with redis.Redis.from_url(address(socket, "quicklook")) as client, pytest.raises(NoPermissionError):
        client.execute_command(*words.split())


def test_the_roles_may_touch_no_key_of_others_and_not_administer(guarded):
    socket, _ = guarded
    with redis.Redis.from_url(address(socket, "wfm")) as client:
        for words in ("SET other x", "XADD wfm:{2}:events * event x", "FLUSHDB", "KEYS *", "ACL LIST", "EVAL x 0"):
            with pytest.raises(NoPermissionError):
                client.execute_command(*words.split())


# --- the program ---


class Quicklook:
    """The page's program as a process; `seen` are the ids of the events that it reacted to."""

    def __init__(self, world: World, socket: Path) -> None:
        self.out = world.directory / "quicklook.out"
        self.cursor = world.directory / "quicklook.cursor"
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        own = {"QUICKLOOK_REDIS_URL": address(socket, "quicklook"), "PATH": path}
        self.env = {**os.environ, **world.environ, "WFM_REDIS_URL": "redis://nobody.invalid", **own}

    def __enter__(self) -> subprocess.Popen[bytes]:
        with self.out.open("ab") as out:
            words = [sys.executable, PROGRAM, self.cursor]
            self.process = subprocess.Popen(words, env=self.env, stdout=out, start_new_session=True)
        return self.process

    def __exit__(self, *_: object) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)  # also the command that it may be waiting for
        self.process.wait()

    @property
    def seen(self) -> list[int]:
        return [int(line.split()[0]) for line in self.out.read_text().splitlines()]


@pytest.fixture
def world(database, guarded, tmp_path):
    socket, _ = guarded
    world = World(tmp_path, database, address(socket, "wfm"))
    world.environ |= {"WFM_PUBLIC_STREAM_MAX_LENGTH": "5"}
    yield world
    world.close()


def assert_quiet(world, socket):
    """As the administrator, who may look at everything."""
    world.environ["WFM_REDIS_URL"] = f"unix://{socket}?db=0"
    world.rest()


def results(world):
    rows = world.query("SELECT id FROM event WHERE type = 'run.collected' ORDER BY txid, id")
    return [r.id for r in rows]


def test_the_pages_program_misses_nothing_while_redis_is_emptied_and_trimmed_and_itself_is_killed(world, guarded):
    _, admin = guarded
    quicklook = Quicklook(world, guarded[0])
    world.pipeline("p", ONE)

    def process(*names):
        """Runs of these packages, and a world that has come to rest."""
        before = len(results(world))
        world.register(*(world.package(n) for n in names))
        wait_until(lambda: len(results(world)) == before + len(names))

    def caught_up():
        wait_until(lambda: quicklook.seen == results(world), what="it saw each result once, in the order of the log")

    with world.roles():
        process("a", "b")  # before it exists
        with quicklook:
            caught_up()
            process("c")
            caught_up()
            admin.flushall()
            process("d", "e")
            admin.flushall()
            caught_up()
            os.kill(quicklook.process.pid, signal.SIGSTOP)
            process("f", "g")
            admin.xtrim("wfm:{1}:events", maxlen=0, approximate=False)
            os.kill(quicklook.process.pid, signal.SIGCONT)
            process("h")
            caught_up()
        process("i", "j")
        admin.flushall()
        with quicklook:
            caught_up()
            # Killed in the middle, it may do the one again that it was at; it misses none.
            world.register(*(world.package(f"m{n}") for n in range(6)))
            wait_until(lambda: len(quicklook.seen) > 10)
        with quicklook:
            wait_until(lambda: len(results(world)) == 16 and set(quicklook.seen) == set(results(world)))
        assert len(quicklook.seen) <= 17
        assert_quiet(world, guarded[0])
    assert {g["name"] for g in admin.xinfo_groups("wfm:{1}:events")} == {b"quicklook"}
    with world.store.begin() as tx:
        assert verify(tx.conn, tx.charts).faults == []


def test_what_the_program_announces_becomes_a_run(world, guarded):
    """The follow-up is in the catalogue, and no event told of it; nothing else would find it for minutes."""
    world.pipeline("p", ONE)
    with world.roles():
        world.register(world.package("a"))
        wait_until(lambda: world.all_covered(1))
        with world.store.begin() as tx:  # as its archive does it, which knows nothing of events
            tx.run(
                "INSERT INTO raw_data_package (name, executed_obs_unit_id, instrument_module_id, size, item)"
                " SELECT 'follow-up-a', executed_obs_unit_id, instrument_module_id, size, item + 1"
                " FROM raw_data_package"
            )
            tx.run(
                "INSERT INTO raw_data_file (package_id, name, size, checksum)"
                " SELECT (SELECT max(id) FROM raw_data_package), name, size, checksum FROM raw_data_file"
            )
            tx.run(
                "INSERT INTO physical_copy (location_id, package_id, path)"
                " SELECT location_id, (SELECT max(id) FROM raw_data_package), path FROM physical_copy"
                " WHERE package_id IS NOT NULL"
            )
        with Quicklook(world, guarded[0]):
            wait_until(lambda: world.states()["one", "COMPLETED"] == 2, what="the follow-up was processed")
        assert_quiet(world, guarded[0])


# --- the schema ---


def test_the_schema_page_is_what_the_structs_say():
    made = CliRunner().invoke(wfm, ["events", "schema"])
    assert made.output == SCHEMA.read_text(), "run: wfm events schema > docs/reference/events.yaml"


def test_every_event_and_every_field_is_described():
    document = yaml.safe_load(SCHEMA.read_text())
    assert json.loads(CliRunner().invoke(wfm, ["events", "schema", "--json"]).output) == document
    assert set(document["components"]["messages"]) == set(TYPES)
    for name, kind in TYPES.items():
        schema = document["components"]["schemas"][kind.__name__]
        assert set(schema["properties"]) == {"type", *kind.__struct_fields__}
        assert [f for f, p in schema["properties"].items() if "description" not in p] == ["type"], name
    public = set(document["channels"]["events"]["messages"])
    assert public == {name for name, kind in TYPES.items() if kind.durable}
    references = re.findall(r"\$ref: '#/([a-z]+)/([A-Za-z.]+)(?:/([A-Za-z.]+))?'", SCHEMA.read_text())
    for section, first, second in references:
        assert (document[section][first][second] if second else document[section][first]) is not None
