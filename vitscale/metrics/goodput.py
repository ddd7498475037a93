"""Where the wall time of a run goes, over all of its starts: RUN/time.json.

    {"starts": [{"began": 1772338353.1, "elapsed": 3600.0, "step": 12400,
                 "seconds": {"start": 41.2, "step": 3300.1, "data": 80.3, ...},
                 "marks": [{"step": 12000, "elapsed": 3480.0, "seconds": {...}}]}, ...]}

A mark is what a start had spent at a checkpoint. If the next start resumes from it, what was
spent after it is lost work, whatever it was spent on. Starts before the last two keep their
first and last marks: going back beyond the last one counts all after the first as lost.

The file is written when the loop begins and with every logged row: if a start is killed, what
it did after that counts as idle.
"""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitscale.progress import Progress
from vitscale.system import atomic

FILE_NAME = "time.json"
# Steps are the goodput. Then: the other phases of the loop, a start until the loop begins, work
# that was done again, the time between two starts, and what has no name.
KINDS: tuple[str, ...] = ("step", "data", "log", "evaluate", "save", "start", "lost", "idle", "other")
MAX_MARKS = 32
_MAX_SECONDS = 2**37  # since the epoch: the year 6325


@dataclasses.dataclass
class Mark:
    """What a start had spent when it had done so many steps of the run."""

    step: int
    elapsed: float
    seconds: dict[str, float]


@dataclasses.dataclass
class Start:
    """One start of a run. began: in seconds since the epoch. elapsed: since then."""

    began: float
    elapsed: float = 0.0
    step: int = 0
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    marks: list[Mark] = dataclasses.field(default_factory=list)

    def spent(self, *, is_last: bool) -> dict[str, float]:
        """The seconds of each kind. is_last: no other start has gone on from its last mark."""
        whole = is_last or self.marks[-1].step >= self.step  # it ended with its checkpoint
        kept = self if whole else self.marks[-1]
        unnamed = kept.elapsed - sum(kept.seconds.values())
        return {**kept.seconds, "lost": self.elapsed - kept.elapsed, "other": unnamed}

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> "Start":
        """Raises ValueError, KeyError, TypeError or AttributeError for what is not a start."""
        start = cls(**{**values, "marks": [Mark(**mark) for mark in values["marks"]]})
        parts = (start, *start.marks)
        spent = (number for part in parts for number in (part.step, part.elapsed, *part.seconds.values()))
        is_known = all(part.seconds.keys() <= set(KINDS) for part in parts)  # later versions may have more
        if not (start.marks and is_known and all(abs(n) < _MAX_SECONDS for n in (start.began, *spent))):
            raise ValueError(values)
        return start


def fractions(starts: Sequence[Start], before_last: Mapping[str, float] | None = None) -> dict[str, float]:
    """The part of each kind of the time from the first start until now; they add up to 1.

    before_last: seconds_before_last(starts), if it is known.
    """
    total = dict(before_last or seconds_before_last(starts))
    if starts:
        _add(total, starts, len(starts) - 1)
    whole = sum(total.values())
    return {kind: seconds / whole for kind, seconds in total.items()} if whole else total


def seconds_before_last(starts: Sequence[Start]) -> dict[str, float]:
    """The seconds of each kind, of all starts but the last one."""
    total = dict.fromkeys(KINDS, 0.0)
    for number in range(len(starts) - 1):
        _add(total, starts, number)
    return total


def _add(total: dict[str, float], starts: Sequence[Start], number: int) -> None:
    """Add the seconds of one of the starts, and of the time since the one before it."""
    start = starts[number]
    for kind, seconds in start.spent(is_last=number == len(starts) - 1).items():
        total[kind] += seconds
    if number:
        total["idle"] += max(0.0, start.began - starts[number - 1].began - starts[number - 1].elapsed)


def summary(numbers: Mapping[str, float]) -> str:
    """The parts of a row as a line, without those below 0.05%: "91.0% steps, 5.1% start"."""
    names = {"step": "steps", "lost": "lost work", "evaluate": "evaluation"}
    parts = {kind: numbers[name] for kind in KINDS if (name := f"goodput/{kind}") in numbers}
    return ", ".join(f"{part:.1%} {names.get(kind, kind)}" for kind, part in parts.items() if part >= 5e-4)


def read_starts(path: Path) -> list[Start]:
    """The starts of a run, from its time.json; none if there is no file that can be read."""
    try:
        return [Start.parse(start) for start in json.loads(path.read_bytes())["starts"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


def _to_json(start: Start) -> str:
    return json.dumps(dataclasses.asdict(start))


class Ledger:
    """Keeps RUN/time.json, if it `writes`, as rank 0 does; a listener of the loop's phases."""

    def __init__(self, run_dir: str, began: float, *, writes: bool) -> None:
        """A start of the run, since `began`; call it within the run's lock."""
        self._path, self._writes = Path(run_dir) / FILE_NAME, writes
        self._starts = read_starts(self._path) if writes else []
        # Of all starts but the last, since ready(): their JSON, and the seconds of each kind.
        self._texts_before: list[str] = []
        self._seconds_before: dict[str, float] = {}
        self._progress = Progress()
        self._begin(began)

    def ready(self, progress: Progress) -> None:
        """The loop begins, and counts its steps in `progress`. What is beyond them is lost."""
        step = progress.step
        for before in self._starts[-2:-1]:
            # A kill may come between a save and the row that would have written its mark.
            if before.marks[-1].step < before.step <= step:
                before.marks.append(Mark(before.step, before.elapsed, before.seconds))
        for start in self._starts[:-1]:
            start.marks = [mark for mark in start.marks if mark.step <= step] or start.marks[:1]
        for start in self._starts[:-2]:
            del start.marks[1:-1]
        self._texts_before = list(map(_to_json, self._starts[:-1]))
        self._seconds_before = seconds_before_last(self._starts)
        self._progress = progress
        self._touch()
        self._now.seconds["start"] = self._now.elapsed
        self.mark()
        self.write()

    def rolled_back(self) -> None:
        """The run starts again, in this process."""
        self._touch()
        self._begin(time.time())

    def started(self, phase: str) -> None:
        """Phases are counted when they end."""

    def ended(self, phase: str, seconds: float) -> None:
        self._now.seconds[phase] = self._now.seconds.get(phase, 0.0) + seconds

    def mark(self) -> None:
        """What was done until now is in the newest checkpoint, or is not repeated after it."""
        self._touch()
        if len(self._now.marks) > 1 and self._now.marks[-1].step == self._now.step:
            self._now.marks.pop()
        self._now.marks.append(Mark(self._now.step, self._now.elapsed, dict(self._now.seconds)))
        del self._now.marks[1:-MAX_MARKS]

    def write(self) -> dict[str, float]:
        """Write the file. Returns metrics of a row: "goodput/step" and so on, "run/starts".

        What earlier starts add is worked out once: a row costs no more after hundreds of them.
        """
        self._touch()
        if self._writes:
            starts = ", ".join([*self._texts_before, _to_json(self._now)])
            atomic.write(self._path, f'{{"starts": [{starts}]}}\n'.encode())
        parts = fractions(self._starts, self._seconds_before).items()
        return {**{f"goodput/{kind}": part for kind, part in parts}, "run/starts": len(self._starts)}

    def _begin(self, at: float) -> None:
        # From here on by the clock of the phases, which nobody sets.
        self._since = time.perf_counter() - max(0.0, time.time() - at)
        self._now = Start(at)
        self._starts.append(self._now)

    def _touch(self) -> None:
        self._now.elapsed = time.perf_counter() - self._since
        self._now.step = self._progress.step
