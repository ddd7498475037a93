"""Tables and times as people read them."""

import datetime

import pytest
from checkpoint_tool import NOW

from vitscale.report import text


def test_a_table_is_as_wide_as_it_needs_to_be() -> None:
    assert text.table(("a", "long"), [("xyz", "1"), ("x", "22")], left=(0,)) == [
        "a    long",
        "xyz     1",
        "x      22",
    ]


@pytest.mark.parametrize(
    ("created", "age"),
    [
        ("2026-01-02T05:04:00+00:00", "5 s"),
        ("2026-01-02T04:00:00+00:00", "64 min"),
        ("2026-01-01T04:00:00+00:00", "25 h"),
        ("2025-12-31T05:04:06+00:00", "48 h"),
        ("2025-12-31T05:04:05+00:00", "2 d"),
        ("2026-01-02T06:00:00+00:00", "0 s"),  # a clock that is ahead of ours
        ("2025-12-20T04:00:00+00:00", "13 d"),
    ],
)
def test_ages_are_in_the_unit_that_people_would_use(created: str, age: str) -> None:
    moment = datetime.datetime.fromisoformat(created).astimezone()
    assert text.when(created, NOW) == (f"{moment:%Y-%m-%d %H:%M}", age)


@pytest.mark.parametrize("created", ["now", "0001-01-01T00:00:00+23:59"])
def test_a_time_that_is_none_is_shown_as_it_is(created: str) -> None:
    assert text.when(created, NOW) == (created, "")
