"""What is due after a step: every rule of the loop, tested without a process."""

import pytest

from vitscale.progress import Due, Phases, Progress

EVERY = {"log_every": 4, "save_every": 6, "evaluate_every": {"few": 3, "val": 100}}


def due(step: int, total_steps: int = 20, *, stopping: bool = False, **changes: object) -> Due:
    return Due.after(step, total_steps, stopping=stopping, **{**EVERY, **changes})


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, Due(log=False, evaluate=("few", "val"), save=False, end=False)),  # the line to beat
        (1, Due(log=True, evaluate=(), save=False, end=False)),  # the first step
        (2, Due(log=False, evaluate=(), save=False, end=False)),
        (3, Due(log=False, evaluate=("few",), save=False, end=False)),
        (4, Due(log=True, evaluate=(), save=False, end=False)),
        (6, Due(log=False, evaluate=("few",), save=True, end=False)),
        (12, Due(log=True, evaluate=("few",), save=True, end=False)),
        (19, Due(log=False, evaluate=(), save=False, end=False)),
        (20, Due(log=True, evaluate=("few", "val"), save=True, end=True)),  # the last step
    ],
)
def test_each_thing_is_due_at_its_own_steps(step: int, expected: Due) -> None:
    assert due(step) == expected


def test_a_run_that_is_stopped_logs_and_saves_and_evaluates_nothing_more() -> None:
    assert due(2, stopping=True) == Due(log=True, evaluate=(), save=True, end=True)
    assert due(3, stopping=True).evaluate == ("few",)


@pytest.mark.parametrize(("step", "save"), [(6, False), (12, False), (19, False), (20, True)])
def test_without_a_period_a_run_saves_at_its_end_alone(step: int, save: bool) -> None:
    assert due(step, save_every=0).save is save


def test_a_period_of_one_step_is_every_step() -> None:
    for step in (1, 2, 3):
        assert due(step, log_every=1, save_every=1).save and due(step, log_every=1, save_every=1).log


def test_a_step_consumes_one_batch() -> None:
    progress = Progress(step=3, data_step=5, samples_seen=48, bad_samples=2)
    progress.advance(8)
    assert progress == Progress(step=4, data_step=6, samples_seen=56, bad_samples=2)


def test_what_a_run_has_read_before_it_was_rolled_back_is_passed_over() -> None:
    progress = Progress(step=3, data_step=5, samples_seen=24, bad_samples=2, rollbacks=1)
    before = Progress(step=14, data_step=16, samples_seen=112, bad_samples=4, rollbacks=1, healthy=False)
    progress.pass_over(before)
    assert progress == Progress(step=3, data_step=16, samples_seen=24, bad_samples=4, rollbacks=2)


class Recorder:
    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.seconds = 0.0

    def started(self, phase: str) -> None:
        self.events.append(("started", phase))

    def ended(self, phase: str, seconds: float) -> None:
        self.events.append(("ended", phase))
        self.seconds = seconds


def test_every_listener_hears_of_every_phase_in_order() -> None:
    recorders = [Recorder(), Recorder()]
    phases = Phases(*recorders)
    for phase in ("data", "step"):
        with phases(phase):
            assert recorders[0].events[-1] == ("started", phase)
    for recorder in recorders:
        assert recorder.events == [
            ("started", "data"),
            ("ended", "data"),
            ("started", "step"),
            ("ended", "step"),
        ]
        assert recorder.seconds > 0


def test_a_phase_that_fails_has_started_and_not_ended() -> None:
    recorder = Recorder()
    with pytest.raises(KeyError), Phases(recorder)("step"):
        raise KeyError
    assert recorder.events == [("started", "step")]
