"""Where the time of a run went, from what its starts have written down."""

import cProfile
import json
import time
from pathlib import Path

import pytest

from vitscale.metrics import goodput
from vitscale.metrics.goodput import (
    FILE_NAME,
    KINDS,
    MAX_MARKS,
    Ledger,
    Mark,
    Start,
    fractions,
    read_starts,
    summary,
)
from vitscale.progress import Listener, Progress

NOTHING = dict.fromkeys(KINDS, 0.0)


def start(began: float, elapsed: float, done: int, marks: list[tuple[int, float]], **seconds: float) -> Start:
    """A start whose time until each mark (step, elapsed) was 10 s of start, and then steps."""
    made = [Mark(at, until, {"start": 10.0, "step": until - 10.0}) for at, until in marks]
    return Start(began, elapsed, done, {"start": 10.0, **seconds}, made)


def test_what_came_after_the_checkpoint_of_a_resume_is_lost() -> None:
    killed = start(1000.0, 60.0, 9, [(0, 10.0), (6, 40.0)], step=45.0, save=5.0)
    resumed = start(1080.0, 20.0, 8, [(6, 10.0)], step=6.0, data=3.0)
    assert fractions([killed, resumed]) == pytest.approx(
        {**NOTHING, "step": 0.36, "data": 0.03, "start": 0.2, "lost": 0.2, "idle": 0.2, "other": 0.01}
    )


def test_nothing_is_lost_by_a_start_that_ended_with_its_checkpoint() -> None:
    stopped = start(1000.0, 41.0, 6, [(0, 10.0), (6, 40.0)], step=30.0)
    resumed = start(1041.0, 9.0, 6, [(6, 9.0)], step=0.0)
    resumed.seconds = {"start": 9.0}
    parts = fractions([stopped, resumed])
    assert parts["lost"] == parts["idle"] == 0
    assert parts == pytest.approx({**NOTHING, "step": 0.6, "start": 0.38, "other": 0.02})


def test_a_start_that_saved_nothing_is_lost_but_for_its_start() -> None:
    killed = start(1000.0, 50.0, 9, [(5, 10.0)], step=40.0)
    parts = fractions([killed, start(1050.0, 50.0, 9, [(5, 10.0)], step=40.0)])
    assert parts == pytest.approx({**NOTHING, "start": 0.2, "step": 0.4, "lost": 0.4})


def test_the_next_start_drops_what_lies_beyond_its_checkpoint(tmp_path: Path) -> None:
    values = {
        "began": time.time() - 100.0,
        "elapsed": 90.0,
        "step": 9,
        "seconds": {"start": 10.0, "step": 80.0},
    }
    marks = [
        {"step": s, "elapsed": 10.0 + 10 * s, "seconds": {"start": 10.0, "step": 10.0 * s}} for s in range(8)
    ]
    (tmp_path / FILE_NAME).write_text(json.dumps({"starts": [{**values, "marks": marks}]}))
    ledger = Ledger(str(tmp_path), time.time(), writes=True)
    ledger.ready(at := Progress(step=3))
    ledger.ended("step", 0.5)
    at.step += 1
    numbers = ledger.write()
    before, now = map(Start.parse, json.loads((tmp_path / FILE_NAME).read_text())["starts"])
    assert [mark.step for mark in before.marks] == [0, 1, 2, 3] and (now.step, now.marks[0].step) == (4, 3)
    assert 0 <= now.seconds["start"] <= now.elapsed < 60 and now.began + now.elapsed <= time.time()
    whole = now.began + now.elapsed - before.began
    assert numbers["goodput/lost"] == pytest.approx(50.0 / whole) and numbers["run/starts"] == 2
    assert sum(numbers[f"goodput/{kind}"] for kind in KINDS) == pytest.approx(1)


def test_a_start_that_is_long_over_keeps_two_marks(tmp_path: Path) -> None:
    for number in range(4):
        ledger = Ledger(str(tmp_path), time.time(), writes=True)
        ledger.ready(at := Progress(step=3 * number))
        for _ in range(3):
            at.step += 1
            ledger.mark()
        ledger.write()
    starts = [Start.parse(values) for values in json.loads((tmp_path / FILE_NAME).read_text())["starts"]]
    assert [[mark.step for mark in start.marks] for start in starts] == [
        [0, 3], [3, 6], [6, 7, 8, 9], [9, 10, 11, 12],
    ]  # fmt: skip


def test_a_row_costs_as_much_after_many_starts_and_the_file_holds_them_all(tmp_path: Path) -> None:
    costs, ledger = [], None
    for number in range(12):
        if ledger and number % 3 == 2:
            ledger.rolled_back()
        else:
            ledger = Ledger(str(tmp_path), time.time() - 10.0, writes=True)
        ledger.ready(at := Progress(step=3 * number))
        ledger.ended("step", 0.1)
        at.step += 4  # one of them is lost
        ledger.mark()
        with cProfile.Profile() as profile:
            numbers = ledger.write()
        costs.append(sum(entry.callcount for entry in profile.getstats()))
        text = (tmp_path / FILE_NAME).read_text()
        assert text == json.dumps(json.loads(text)) + "\n"
        starts = read_starts(tmp_path / FILE_NAME)
        assert len(starts) == numbers["run/starts"] == number + 1
        assert {name: numbers[f"goodput/{name}"] for name in KINDS} == fractions(starts)
    assert len(set(costs[1:])) == 1


def test_of_a_start_beyond_the_checkpoint_its_own_start_remains(tmp_path: Path) -> None:
    marks = [{"step": s, "elapsed": 10.0 * s, "seconds": {"start": 10.0}} for s in (5, 6)]
    values = {"began": 0.0, "elapsed": 90.0, "step": 9, "seconds": {}, "marks": marks}
    (tmp_path / FILE_NAME).write_text(json.dumps({"starts": [values]}))
    ledger = Ledger(str(tmp_path), time.time(), writes=True)
    ledger.ready(Progress(step=3))
    # It may be killed before its first row.
    before, now = map(Start.parse, json.loads((tmp_path / FILE_NAME).read_text())["starts"])
    assert [mark.step for mark in before.marks] == [5] and [mark.step for mark in now.marks] == [3]


def test_a_file_that_was_torn_or_is_none_of_ours_begins_anew(tmp_path: Path) -> None:
    mark = '{"step": 0, "elapsed": 1.0, "seconds": {"x": 1.0}}'  # a kind of a later version
    later = f'{{"starts": [{{"began": 1.0, "marks": [{mark}]}}]}}'
    for text in ("", '{"starts": [{"began": 1', "[]", '{"starts": [{"step": 3}]}', later):
        (tmp_path / FILE_NAME).write_text(text)
        ledger = Ledger(str(tmp_path), 0.0, writes=True)
        ledger.ready(Progress())
        assert ledger.write()["run/starts"] == 1


class Clock:
    """Stands in for the module `time`: both clocks go on as they are told."""

    def __init__(self) -> None:
        self.wall, self.steady = 1000.0, 0.0

    def time(self) -> float:
        return self.wall

    def perf_counter(self) -> float:
        return self.steady

    def go_on(self, seconds: float) -> None:
        self.wall, self.steady = self.wall + seconds, self.steady + seconds


class Timed:
    """A ledger whose clock is set by what the run does; a start takes 10 s, a step 1 s."""

    def __init__(self, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run_dir, self.clock = run_dir, Clock()
        monkeypatch.setattr(goodput, "time", self.clock)

    def start(self, step: int) -> None:
        self.ledger = Ledger(str(self.run_dir), self.clock.time(), writes=True)
        self.clock.go_on(10.0)
        self.ledger.ready(at := Progress(step=step))
        self.at = at

    def phase(self, name: str, seconds: float) -> None:
        self.clock.go_on(seconds)
        self.ledger.ended(name, seconds)

    def steps(self, number: int) -> None:
        for _ in range(number):
            self.phase("step", 1.0)
            self.at.step += 1

    def save(self) -> None:
        self.phase("save", 1.0)
        self.ledger.mark()


@pytest.fixture
def timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Timed:
    return Timed(tmp_path, monkeypatch)


def seconds_of(starts: list[Start]) -> dict[str, float]:
    whole = starts[-1].began + starts[-1].elapsed - starts[0].began
    return {kind: part * whole for kind, part in fractions(starts).items() if part}


def test_a_step_that_is_taken_back_leaves_the_save_after_it_where_the_run_is(timed: Timed) -> None:
    timed.start(0)
    timed.steps(20)
    timed.phase("data", 2.0)
    timed.phase("step", 1.0)  # stopped while it waited for data: the run has not advanced
    timed.save()
    timed.ledger.write()
    timed.start(20)
    timed.steps(5)
    timed.ledger.write()
    assert seconds_of(read_starts(timed.run_dir / FILE_NAME)) == pytest.approx(
        {"start": 20.0, "step": 26.0, "data": 2.0, "save": 1.0}
    )


@pytest.mark.parametrize("row_after_save", [False, True])
def test_a_kill_between_a_save_and_the_next_row_loses_what_came_after_the_save(
    timed: Timed, row_after_save: bool
) -> None:
    timed.start(0)
    timed.steps(20)
    timed.ledger.write()
    timed.save()
    timed.steps(3)
    if row_after_save:
        timed.ledger.write()
    timed.start(20)
    timed.ledger.write()
    lost = {"save": 1.0, "lost": 3.0} if row_after_save else {"idle": 4.0}
    assert seconds_of(starts := read_starts(timed.run_dir / FILE_NAME)) == pytest.approx(
        {"start": 20.0, "step": 20.0, **lost}
    )
    assert [start.step for start in starts] == [23 if row_after_save else 20, 20]


def test_what_a_start_did_after_its_last_save_keeps_its_kind(timed: Timed) -> None:
    timed.start(0)
    timed.steps(5)
    timed.save()
    timed.phase("save", 60.0)  # it waits until the save is written
    timed.ledger.write()
    timed.start(5)
    timed.ledger.write()
    assert seconds_of(read_starts(timed.run_dir / FILE_NAME)) == pytest.approx(
        {"start": 20.0, "step": 5.0, "save": 61.0}
    )


def test_an_evaluation_after_the_save_of_its_step_is_not_lost_with_the_steps_after_it(timed: Timed) -> None:
    timed.start(0)
    timed.steps(5)
    timed.save()
    timed.phase("evaluate", 30.0)
    timed.ledger.mark()
    timed.steps(3)
    timed.ledger.write()
    timed.start(5)
    timed.ledger.write()
    starts = read_starts(timed.run_dir / FILE_NAME)
    assert seconds_of(starts) == pytest.approx(
        {"start": 20.0, "step": 5.0, "save": 1.0, "evaluate": 30.0, "lost": 3.0}
    )
    assert [mark.step for mark in starts[0].marks] == [0, 5]


@pytest.mark.parametrize("jump", [-3600.0, 3600.0])
def test_a_clock_that_is_set_during_a_start_changes_no_part(timed: Timed, jump: float) -> None:
    timed.start(0)
    timed.steps(10)
    timed.clock.wall += jump
    timed.steps(10)
    numbers = timed.ledger.write()
    assert (numbers["goodput/start"], numbers["goodput/step"]) == pytest.approx((1 / 3, 2 / 3))


def test_a_clock_that_is_behind_the_launcher_counts_no_negative_start(timed: Timed) -> None:
    timed.ledger = Ledger(str(timed.run_dir), timed.clock.time() + 600.0, writes=True)
    timed.ledger.ready(Progress())
    (start,) = read_starts(timed.run_dir / FILE_NAME)
    assert (start.elapsed, start.seconds) == (0.0, {"start": 0.0})


def test_the_line_names_what_is_worth_it() -> None:
    numbers = {f"goodput/{kind}": 0.0 for kind in KINDS} | {"goodput/step": 0.913, "goodput/lost": 0.087}
    assert summary(numbers) == "91.3% steps, 8.7% lost work"


def test_it_listens_to_the_loop(tmp_path: Path) -> None:
    assert isinstance(Ledger(str(tmp_path), 0.0, writes=False), Listener)


def test_phases_of_a_kind_add_up_and_few_marks_are_kept(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path), time.time(), writes=True)
    ledger.ready(at := Progress())
    for seconds in (0.5, 0.25):
        ledger.ended("step", seconds)
        at.step += 1
    for _ in range(MAX_MARKS + 4):
        ledger.mark()
        at.step += 1
    ledger.write()
    (start,) = map(Start.parse, json.loads((tmp_path / FILE_NAME).read_text())["starts"])
    assert start.seconds["step"] == 0.75
    # That of its own beginning, and the newest.
    assert [mark.step for mark in start.marks] == [0, *range(6, MAX_MARKS + 6)]
