"""Where a run is, what is due after a step, and which phase of a step the loop is in.

Nothing here knows of processes or devices, so that it is tested without any.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Protocol, runtime_checkable


@dataclasses.dataclass
class Progress:
    """The counts of a run since its first start, over all resumes.

    step: optimizer steps done.
    data_step: global batches consumed; equal to `step` until a run skips data.
    samples_seen: images trained on; global_batch times `step` unless the run was begun from
        the full state of one with another global_batch.
    bad_samples: samples that could not be used and were replaced.
    rollbacks: how often the run went back to an earlier checkpoint.
    healthy: whether the newest checkpoint is.
    """

    step: int = 0
    data_step: int = 0
    samples_seen: int = 0
    bad_samples: int = 0
    rollbacks: int = 0
    healthy: bool = True

    def advance(self, global_batch: int) -> None:
        """Count a step, which trained on so many samples."""
        self.step += 1
        self.data_step += 1
        self.samples_seen += global_batch

    def pass_over(self, before: "Progress") -> None:
        """Roll back `before`, which was further on: what it read is not read again."""
        self.data_step, self.rollbacks = before.data_step, before.rollbacks + 1
        self.bad_samples = before.bad_samples


@dataclasses.dataclass(frozen=True, kw_only=True)
class Due:
    """What to do after a step. evaluate: the names of the evaluations to run."""

    log: bool
    evaluate: tuple[str, ...]
    save: bool
    end: bool
    draw: bool = False

    @classmethod
    def after(
        cls,
        step: int,
        total_steps: int,
        *,
        stopping: bool = False,
        log_every: int,
        save_every: int,
        evaluate_every: Mapping[str, int],
        draw_every: int = 0,
    ) -> "Due":
        """What is due after `step` steps. After 0 steps: the evaluations only.

        stopping: the run was asked to stop, so that this step is its last for now.
        save_every: 0 = only at the end. draw_every: 0 = never.

        For example, with total_steps 20, log_every 4, save_every 6 and an evaluation every 3:

            log         1, 4, 8, 12, 16, 20    the first and the last step, too
            save        6, 12, 18, 20          the last step, too
            evaluate    0, 3, 6, ..., 18, 20   before the first step, and after the last
        """
        last = step == total_steps
        return cls(
            log=step == 1 or last or stopping or (step > 0 and step % log_every == 0),
            draw=draw_every > 0 and step > 0 and (last or step % draw_every == 0),
            evaluate=tuple(name for name, every in evaluate_every.items() if last or step % every == 0),
            save=last or stopping or (step > 0 and save_every > 0 and step % save_every == 0),
            end=last or stopping,
        )


@runtime_checkable
class Listener(Protocol):
    """Called at the start and end of each phase: "data", "step", "log", "evaluate", "save"."""

    def started(self, phase: str) -> None: ...

    def ended(self, phase: str, seconds: float) -> None: ...


class Phases:
    """Calls its listeners around each part of a step: `with phases("data"): ...`."""

    def __init__(self, *listeners: Listener) -> None:
        self._listeners = list(listeners)

    def listen(self, listener: Listener) -> None:
        """Call one more, after the others."""
        self._listeners.append(listener)

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """One phase. If it raises, its listeners see it start and never end."""
        began = time.perf_counter()
        for listener in self._listeners:
            listener.started(phase)
        yield
        seconds = time.perf_counter() - began
        for listener in self._listeners:
            listener.ended(phase, seconds)
