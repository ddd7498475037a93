"""Expected bands: where they are, what is said of a value, since when, and what is refused."""

import math

import pytest

from vitscale.config import from_dict, to_dict
from vitscale.errors import ConfigError
from vitscale.metrics.expect import Band, Expectations, ExpectConfig, Verdict, judge, limits

BAND: Band = ((100, 2.0, 3.0), (200, 1.0, 2.0), (400, 0.5, 1.0))


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, None),
        (99, None),
        (100, (2.0, 3.0)),
        (150, (1.5, 2.5)),
        (200, (1.0, 2.0)),
        (300, (0.75, 1.5)),
        (400, (0.5, 1.0)),
        (401, None),
    ],
)
def test_a_band_is_linear_between_its_steps_and_nowhere_else(
    step: int, expected: tuple[float, float] | None
) -> None:
    assert limits(BAND, step) == expected


def test_a_band_of_one_row_is_at_its_step_alone() -> None:
    assert [limits(((7, 1.0, 2.0),), step) for step in (6, 7, 8)] == [None, (1.0, 2.0), None]


def verdict_on(*points: tuple[int, float]) -> Verdict | None:
    verdict = None
    for step, value in points:
        verdict = judge(BAND, step, value, verdict)
    return verdict


@pytest.mark.parametrize(
    ("points", "text"),
    [
        ([(100, 2.5)], "on track"),
        ([(100, 2.0), (200, 2.0)], "on track"),  # the edges belong to it
        ([(100, 2.5), (200, 2.25), (300, 2.0), (400, 1.31)], "0.31 above the band since step 200"),
        ([(100, 1.5), (200, 0.5), (300, 0.5)], "0.25 below the band since step 100"),
        ([(100, 9.0), (200, 1.5), (300, 2.0)], "0.5 above the band since step 300"),
        ([(100, 9.0), (200, 0.0)], "1 below the band since step 200"),  # from one side to the other
        ([(100, 9.0), (200, 1.5)], "on track"),
        ([(100, math.nan), (200, math.inf)], "not finite since step 100"),
        ([(100, 9.0), (500, 0.0)], "6 above the band since step 100"),  # there is no band at 500
    ],
)
def test_the_verdict_says_how_far_off_and_since_when(points: list[tuple[int, float]], text: str) -> None:
    assert str(verdict_on(*points)) == text


def test_there_is_no_verdict_without_a_value_in_the_band() -> None:
    assert verdict_on((50, 2.0), (500, 2.0)) is None


def test_a_row_is_answered_only_when_a_verdict_changes() -> None:
    state = Expectations(
        ExpectConfig(source="here", bands={"train/loss": BAND, "eval/a/top1": ((100, 0.5, 1.0),)})
    )
    assert state.add(50, {"train/loss": 9.0}) == []
    first = "train/loss: on track, 2.5 at step 100 (expected 2 to 3)"
    assert state.add(100, {"train/loss": 2.5, "epoch": 1.0}) == [first]
    assert state.add(110, {"train/loss": 2.4}) == []
    above = "train/loss: 0.5 above the band since step 200, 2.5 at step 200 (expected 1 to 2)"
    assert state.add(200, {"train/loss": 2.5}) == [above]
    assert state.add(300, {"train/loss": 2.5}) == []
    assert state.sentences() == [
        "train/loss: 1 above the band since step 200, 2.5 at step 300 (expected 0.75 to 1.5)",
        "eval/a/top1: not judged, no value yet within the steps of its band",
    ]


def test_an_empty_band_is_none() -> None:
    state = Expectations(ExpectConfig(source="here", bands={"train/loss": ()}))
    assert state.add(100, {"train/loss": 2.5}) == state.sentences() == []


def test_a_section_reads_back_as_it_is_written() -> None:
    values = {"source": "a run", "bands": {"train/loss": [[0, 2.0, 3.0], [200, 1.0, 2.0]]}}
    assert to_dict(from_dict(ExpectConfig, values)) == values


@pytest.mark.parametrize(
    ("band", "message"),
    [
        ([[100, 2.0, 1.0]], r"expect.bands.train/loss has the row \[100, 2.0, 1.0\]; a step must not be neg"),
        ([[-1, 1.0, 2.0]], r"has the row \[-1, 1.0, 2.0\]"),
        ([[100, 1.0, math.inf]], r"expect.bands.train/loss\[0\]\[2\] must be a finite number, not inf"),
        ([[100, math.nan, 2.0]], r"expect.bands.train/loss\[0\]\[1\] must be a finite number, not nan"),
        ([[100, 1, 2], [100, 1, 2]], "has step 100 after step 100; write its steps in rising order"),
        ([[200, 1, 2], [100, 1, 2]], "has step 100 after step 200"),
        ([[100, 1.0]], r"expect.bands.train/loss\[0\] \[100, 1.0\] must have 3 values, not 2"),
        ([[0.5, 1, 2]], r"expect.bands.train/loss\[0\]\[0\] must be a whole number, not 0.5"),
        ("low", "expect.bands.train/loss must be a list, not 'low'"),
    ],
)
def test_a_band_that_means_nothing_is_refused(band: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(ExpectConfig, {"source": "a run", "bands": {"train/loss": band}}, "expect")


def test_a_band_without_a_source_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"expect\.source is empty: say where the bands come from"):
        from_dict(ExpectConfig, {"bands": {"train/loss": [[1, 1.0, 2.0]]}}, "expect")
