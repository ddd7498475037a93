"""Saving behind the training: it waits only while the fragments are copied to host memory.

One save is under way at a time: when the next falls due, it waits for it, so that memory stays at one copy of
what the rank owns. The ranks' writers agree over a process group of their own, beside the trainer's.
"""

import dataclasses
import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

from vitscale import distributed
from vitscale.checkpoint import snapshot, store
from vitscale.checkpoint.ema import Ema
from vitscale.checkpoint.format import CheckpointError
from vitscale.checkpoint.snapshot import HostBuffer, Snapshot
from vitscale.checkpoint.store import CheckpointConfig, Home

logger = logging.getLogger(__name__)
THREAD_NAME = "checkpoint writer"
LAST_SAVE_SECONDS = 120


@dataclasses.dataclass
class _Save:
    """A save: under way, `done`, or with a `failure` that says why it did not work. seconds: of
    writing it.
    """

    step: int
    blocked_seconds: float = 0.0
    seconds: float = 0.0
    done: bool = False
    failure: str = ""
    thread: threading.Thread | None = None


class Saver:
    """Makes the checkpoints of a run; every rank has one and calls it at the same steps.

    distrusted: steps of checkpoints that did not verify; retention leaves them alone and does not count them.
    """

    def __init__(
        self, home: Home, config: CheckpointConfig, optimizer: str, distrusted: Sequence[int]
    ) -> None:
        self._home, self._config, self._optimizer = home, config, optimizer
        self._distrusted = set(distrusted)
        self._buffer = HostBuffer() if config.background else None
        self._channel = distributed.new_channel()
        self._saves: list[_Save] = []  # not yet told of by finished()

    def save(self, engine: Any, header: dict[str, Any], ema: Ema | None = None) -> None:
        """Take a snapshot between two optimizer steps, and write it, in the background if so configured.

        Raises CheckpointError on every rank if the save before it, or this one, did not succeed.
        """
        began = time.perf_counter()
        self.wait()
        taken = snapshot.take(engine, self._optimizer, header, ema, self._buffer)
        save = _Save(header["step"])
        self._saves.append(save)
        if self._buffer:
            save.thread = threading.Thread(
                target=self._write, args=(taken, save), name=THREAD_NAME, daemon=True
            )
            save.thread.start()
        else:
            self._write(taken, save)
            self.wait()
        save.blocked_seconds = time.perf_counter() - began

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Where training ends by an error, let the save under way come to its end: it is good."""
        if kind and self._saves and (thread := self._saves[-1].thread):
            thread.join(LAST_SAVE_SECONDS)

    @property
    def failed(self) -> bool:
        """Whether the last save has ended without success; the ranks agree on it at every step."""
        return bool(self._saves and self._saves[-1].failure)

    def finished(self) -> list[dict[str, float]]:
        """What the saves committed since the last call have cost: for how long training stood still, and how
        long each took in all.
        """
        done = [save for save in self._saves if save.done]
        self._saves = [save for save in self._saves if not save.done]
        for save in done:
            logger.info(
                "saved step %d in %.2f s; training waited for %.2f s of it",
                save.step,
                save.seconds,
                save.blocked_seconds,
            )
        return [
            {"checkpoint/blocked_seconds": save.blocked_seconds, "checkpoint/seconds": save.seconds}
            for save in done
        ]

    def wait(self) -> None:
        """Wait for the save under way, if there is one. Raises CheckpointError if it did not succeed."""
        if self._saves:
            save = self._saves[-1]
            if save.thread:
                save.thread.join()
            if save.failure:
                raise CheckpointError(save.failure)

    def _write(self, taken: Snapshot, save: _Save) -> None:
        began = time.perf_counter()
        try:
            snapshot.write(taken, self._home, self._channel)
            self._distrusted.discard(save.step)
            if distributed.is_main():
                store.apply_retention(self._home, self._config, sorted(self._distrusted))
            save.seconds = time.perf_counter() - began
            save.done = True
        except CheckpointError as error:
            save.failure = str(error)
        except BaseException as error:  # nothing may be lost in a thread
            logger.exception("saving step %d failed", save.step)
            save.failure = f"saving step {save.step:,} failed: {type(error).__name__}: {error}"
