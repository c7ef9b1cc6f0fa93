"""The proxy does what it says, to real servers: else the tests that use it would show nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import redis
from sqlalchemy import Engine, NullPool, create_engine, text
from sqlalchemy.exc import OperationalError

from tests.faults import proxy
from tests.faults.proxy import PostgresProxy, RedisProxy
from tests.harness import wait_until
from wfm.bus import connect

STREAM = "wfm:{1}:job.built"


@pytest.fixture
def pg(database: str) -> Iterator[PostgresProxy]:
    with PostgresProxy(database) as p:
        yield p


@pytest.fixture
def direct(database: str) -> Iterator[Engine]:
    engine = create_engine(database, poolclass=NullPool)
    with engine.begin() as c:
        c.execute(text("CREATE TABLE public.t (n int)"))
    yield engine
    engine.dispose()


@pytest.fixture
def through(pg: PostgresProxy, direct: Engine) -> Iterator[Engine]:
    engine = create_engine(pg.url, poolclass=NullPool)
    yield engine
    engine.dispose()


@pytest.fixture
def rd(redis_url: str) -> Iterator[RedisProxy]:
    with RedisProxy(redis_url) as p:
        yield p


def insert(engine: Engine, n: int) -> None:
    with engine.begin() as c:
        c.execute(text("INSERT INTO public.t VALUES (:n)"), {"n": n})


def rows(engine: Engine) -> list[int]:
    with engine.begin() as c:
        return list(c.execute(text("SELECT n FROM public.t ORDER BY n")).scalars())


# --- Postgres ---


def test_a_commit_whose_reply_is_lost_is_committed_although_the_client_sees_an_error(pg, direct, through):
    rule = pg.lose_replies("COMMIT", skip=1, times=1)
    insert(through, 1)
    with pytest.raises(OperationalError):
        insert(through, 2)
    insert(through, 3)
    assert rows(direct) == [1, 2, 3]
    assert rule.hits == 1


def test_a_commit_that_is_lost_itself_is_not_committed(pg, direct, through):
    pg.lose_requests("COMMIT", times=1)
    with pytest.raises(OperationalError):
        insert(through, 1)
    insert(through, 2)
    assert rows(direct) == [2]


def test_commits_that_changed_nothing_and_rollbacks_are_not_counted(pg, direct, through):
    rule = pg.lose_replies("COMMIT")
    assert rows(through) == []
    with through.connect() as c:
        c.execute(text("INSERT INTO public.t VALUES (1)"))
        c.rollback()
        c.execute(text("SELECT 1"))
        c.commit()
    assert rule.hits == 0
    with pytest.raises(OperationalError):
        insert(through, 2)
    assert rows(direct) == [2]


def test_a_seed_gives_the_same_choice_again(pg, direct, through):
    def survivors(first: int) -> list[bool]:
        rule = pg.lose_replies("COMMIT", p=0.5, seed=7)
        kept = []
        for n in range(first, first + 12):
            hits = rule.hits
            try:
                insert(through, n)
            except OperationalError:
                assert rule.hits == hits + 1
            kept.append(rule.hits == hits)
        pg.heal()
        return kept

    one = survivors(0)
    assert one == survivors(100)
    assert True in one
    assert False in one
    assert len(rows(direct)) == 24


def test_refused_and_cut_and_healed(pg, direct, through):
    with through.connect() as c:
        c.execute(text("SELECT 1"))
        pg.cut()
        with pytest.raises(OperationalError):
            c.execute(text("SELECT 1"))
    pg.refuse()
    with pytest.raises(OperationalError):
        insert(through, 1)
    pg.heal()
    insert(through, 2)
    assert rows(direct) == [2]


def test_what_is_held_in_a_black_hole_arrives_when_it_is_healed(pg, direct, through):
    insert(through, 1)
    pg.stall()
    client = threading.Thread(target=insert, args=(through, 2))
    client.start()
    client.join(0.2)
    assert client.is_alive()
    assert rows(direct) == [1]
    pg.heal()
    client.join(30)
    assert rows(direct) == [1, 2]


def test_large_messages_and_many_connections_pass(pg, direct, through):
    def work() -> None:
        with through.begin() as c:
            assert len(c.execute(text("SELECT repeat('x', 3000000)")).scalar_one()) == 3_000_000
            c.execute(text("INSERT INTO public.t SELECT length(:x)"), {"x": "y" * 2_000_000})

    threads = [threading.Thread(target=work) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert rows(direct) == [2_000_000] * 8
    assert pg.seen["INSERT"] == 8


# --- Redis ---


def test_a_command_whose_reply_is_lost_was_executed(rd, redis_url):
    client, direct = connect(rd.url, {}), redis.Redis.from_url(redis_url)
    rule = rd.lose_replies("XADD", skip=1, times=1)
    client.xadd(STREAM, {"event": b"1"})
    with pytest.raises(redis.ConnectionError):
        client.xadd(STREAM, {"event": b"2"})
    client.xadd(STREAM, {"event": b"3"})
    assert direct.xlen(STREAM) == 3
    assert rule.hits == 1
    client.close()
    direct.close()


def test_a_command_that_is_lost_itself_was_not(rd, redis_url):
    client, direct = connect(rd.url, {}), redis.Redis.from_url(redis_url)
    rd.lose_requests("XADD", times=1)
    with pytest.raises(redis.ConnectionError):
        client.xadd(STREAM, {"event": b"1"})
    assert direct.xlen(STREAM) == 0
    client.close()
    direct.close()


def test_in_a_pipeline_the_reply_of_one_is_lost_and_all_were_executed(rd, redis_url):
    client, direct = connect(rd.url, {}), redis.Redis.from_url(redis_url)
    direct.xgroup_create(STREAM, "g", id="0", mkstream=True)
    ids = [direct.xadd(STREAM, {"event": b"x"}) for _ in range(3)]
    lost = rd.lose_replies("XREADGROUP", times=1)
    assert client.xreadgroup("g", "me", {STREAM: "0"}) == [[STREAM.encode(), []]]
    assert lost.hits == 0, "a reply without entries is no loss"
    with pytest.raises(redis.ConnectionError):
        client.xreadgroup("g", "me", {STREAM: ">"})
    assert direct.xpending(STREAM, "g")["pending"] == 3
    rd.lose_replies("XACK", times=1)
    pipe = client.pipeline(transaction=False)
    pipe.xack(STREAM, "g", *ids).xdel(STREAM, *ids).xadd(STREAM, {"event": b"y"})
    with pytest.raises(redis.ConnectionError):
        pipe.execute()
    wait_until(lambda: direct.xpending(STREAM, "g")["pending"] == 0)
    client.close()
    direct.close()


@pytest.mark.parametrize("protocol", [2, 3])
def test_commands_answered_with_errors_are_not_executed_and_others_are(rd, redis_url, protocol):
    client, direct = connect(rd.url, {"protocol": protocol}), redis.Redis.from_url(redis_url)
    rule = rd.answer(proxy.READONLY, *proxy.WRITES)
    client.get("a")
    pipe = client.pipeline(transaction=False).xadd(STREAM, {"event": b"x"}).xlen(STREAM)
    refused, length = pipe.execute(raise_on_error=False)
    assert isinstance(refused, redis.exceptions.ReadOnlyError)
    assert length == 0
    assert rule.hits == 1
    with pytest.raises(redis.ResponseError):
        client.pipeline(transaction=True).set("a", 1).get("a").execute()
    assert direct.get("a") is None
    rd.heal()
    assert client.pipeline(transaction=True).set("a", 1).get("a").execute() == [True, b"1"]
    client.close()
    direct.close()


def test_a_blocked_read_lets_others_pass_and_a_black_hole_nobody(rd, redis_url):
    client = connect(rd.url, {}, timeout=0.3)
    rd.stall()
    with pytest.raises(redis.TimeoutError):
        client.ping()
    rd.heal()
    assert client.ping()
    rd.refuse()
    with pytest.raises(redis.ConnectionError):
        client.ping()
    rd.heal()
    assert client.ping()
    client.close()


@pytest.mark.parametrize("protocol", [2, 3])
def test_all_kinds_of_values_pass(rd, protocol):
    client = connect(rd.url, {"protocol": protocol})
    big = b"\r\n$5\r\n" * 1_000_000
    client.set("big", big)
    assert client.get("big") == big
    client.hset("h", mapping={"a": "1", "b": "2"})
    assert client.hgetall("h") == {b"a": b"1", b"b": b"2"}
    client.zadd("z", {"m": 1.5})
    assert client.zscore("z", "m") == 1.5
    assert client.get("nothing") is None
    assert client.smembers("nobody") == set()
    assert client.execute_command("XINFO", "HELP")
    assert client.info("server")
    client.close()
