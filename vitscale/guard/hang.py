"""Whether a job hangs, for which ranks, and how to say so. Pure: tested without any process."""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

# The phases in the order in which they follow one another, from step to step.
ORDER = ("start", "log", "evaluate", "save", "data", "step")


class Place(NamedTuple):
    """Where a rank is: how many steps are done, in which phase, how long, and its limit.

    For example, (811, "step", 604.0, 300.0) is in its 812th step for 604 s, which may take 300.
    """

    step: int
    phase: str
    seconds: float
    limit: float


class Answer(NamedTuple):
    """What a rank hands in: where it is, and the stack of its trainer, outermost first.

    Each line of the stack is "FILE:LINE FUNCTION". A rank that does not answer has none.
    """

    place: Place
    stack: tuple[str, ...]


def waited_for(places: Mapping[int, Place], silent: Sequence[int]) -> list[int]:
    """The ranks for which the others wait, if the job hangs; none if it does not.

    silent: the ranks that do not answer.

    A rank also exceeds its limit while it waits for one that is within its own, in a phase that
    may take longer. So it is the ranks that are furthest behind that count.
    """
    beyond = {rank for rank, place in places.items() if place.seconds > place.limit}
    at = {rank: (place.step, ORDER.index(place.phase)) for rank, place in places.items()}
    behind = [rank for rank, position in at.items() if position == min(at.values())]
    return behind if beyond and beyond.union(silent).issuperset(behind) else []


def sentence(answers: Mapping[int, Answer], states: Mapping[int, str], processes: Mapping[int, str]) -> str:
    """Where a job hangs.

    answers: of all ranks of which something is known.
    states: of those that do not answer, what the kernel says.
    processes: "process 4711 on c7" for each rank.
    """
    behind = waited_for({rank: answer.place for rank, answer in answers.items()}, list(states))
    behind = behind or list(answers)
    ranks = [rank for rank in behind if rank in states] or _minority(answers, behind)
    others = [rank for rank in answers if rank not in ranks]
    place, is_one = answers[ranks[0]].place, len(ranks) == 1
    who = f"rank {ranks[0]} ({processes[ranks[0]]}) has" if is_one else f"ranks {ranges(ranks)} have"
    if place.phase == "start":
        where = "starting"
    else:
        number = place.step + (place.phase in ("data", "step"))
        where = f"in the phase {place.phase!r} of step {number:,}"
    parts = [f"the job hangs: {who} been {where} for {place.seconds:,.0f} s{_innermost(answers, ranks)}"]
    if ranks[0] in states:
        parts.append(f"{'it does' if is_one else 'they do'} not answer")
        parts += [f"the kernel says: {states[ranks[0]]}"] * bool(states[ranks[0]])
    if others:
        wait = "rank waits" if len(others) == 1 else "ranks wait"
        parts.append(f"{len(others):,} other {wait}{_innermost(answers, others)}")
    return f"{'; '.join(parts)}; the same command resumes from the newest checkpoint"


def screen(answers: Mapping[int, Answer]) -> str:
    """The stacks of all ranks, once for all that have the same."""
    groups: dict[tuple[int, str, tuple[str, ...]], list[int]] = {}
    for rank, (place, stack) in sorted(answers.items()):
        groups.setdefault((place.step, place.phase, stack), []).append(rank)
    lines: list[str] = []
    for (step, phase, stack), ranks in groups.items():
        name = "rank" if len(ranks) == 1 else "ranks"
        lines.append(f"  {name} {ranges(ranks)}: {step:,} steps done, in {phase!r}")
        lines += [f"    {line}" for line in stack or ("no answer",)]
    return "\n".join(lines)


def ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    groups = itertools.groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in group] for _, group in groups]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _minority(answers: Mapping[int, Answer], ranks: Sequence[int]) -> list[int]:
    """Of ranks in the same phase, the few that are in another function than the others."""
    groups: dict[str, list[int]] = {}
    for rank in ranks:
        groups.setdefault(_innermost(answers, [rank]), []).append(rank)
    fewest = min(groups.values(), key=len)
    return fewest if 2 * len(fewest) < len(ranks) else list(ranks)


def _innermost(answers: Mapping[int, Answer], ranks: Sequence[int]) -> str:
    """The functions in which the trainers of these ranks are: ", in all_reduce"; or ""."""
    names = sorted({answers[rank].stack[-1].split()[-1] for rank in ranks if answers[rank].stack})
    return f", in {' or '.join(names)}" if names else ""
