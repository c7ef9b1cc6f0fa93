"""Times of schedules: zones whose clocks are set forward and back, and expressions that are none."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import islice, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wfm.decide import due_text, due_times, schedule_faults
from wfm.model import Schedule


def times(cron: str, zone: str, after: str, n: int = 3) -> list[str]:
    found = islice(due_times(Schedule(cron, zone), datetime.fromisoformat(after)), n)
    return [f"{t:%m-%d %H:%M}" for t in found]


@pytest.mark.parametrize(
    ("cron", "zone", "after", "expected"),
    [
        ("0 6 * * *", "UTC", "2026-03-01T06:00Z", ["03-02 06:00", "03-03 06:00", "03-04 06:00"]),
        # Chile: back on 5 April at 3:00 UTC, forward on 6 September at 4:00 UTC
        ("0 6 * * *", "America/Santiago", "2026-04-03T12:00Z", ["04-04 09:00", "04-05 10:00", "04-06 10:00"]),
        # Berlin: forward on 29 March at 1:00 UTC (2:00 is 3:00), back on 25 October at 1:00 UTC (3:00 is 2:00)
        ("30 2 * * *", "Europe/Berlin", "2026-03-28T00:00Z", ["03-28 01:30", "03-29 01:00", "03-30 00:30"]),
        ("30 2 * * *", "Europe/Berlin", "2026-10-24T00:00Z", ["10-24 00:30", "10-25 00:30", "10-26 01:30"]),
        # in the second half past two it is not half past two again, nor a quarter to three in the past
        ("45 2 * * *", "Europe/Berlin", "2026-10-25T01:30Z", ["10-26 01:45", "10-27 01:45", "10-28 01:45"]),
        # by the hour the hours are as they pass: none is left out, none comes twice
        ("*/30 * * * *", "Europe/Berlin", "2026-10-25T00:00Z", ["10-25 00:30", "10-25 01:00", "10-25 01:30"]),
        ("0 * * * *", "Europe/Berlin", "2026-03-29T00:00Z", ["03-29 01:00", "03-29 02:00", "03-29 03:00"]),
        ("0 12 29 2 *", "UTC", "2026-01-01T00:00Z", ["02-29 12:00", "02-29 12:00", "02-29 12:00"]),
    ],
)
def test_times_in_zones(cron: str, zone: str, after: str, expected: list[str]) -> None:
    assert times(cron, zone, after) == expected


@given(
    st.sampled_from(["Europe/Berlin", "America/Santiago", "Australia/Lord_Howe", "UTC"]),
    st.sampled_from(["30 2 * * *", "*/20 * * * *", "15,45 0-3 * * *", "0 6 * * MON-FRI", "0 0 1 * *"]),
    st.datetimes(datetime(2020, 1, 1), datetime(2030, 1, 1)),
)
def test_times_only_grow_and_are_the_same_from_wherever_one_looks(zone: str, cron: str, start: datetime) -> None:
    after = start.replace(tzinfo=UTC)
    schedule = Schedule(cron, zone)
    found = list(islice(due_times(schedule, after), 6))
    assert [after, *found] == sorted({after, *found})
    for one, following in pairwise(found):
        assert next(due_times(schedule, one)) == following


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule("0 6 * * *", "America/Santiago"), []),
        (Schedule("0 6 * * MON-FRI", "UTC"), []),
        (Schedule("61 * * * *"), [("cron", "is not a cron expression: bad minute")]),
        (Schedule("0 0 30 2 *"), [("cron", "is not a cron expression: bad day-of-month")]),
        (Schedule("0 0 * 2 MON#5/9"), [("cron", "is not a cron expression: bad day-of-week")]),
        (
            Schedule("0 0 6 * * *"),
            [("cron", "has 6 fields; allowed are five: minute, hour, day of month, month, day of week")],
        ),
        (
            Schedule("0 6 * * *", "America/Santigo"),
            [("timezone", "is not a time zone, did you mean 'America/Santiago'?")],
        ),
        (Schedule("0 6 * * *", "../etc"), [("timezone", "is not a time zone such as America/Santiago")]),
        (Schedule("0 6 * * *", ""), [("timezone", "is not a time zone such as America/Santiago")]),
    ],
)
def test_faults(schedule: Schedule, expected: list[tuple[str, str]]) -> None:
    assert list(schedule_faults(schedule)) == expected


def test_a_directory_of_zones_is_none() -> None:
    assert [key for key, _ in schedule_faults(Schedule("0 6 * * *", "America"))] == ["timezone"]


def test_text() -> None:
    due = datetime(2026, 3, 1, 9, tzinfo=UTC)
    assert (
        due_text(Schedule("0 6 * * *", "America/Santiago"), due)
        == "2026-03-01 06:00 America/Santiago (2026-03-01 09:00 UTC)"
    )
    assert due_text(Schedule("0 6 * * *"), due) == "2026-03-01 09:00 UTC"
