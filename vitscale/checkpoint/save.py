"""Saving in the background: training waits only while its state is copied to host memory.

One save is under way at a time. When the next is due, it waits for the last, so that memory
stays at one copy of what the rank owns. The writer threads have a process group of their own.
"""

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence

from vitscale import distributed
from vitscale.checkpoint import snapshot, store
from vitscale.checkpoint.manifest import Manifest, TrainState
from vitscale.checkpoint.snapshot import HostBuffer, Snapshot
from vitscale.checkpoint.store import CheckpointConfig, Home
from vitscale.engine.engine import Engine
from vitscale.errors import CheckpointError, RankLost, UserError

logger = logging.getLogger(__name__)
THREAD_NAME = "checkpoint writer"
LAST_SAVE_SECONDS = 120
COMMIT_SECONDS = 10  # of LAST_SAVE_SECONDS, where only rank 0's commit of all files can still succeed


@dataclasses.dataclass
class _Save:
    """A save under way, `done`, or ended by a `failure`. seconds: how long writing took."""

    step: int
    blocked_seconds: float = 0.0
    seconds: float = 0.0
    done: bool = False
    failure: UserError | None = None


class Saver:
    """Makes the checkpoints of a run; every rank has one and calls it at the same steps.

    distrusted: checkpoints that did not verify, which retention does not touch.
    best_of: which step among some is the best by an evaluation; None = none is.

    Use it as a context manager: if training ends with an error, the save under way is finished.
    With a rank that is lost, that is a commit at most; gloo may wait for this rank without end.
    """

    def __init__(
        self,
        home: Home,
        config: CheckpointConfig,
        distrusted: Sequence[str] = (),
        best_of: Callable[[Sequence[int]], int | None] = lambda steps: None,
    ) -> None:
        self._home, self._config, self._best_of = home, config, best_of
        self._distrusted = set(distrusted)
        self._healthy: dict[str, bool] = {}  # by folder or URL
        self._buffer = HostBuffer() if config.background else None
        self._channel = distributed.new_channel()
        self._saves: list[_Save] = []  # not yet reported by finished()
        self._thread: threading.Thread | None = None  # the last one: what is under way

    def save(self, engine: Engine, train: TrainState) -> None:
        """Take a snapshot between two optimizer steps and write it (by default in a thread).

        Raises a UserError on every rank if the previous save failed; in the foreground, also if
        this one does.
        """
        began = time.perf_counter()
        self.wait()
        taken = snapshot.take(engine, train, self._buffer)
        save = _Save(train.step)
        self._saves.append(save)
        if self._buffer:
            self._start(THREAD_NAME, self._write, taken, save)
        else:
            self._write(taken, save)
            self.wait()
        save.blocked_seconds = time.perf_counter() - began

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        if error and self._thread:
            lost = isinstance(error, RankLost) or distributed.lost_connection(error)
            self._thread.join(COMMIT_SECONDS if lost else LAST_SAVE_SECONDS)

    @property
    def failed(self) -> bool:
        """Whether the last save failed; the ranks agree on it at every step."""
        return bool(self._saves and self._saves[-1].failure)

    def finished(self) -> list[tuple[int, dict[str, float]]]:
        """The step and the cost, as metrics, of each save committed since the last call.

        blocked_seconds: for how long training waited. seconds: how long writing took.
        """
        done = [save for save in self._saves if save.done]
        self._saves = [save for save in self._saves if save not in done]
        for save in done:
            logger.info(
                "saved step %d in %.2f s; training waited for %.2f s of it",
                save.step,
                save.seconds,
                save.blocked_seconds,
            )
        return [
            (
                save.step,
                {"checkpoint/blocked_seconds": save.blocked_seconds, "checkpoint/seconds": save.seconds},
            )
            for save in done
        ]

    def wait(self) -> None:
        """Wait for the save under way, if any. Raises the UserError that ended it."""
        if self._thread:
            self._thread.join()
        if self._saves and (failure := self._saves[-1].failure):
            raise failure

    def keep_best(self) -> None:
        """Retain once more: a step was evaluated after its save. Every rank may call it.

        In the background it is behind the save under way, which training need not wait for.
        """
        if not distributed.is_main():
            return
        if self._buffer:
            self._start("checkpoint retention", self._retain_behind, self._thread)
        else:
            self.retain()

    def _start(self, name: str, work: Callable[..., None], *arguments: object) -> None:
        self._thread = threading.Thread(target=work, args=arguments, name=name, daemon=True)
        self._thread.start()

    def _retain_behind(self, under_way: threading.Thread | None) -> None:
        if under_way:
            under_way.join()
        self.retain()

    def _write(self, taken: Snapshot, save: _Save) -> None:
        began = time.perf_counter()
        try:
            snapshot.write(taken, self._home, self._channel)
            folder = store.step_folder(self._home.place, save.step)
            self._distrusted.discard(folder)
            if distributed.is_main():
                self._healthy[folder] = taken.manifest.train.healthy
                self.retain()
            save.seconds = time.perf_counter() - began
            save.done = True
        except UserError as error:
            save.failure = error
        except BaseException as error:  # an exception must not vanish with its thread
            if distributed.lost_connection(error):  # the trainer finds that, too, and says so
                save.failure = RankLost(f"saving step {save.step:,} failed: another rank was lost ({error})")
                return
            logger.exception("saving step %d failed", save.step)
            message = f"saving step {save.step:,} failed: {type(error).__name__}: {error}"
            save.failure = CheckpointError(message)

    def retain(self) -> None:
        """Name the best checkpoint, and delete those that need not be kept; rank 0 calls it."""
        store.apply_retention(self._home, self._config, self._distrusted, self._is_healthy, self._best_of)

    def newest_healthy(self) -> str:
        """The folder or URL of the newest healthy checkpoint, or "" if there is none."""
        folders = (folder for _, folder in self._home.committed() if folder not in self._distrusted)
        return next(filter(self._is_healthy, folders), "")

    def delete_beyond(self, step: int) -> None:
        """Delete the checkpoints of steps beyond this one; rank 0 calls it, after wait()."""
        for later, folder in self._home.committed():
            if later <= step:
                break
            store.delete_checkpoint(folder)
            self._healthy.pop(folder, None)
        for place in {self._home.place, str(self._home.directory)}:
            store.name_latest(place)
        self.retain()

    def _is_healthy(self, folder: str) -> bool:
        """Whether a checkpoint says so; one that cannot be read does not."""
        if folder not in self._healthy:
            try:
                self._healthy[folder] = Manifest.load(folder).train.healthy
            except CheckpointError:
                self._healthy[folder] = False
        return self._healthy[folder]
