"""Where checkpoints are kept, how they are committed as a whole, and which ones are deleted.

    RUN/checkpoints/step-000012000/manifest.json, rank-00000.safetensors, ...
    RUN/checkpoints/latest      the name of the newest one, for people; a resume ignores it
    RUN/checkpoints/best        the name of the best one, with keep_best

A save of step 12000, and what a resume finds if the job is killed during or after each part:

    1  every rank writes .tmp-step-000012000-TOKEN/rank-NNNNN.safetensors, and fsyncs it
           the previous checkpoint (the next start deletes .tmp- folders)
    2  rank 0 adds manifest.json, and fsyncs the folder
           the previous checkpoint: the new one is complete, but has not got its name
    3  if step-000012000 exists (it did not verify, so its steps were done again), it is
       renamed to .tmp-deleted-step-000012000 and deleted
           the previous checkpoint
    4  the folder is renamed to step-000012000
           the new checkpoint, though `latest` still names the previous one
    5  `latest` is replaced
           the new checkpoint
    6  old checkpoints are renamed to .tmp-deleted-step-NNNNNNNNN and deleted (retention)
           the new checkpoint

An object store has no rename: there the ranks upload their files under names that no other save
uses, and the manifest is written last. A reader trusts checksums, not names, and walks back to
the newest checkpoint that verifies.
"""

import contextlib
import dataclasses
import functools
import itertools
import logging
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from vitscale.checkpoint.manifest import MANIFEST, Manifest
from vitscale.errors import CheckpointError, ConfigError, StoreError
from vitscale.stores import storage
from vitscale.system import atomic

logger = logging.getLogger(__name__)
LATEST, BEST = "latest", "best"
TEMPORARY = ".tmp-"
# Longer than guard.save_minutes lets a save last, so that no job is still uploading.
ABANDONED_SECONDS = 7200.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, where, and what to keep ([checkpoint]).

    every_steps: save after every so many steps, and at the end; 0 = only at the end.
    keep_last: how many of the newest checkpoints to keep, beside the newest healthy one.
    keep_every_steps: checkpoints of steps that are multiples of it are kept for ever; 0 = none.
    keep_best: a number of an evaluation, "eval/NAME/top1": a step where it is better than ever
        before is saved and kept until there is a better one; "" = none. Of a loss the lowest
        is best, of anything else the highest.
    background: training waits only while its state is copied to host memory (12 bytes a
        parameter over all ranks; 16 with optim.ema_decay).
    store: a prefix in an object store, "s3://bucket/run", to which checkpoints are uploaded
        after they were written in the run directory; "" = they stay in the run directory.
    """

    every_steps: int = 1000
    keep_last: int = 3
    keep_every_steps: int = 0
    keep_best: str = ""
    background: bool = True
    store: str = ""

    def __post_init__(self) -> None:
        if self.keep_last < 1:
            raise ConfigError(
                f"checkpoint.keep_last {self.keep_last} must be 1 or more: the newest is never deleted"
            )
        if self.every_steps < 0 or self.keep_every_steps < 0:
            raise ConfigError("checkpoint.every_steps and checkpoint.keep_every_steps must not be negative")
        if self.keep_best and not (self.keep_best.count("/") == 2 and self.keep_best.startswith("eval/")):
            raise ConfigError(
                f"checkpoint.keep_best {self.keep_best!r} is not a number of an evaluation; write "
                '"eval/NAME/top1" for the top1 of [evals.NAME]'
            )
        if self.store and storage.scheme(self.store) not in ("s3", "gs", "gcs"):
            raise ConfigError(
                f"checkpoint.store {self.store!r} is not a prefix of an object store (s3://, gs://); for a "
                "folder that the nodes share, set run_dir to it and leave checkpoint.store out"
            )


@dataclasses.dataclass(frozen=True)
class Home:
    """Where a run keeps its checkpoints: a folder that its ranks share, or its URL in a store.

    With a store, the folder holds files until they are uploaded, and may be each node's own.
    """

    directory: Path
    store: str = ""

    @classmethod
    def of(cls, run_dir: str, config: CheckpointConfig) -> "Home":
        return cls(directory_of(run_dir), child_of_run(config.store) if config.store else "")

    @property
    def place(self) -> str:
        """Where it commits checkpoints now; there may be earlier ones in the folder."""
        return self.store or str(self.directory)

    def committed(self) -> Iterator[tuple[int, str]]:
        """The committed checkpoints in both places, as committed_in gives them."""
        return committed_in([str(self.directory), self.store] if self.store else [str(self.directory)])

    def newest(self) -> tuple[int, str] | None:
        """The first of committed(); None if there is none."""
        return next(self.committed(), None)


def directory_of(run_dir: str | Path) -> Path:
    return Path(run_dir) / "checkpoints"


def child_of_run(run_url: str) -> str:
    """As directory_of, for the URL of a run in a store."""
    return storage.child(run_url, "checkpoints")


def step_directory(directory: Path, step: int) -> Path:
    return directory / step_name(step)


def step_folder(place: str, step: int) -> str:
    """As step_directory, for a folder or a URL."""
    return storage.child(place, step_name(step))


def step_of(folder: str | Path) -> int | None:
    """The step that the last part of a path or URL names; None if it has another name."""
    name = str(folder).rstrip("/").rpartition("/")[2]
    digits = name.removeprefix("step-")
    return int(digits) if digits.isdecimal() and name == step_name(int(digits)) else None


def step_name(step: int) -> str:
    return f"step-{step:09d}"


def committed_in(places: Sequence[str]) -> Iterator[tuple[int, str]]:
    """(step, folder or URL) of the committed checkpoints in some places, the newest first.

    A checkpoint in a store is looked for when its turn comes, so the newest alone takes few
    requests, however many there are.
    """
    named = [(step, step_folder(place, step)) for place in places for step in _named_steps(place)]
    for step, folder in sorted(named, key=lambda pair: -pair[0]):
        if storage.is_local(folder) or MANIFEST in storage.names_in(folder):
            yield step, folder


def _named_steps(place: str) -> list[int]:
    """The steps that folders in a place are named after; a store may lack their manifests."""
    # Other names (step-5, step-000000005-copy) are somebody else's: not ours to read or delete.
    return [step for step in map(step_of, storage.names_in(place)) if step is not None]


def commit(manifest: Manifest, temporary: Path, final: Path) -> None:
    """Give a written checkpoint its manifest and its final name: steps 2 to 5 of the module.

    Rank 0 calls it after all ranks have written their files.
    """
    for name, info in manifest.files.items():
        if not (temporary / name).exists() or (temporary / name).stat().st_size != info.num_bytes:
            raise CheckpointError(
                f"{temporary / name}, written by another rank, is not visible to rank 0: run_dir must be on "
                'a file system that all nodes share, or set checkpoint.store = "s3://..."'
            )
    manifest.save(temporary / MANIFEST)
    atomic.sync_folder(temporary)
    if os.path.lexists(final):  # it did not verify at the start, and the run has done its steps again
        delete(final)
    os.rename(temporary, final)
    atomic.sync_folder(final.parent)
    _write_name(str(final.parent), LATEST, manifest.step)


def publish(manifest: Manifest, place: str) -> None:
    """As commit, for a store, to which the ranks have uploaded their files.

    Two jobs may save the same step: the run's lock is in run_dir, which may be a node's own
    disk, and a job that was told to end may still upload while its successor trains. So a file
    that is not in this manifest is deleted only if it is abandoned, and a manifest is written
    only while all of its files are there. Whichever is written last has its files.
    Raises CheckpointError if another job has deleted one of them.
    """
    folder = step_folder(place, manifest.step)
    names = storage.names_in(folder)
    if gone := sorted(manifest.files.keys() - set(names)):
        raise CheckpointError(
            f"{folder}/{gone[0]} was deleted before its checkpoint was complete: another job saves to "
            "checkpoint.store, too; end one of the two, or give it another store"
        )
    now = storage.written_at(storage.child(folder, next(iter(manifest.files))))
    left = _abandoned(folder, [name for name in names if name not in manifest.files], now)
    storage.write_bytes(storage.child(folder, MANIFEST), manifest.to_bytes())
    _write_name(place, LATEST, manifest.step)
    for name in left:
        storage.delete(storage.child(folder, name))


def name_latest(place: str) -> None:
    """Let `latest` name the newest checkpoint that there is, after others were deleted."""
    newest = next(committed_in([place]), None)
    _write_name(place, LATEST, newest[0] if newest else None)


def _write_name(place: str, file: str, step: int | None) -> None:
    """Write into a small file of a folder or store which step it means; None = delete it."""
    if step is None:
        if storage.is_local(place):
            (Path(place) / file).unlink(missing_ok=True)
        else:
            storage.delete(storage.child(place, file))
        return
    content = f"{step_name(step)}\n".encode()
    if storage.is_local(place):
        atomic.write(Path(place) / file, content)
    else:
        storage.write_bytes(storage.child(place, file), content)


def delete(path: Path) -> None:
    """Delete a step directory, renamed first, so that a kill leaves no half of it to read.

    Of a link to one, only the link is deleted.
    """
    doomed = path.with_name(f"{TEMPORARY}deleted-{path.name}")
    atomic.remove(doomed, ignore_errors=True)
    os.rename(path, doomed)
    atomic.remove(doomed)


def delete_checkpoint(folder: str) -> None:
    """As delete, for a folder or a URL."""
    if storage.is_local(folder):
        delete(Path(folder))
        return
    # Without its manifest it is no checkpoint: a kill after this does no harm.
    storage.delete(storage.child(folder, MANIFEST))
    storage.delete(folder)


def clean(directory: Path) -> None:
    """Delete what killed saves left in a folder; only the holder of the run's lock calls it."""
    for leftover in directory.glob(f"{TEMPORARY}*"):
        atomic.remove(leftover, ignore_errors=True)
    for name in (LATEST, BEST):
        atomic.clean(directory / name)


def retained(
    steps: Sequence[int],
    keep_last: int,
    keep_every_steps: int,
    is_committed: Callable[[int], bool],
    is_healthy: Callable[[int], bool],
    best: int | None = None,
) -> set[int]:
    """Which steps to keep: the last, the newest healthy one, the best, and those kept for ever.

    Steps are asked from the newest on, as far as needed: is_committed, and of the committed
    ones is_healthy. Steps that are kept for ever need not be committed.
    """
    newest_first = sorted(steps, reverse=True)
    last = itertools.islice(filter(is_committed, newest_first), keep_last)
    healthy = itertools.islice(filter(is_healthy, filter(is_committed, newest_first)), 1)
    forever = {step for step in steps if keep_every_steps and step % keep_every_steps == 0}
    good = {best} if best is not None and best in steps else set()
    return {*last, *healthy, *forever, *good}


def apply_retention(
    home: Home,
    config: CheckpointConfig,
    distrusted: Collection[str],
    is_healthy: Callable[[str], bool],
    best_of: Callable[[Sequence[int]], int | None] = lambda steps: None,
) -> None:
    """Delete the checkpoints that need not be kept; rank 0 calls it.

    distrusted: checkpoints that did not verify; they are neither counted nor deleted.
    is_healthy: of the others, by folder or URL.
    best_of: which step among some is the best; None = none is.

    A store lists each folder once at most, and of those kept for ever only the newest ones and
    the best. A failed deletion is logged, and tried again after the next save.
    """
    place = home.place
    folder_of = functools.partial(step_folder, place)
    names_of = functools.cache(lambda step: storage.names_in(folder_of(step)))

    def is_there(step: int) -> bool:
        return storage.is_local(place) or MANIFEST in names_of(step)

    try:
        named = [step for step in _named_steps(place) if folder_of(step) not in distrusted]
        # From the newest checkpoint on: what is newer may be what another job still uploads.
        steps = list(itertools.dropwhile(lambda step: not is_there(step), sorted(named, reverse=True)))
        best = best_of(steps)
        if best is not None and not is_there(best):
            best = best_of(list(filter(is_there, steps)))
        kept = retained(
            steps,
            config.keep_last,
            config.keep_every_steps,
            is_there,
            lambda step: is_healthy(folder_of(step)),
            best,
        )
        is_named = _tries_to_name(place, best)  # before a best one is deleted, unless the disk is full
        for step in sorted(set(steps) - kept):
            if is_there(step):
                delete_checkpoint(folder_of(step))
            elif _is_abandoned(folder_of(step), names_of(step), folder_of(steps[0])):
                storage.delete(folder_of(step))
        if not is_named:
            _write_name(place, BEST, best)
    except (OSError, StoreError) as error:
        logger.warning("old checkpoints could not be deleted (%s); trying again after the next save", error)


def _tries_to_name(place: str, best: int | None) -> bool:
    try:
        _write_name(place, BEST, best)
    except (OSError, StoreError):
        return False
    return True


def _is_abandoned(folder: str, names: Sequence[str], newest: str) -> bool:
    """Whether a folder of a store is what a killed save left. newest: a later checkpoint."""
    now = storage.written_at(storage.child(newest, MANIFEST))
    return len(_abandoned(folder, names, now)) == len(names)


def _abandoned(folder: str, names: Sequence[str], now: float) -> list[str]:
    """Which files but the manifest no job can still be saving. now: a time as of written_at."""
    abandoned = []
    for name in names:
        with contextlib.suppress(FileNotFoundError):  # another job deletes them, too
            written = storage.written_at(storage.child(folder, name))
            if name != MANIFEST and written < now - ABANDONED_SECONDS:
                abandoned.append(name)
    return abandoned
