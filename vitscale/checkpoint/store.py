"""Where checkpoints lie: committed as a whole, kept, found again by what verifies.

    RUN/checkpoints/step-000012000/manifest.json, rank-00000.safetensors, ...
    RUN/checkpoints/latest                          the name of the newest committed one

A kill at any instant leaves the previous checkpoint in charge. In a folder nothing has its final name until a
rename, and what has it was fsynced before; in an object store the manifest is published last. A reader trusts
checksums, not names, and walks back to the newest that verifies.
"""

import dataclasses
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from vitscale import storage
from vitscale.checkpoint.format import MANIFEST, CheckpointError, FileInfo, Manifest, hash_file
from vitscale.config import ConfigError

logger = logging.getLogger(__name__)
LATEST = "latest"
TEMPORARY = ".tmp-"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, where, and what to keep ([checkpoint]).

    every_steps 0 = only at the end; keep_every_steps 0 = none for ever. background: training waits only
    while its state is copied to host memory (12 bytes a parameter over the ranks; 16 with optim.ema_decay).
    store: a run's prefix in an object store, "s3://bucket/run"; checkpoints go there by way of the run
    directory.
    """

    every_steps: int = 1000
    keep_last: int = 3
    keep_every_steps: int = 0
    background: bool = True
    store: str = ""

    def __post_init__(self) -> None:
        if self.keep_last < 1:
            raise ConfigError(
                f"checkpoint.keep_last {self.keep_last} must be 1 or more: the newest is never deleted"
            )
        if self.every_steps < 0 or self.keep_every_steps < 0:
            raise ConfigError("checkpoint.every_steps and checkpoint.keep_every_steps must not be negative")
        if self.store and storage.scheme(self.store) not in ("s3", "gs", "gcs"):
            raise ConfigError(
                f"checkpoint.store {self.store!r} is not a prefix of an object store (s3://, gs://); for a "
                "folder that the nodes share, set run_dir to it and leave checkpoint.store out"
            )


@dataclasses.dataclass(frozen=True)
class Home:
    """Where a run keeps its checkpoints: a folder that its ranks share; or, if `store` is set, below that
    URL, and the folder, which may be each node's own, holds files on their way there.
    """

    directory: Path
    store: str = ""

    @classmethod
    def of(cls, run_dir: str, config: CheckpointConfig) -> "Home":
        return cls(directory_of(run_dir), child_of_run(config.store) if config.store else "")

    def committed(self) -> list[tuple[int, str]]:
        """(step, folder or URL) of all committed checkpoints in both places, the newest first."""
        places = [str(self.directory), self.store] if self.store else [str(self.directory)]
        found = [(step, step_folder(place, step)) for place in places for step in steps_on_disk(place)]
        return sorted(found, key=lambda pair: -pair[0])


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


def step_name(step: int) -> str:
    return f"step-{step:09d}"


def steps_on_disk(place: str | Path) -> list[int]:
    """The steps of all committed checkpoints in a folder or store, rising; by number, not by time."""
    names = [name.removeprefix("step-") for name in storage.names_in(str(place)) if name.startswith("step-")]
    # What another hand has named otherwise (step-5, step-000000005-copy) is not ours to read or delete.
    steps = sorted(int(name) for name in names if name.isdecimal() and step_name(int(name)) == f"step-{name}")
    if storage.is_local(str(place)):
        return steps
    return [step for step in steps if MANIFEST in storage.names_in(step_folder(str(place), step))]


def commit(manifest: Manifest, temporary: Path, final: Path) -> None:
    """Give a written checkpoint its manifest and its final name; rank 0 calls it when all ranks have
    written.
    """
    for name, info in manifest.files.items():
        if not (temporary / name).exists() or (temporary / name).stat().st_size != info.num_bytes:
            raise CheckpointError(
                f"{temporary / name}, which another rank has written, is not to be seen from rank 0: run_dir "
                'must be on a file system that all nodes share, or set checkpoint.store = "s3://..."'
            )
    manifest.save(temporary / MANIFEST)
    storage.fsync_directory(temporary)
    if final.exists():  # a broken one that was passed over: the run has now redone its steps
        delete(final)
    os.rename(temporary, final)
    storage.fsync_directory(final.parent)
    storage.write_atomic(final.parent / LATEST, f"{final.name}\n".encode())


def publish(manifest: Manifest, place: str) -> None:
    """As commit, in an object store, where the ranks have put their files under names that are new."""
    folder = step_folder(place, manifest.step)
    storage.write_bytes(storage.child(folder, MANIFEST), manifest.to_bytes())
    storage.write_bytes(storage.child(place, LATEST), f"{step_name(manifest.step)}\n".encode())
    for name in storage.names_in(folder):
        if name != MANIFEST and name not in manifest.files:  # of an earlier attempt at this step
            storage.delete(storage.child(folder, name))


def delete(path: Path) -> None:
    """Take the final name away first, so that a kill in the middle leaves no half checkpoint under it."""
    doomed = path.with_name(f"{TEMPORARY}deleted-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def clean(directory: Path) -> None:
    """Delete what dead saves left in a folder; only the holder of the run's lock knows that they are dead."""
    for leftover in directory.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for leftover in directory.glob(f".{LATEST}.tmp-*"):
        leftover.unlink(missing_ok=True)


def retained(steps: Sequence[int], keep_last: int, keep_every_steps: int) -> set[int]:
    """Which of the steps to keep: the last ones, and every n-th for ever."""
    forever = {step for step in steps if keep_every_steps and step % keep_every_steps == 0}
    return {*sorted(steps)[-keep_last:], *forever}


def apply_retention(home: Home, config: CheckpointConfig, distrusted: Sequence[int] = ()) -> None:
    """Delete what need not be kept; rank 0 calls it after a commit. A failed deletion is reported and tried
    again later.

    distrusted: steps that did not verify; they neither count as kept ones nor are they touched.
    """
    place = home.store or str(home.directory)
    try:
        steps = [step for step in steps_on_disk(place) if step not in distrusted]
        kept = retained(steps, config.keep_last, config.keep_every_steps)
        for step in sorted(set(steps) - kept):
            if home.store:
                storage.delete(storage.child(step_folder(place, step), MANIFEST))
                storage.delete(step_folder(place, step))
            else:
                delete(step_directory(home.directory, step))
        for folder in _unpublished(home.store, max(steps, default=0)) if home.store else ():
            storage.delete(folder)
    except (OSError, storage.StoreError) as error:
        logger.warning("an old checkpoint could not be deleted (%s); trying again after the next save", error)


def _unpublished(place: str, newest: int) -> Iterator[str]:
    """What saves that were killed left in a store, before its newest checkpoint."""
    for name in storage.names_in(place):
        step = name.removeprefix("step-")
        if name.startswith("step-") and step.isdigit() and int(step) < newest:
            folder = step_folder(place, int(step))
            if MANIFEST not in storage.names_in(folder):
                yield folder


def check_file(folder: str | Path, name: str, expected: FileInfo) -> str:
    """What is wrong with a file of a checkpoint, as a sentence; "" if its bytes are those of the manifest."""
    path = storage.child(folder, name)
    try:
        found = hash_file(path)
    except FileNotFoundError:
        return f"{path} is missing"
    if found.num_bytes != expected.num_bytes:
        return f"{path} has {found.num_bytes:,} bytes, the manifest says {expected.num_bytes:,}"
    if found.checksum != expected.checksum:
        return f"{path} is damaged: its checksum does not match the manifest"
    return ""


def check_coverage(folder: str | Path, manifest: Manifest) -> str:
    """What the fragments of a manifest leave out or hold twice, as a sentence; "" if nothing."""
    for name, tensor in manifest.tensors.items():
        end, size = 0, numel(tensor.shape)
        for _, start, count in sorted(tensor.fragments, key=lambda fragment: fragment[1]):
            if start != end:
                break
            end += count
        if end != size:
            return f"{folder}: its fragments do not hold the {size:,} values of {name} once each"
    return ""


def verify(folder: str | Path) -> Manifest:
    """Check the manifest and every file of a step directory. Raises CheckpointError naming the first that is
    wrong.
    """
    manifest = Manifest.load(folder)
    problem = check_coverage(folder, manifest)
    for name, info in manifest.files.items():
        problem = problem or check_file(folder, name, info)
    if problem:
        raise CheckpointError(problem)
    return manifest


def newest_good(place: str | Path) -> tuple[str | Path, Manifest] | None:
    """The newest checkpoint in a folder or store that verifies; newer ones that do not are named in a
    warning. None if there is none at all.

    Raises CheckpointError if there are checkpoints but none of them verifies.
    """
    broken = []
    for step in reversed(steps_on_disk(place)):
        try:
            folder = place / step_name(step) if isinstance(place, Path) else step_folder(place, step)
            return folder, verify(folder)
        except CheckpointError as error:
            broken.append(str(error))
            logger.warning("checkpoint passed over: %s", error)
    if broken:
        raise none_verifies(str(place), broken[0])
    return None


def none_verifies(place: str, problem: str) -> CheckpointError:
    """The error of a run that has checkpoints, none of them good: starting from scratch would lose it."""
    return CheckpointError(
        f"no checkpoint in {place} verifies ({problem}); restore one, or move the folder away to start afresh"
    )


def numel(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
