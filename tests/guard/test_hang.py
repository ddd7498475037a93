"""Whether a job hangs, for whom, and what is said of it."""

import math

import pytest

from vitscale.guard.config import GuardConfig
from vitscale.guard.hang import Answer, Place, ranges, screen, sentence, waited_for
from vitscale.guard.watch import Watch
from vitscale.guard.watchdog import Watchdog
from vitscale.progress import Progress


def at(step: int, phase: str, seconds: float, limit: float = 300.0) -> Place:
    return Place(step, phase, seconds, limit)


@pytest.mark.parametrize(
    ("places", "silent", "behind"),
    [
        # Nobody is beyond its limit.
        ([at(8, "step", 299), at(8, "step", 300)], [], []),
        # All are in the same collective: nobody can say for whom they wait.
        ([at(8, "step", 301), at(8, "step", 301)], [], [0, 1]),
        # One of them is there for less time; it may be the one that still computes.
        ([at(8, "step", 301), at(8, "step", 299)], [], []),
        # Rank 1 waits for a batch, and may do so for longer than a step may take.
        ([at(8, "step", 301), at(8, "data", 302, 600)], [], []),
        ([at(8, "step", 600), at(8, "data", 601, 600)], [], [1]),
        # It does not answer: there is no reason to wait for its own limit.
        ([at(8, "step", 301), at(8, "data", 302, 600)], [1], [1]),
        ([at(8, "step", 299), at(8, "data", 300, 600)], [1], []),
        # A rank that does not answer, but is not the one that the others wait for.
        ([at(8, "step", 301), at(8, "data", 302, 600)], [0], []),
        # After a step come its log, evaluation and save; then the data of the next one.
        ([at(9, "data", 601, 600), at(9, "save", 601, 3600)], [], []),
        ([at(9, "data", 3601, 600), at(9, "evaluate", 3601, 3600)], [], [1]),
        ([at(9, "save", 3601, 3600), at(9, "log", 3601)], [], [1]),
        ([at(9, "log", 301), at(8, "step", 302)], [], [1]),
        ([at(0, "evaluate", 3601, 3600), at(0, "start", 1801, 1800)], [], [1]),
        ([at(8, "step", 1e9, math.inf), at(8, "step", 1e9, math.inf)], [], []),
    ],
)
def test_the_job_hangs_for_the_ranks_that_are_furthest_behind(
    places: list[Place], silent: list[int], behind: list[int]
) -> None:
    assert waited_for(dict(enumerate(places)), silent) == behind


STEP = ("vitscale/train.py:112 loop", "torch/distributed/distributed_c10d.py:3000 all_reduce")
READ = ("vitscale/train.py:104 loop", "vitscale/data/loader.py:90 read")
PROCESSES = {rank: f"process {4000 + rank} on c{rank // 2}" for rank in range(64)}


def test_one_sentence_names_the_rank_and_what_the_others_do() -> None:
    answers = {rank: Answer(at(811, "step", 590.0), STEP) for rank in range(64) if rank != 41}
    answers[41] = Answer(at(811, "data", 604.0, 600.0), READ)
    assert sentence(answers, {}, PROCESSES) == (
        "the job hangs: rank 41 (process 4041 on c20) has been in the phase 'data' of step 812 for 604 s, in "
        "read; 63 other ranks wait, in all_reduce; the same command resumes from the newest checkpoint"
    )
    assert screen(answers).splitlines() == [
        "  ranks 0-40, 42-63: 811 steps done, in 'step'",
        "    vitscale/train.py:112 loop",
        "    torch/distributed/distributed_c10d.py:3000 all_reduce",
        "  rank 41: 811 steps done, in 'data'",
        "    vitscale/train.py:104 loop",
        "    vitscale/data/loader.py:90 read",
    ]


def test_of_ranks_in_one_phase_those_in_another_function_are_named() -> None:
    answers = {rank: Answer(at(811, "step", 304.0), STEP) for rank in range(8)}
    answers[5] = Answer(at(811, "step", 304.0), (*STEP[:1], "vitscale/models/vit.py:90 forward"))
    assert (
        "rank 5 (process 4005 on c2) has been in the phase 'step' of step 812 for 304 s, in forward; 7 "
        in (sentence(answers, {}, PROCESSES))
    )
    two = {rank: answers[rank] for rank in (5, 6)}
    assert "ranks 5-6 have been" in sentence(two, {}, PROCESSES) and "in all_reduce or forward;" in sentence(
        two, {}, PROCESSES
    )


def test_of_a_rank_without_an_answer_the_kernel_speaks() -> None:
    answers = {0: Answer(at(3, "step", 301.0), STEP), 1: Answer(at(3, "step", 330.0), ())}
    said = sentence(answers, {1: "T (stopped), in stop"}, PROCESSES)
    assert said == (
        "the job hangs: rank 1 (process 4001 on c0) has been in the phase 'step' of step 4 for 330 s; it "
        "does not answer; the kernel says: T (stopped), in stop; 1 other rank waits, in all_reduce; the same "
        "command resumes from the newest checkpoint"
    )
    assert "it does not answer; 1 other rank waits" in sentence(answers, {1: ""}, PROCESSES)
    assert screen(answers).splitlines()[-1] == "    no answer"


def test_ranks_that_hang_together_are_named_together() -> None:
    answers = {rank: Answer(at(0, "start", 1801.0, 1800.0), STEP) for rank in (0, 1, 2, 5)}
    assert sentence(answers, {}, PROCESSES) == (
        "the job hangs: ranks 0-2, 5 have been starting for 1,801 s, in all_reduce; the same command resumes "
        "from the newest checkpoint"
    )
    saving = {0: Answer(at(9, "save", 4000.0, 3600.0), READ)}
    assert "rank 0 (process 4000 on c0) has been in the phase 'save' of step 9" in sentence(
        saving, {}, PROCESSES
    )


def test_ranges() -> None:
    assert [ranges(numbers) for numbers in ([], [3], [5, 0, 1, 2], [1, 3, 4])] == [
        "",
        "3",
        "0-2, 5",
        "1, 3-4",
    ]


def test_until_the_first_step_is_done_there_is_the_time_of_a_start() -> None:
    limits = {"start": 1800.0, "data": 600.0, "step": 300.0, "log": 300.0, "evaluate": 3600.0, "save": 3600.0}
    watchdog = Watchdog(limits, Watch(lambda error: 1), lambda error, details: 1)

    def limits_of(*phases: str) -> list[float]:
        given = []
        for phase in phases:
            watchdog.started(phase)
            given.append(watchdog.place().limit)
            watchdog.ended(phase, 1.0)
        return given

    assert watchdog.place()[:2] == (0, "start") and watchdog.place().limit == 1800.0
    assert 0 <= watchdog.place().seconds < 60
    watchdog.ready(progress := Progress(step=7, data_step=7))
    assert limits_of("evaluate", "data", "step", "log") == [3600.0, 1800.0, 1800.0, 300.0]
    progress.advance(8)
    assert limits_of("data", "step", "save") == [600.0, 300.0, 3600.0] and watchdog.place().step == 8
    watchdog.starting()  # rolled back: whoever is in the loop already waits for this rank
    assert watchdog.place()[:2] == (0, "start")
    assert limits_of("data", "step", "data") == [1800.0, 1800.0, 600.0]


def test_the_limits_are_those_of_the_guide_and_0_is_any_time() -> None:
    limits = {"start": 1800, "data": 600, "step": 300, "log": 300, "save": 3600, "evaluate": 3600}
    assert GuardConfig().limit_seconds() == limits
    assert GuardConfig(save_minutes=0.0).limit_seconds() == {**limits, "save": math.inf}
