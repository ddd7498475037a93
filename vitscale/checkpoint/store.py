"""Checkpoints on disk: write under a temporary name, commit by rename, keep the last few, find the newest
good one.

    RUN/checkpoints/step-000012000/manifest.json, rank-00000.safetensors, ...
    RUN/checkpoints/latest                          the name of the newest committed one

A kill at any instant leaves the previous checkpoint in charge: until the rename nothing has its final name,
and what has it was fsynced before. A reader trusts checksums, not names, and walks back to the newest that
verifies.
"""

import dataclasses
import datetime
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vitscale import distributed, storage
from vitscale.checkpoint import state
from vitscale.checkpoint.format import (
    MANIFEST,
    CheckpointError,
    FileInfo,
    Manifest,
    TensorInfo,
    hash_file,
    write_safetensors,
)
from vitscale.config import ConfigError

logger = logging.getLogger(__name__)
LATEST = "latest"
_TEMPORARY = ".tmp-"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save and what to keep ([checkpoint]). every_steps 0 = only at the end; keep_every_steps 0 =
    none for ever.
    """

    every_steps: int = 1000
    keep_last: int = 3
    keep_every_steps: int = 0

    def __post_init__(self) -> None:
        if self.keep_last < 1:
            raise ConfigError(
                f"checkpoint.keep_last {self.keep_last} must be 1 or more: the newest is never deleted"
            )
        if self.every_steps < 0 or self.keep_every_steps < 0:
            raise ConfigError("checkpoint.every_steps and checkpoint.keep_every_steps must not be negative")


def directory_of(run_dir: str | Path) -> Path:
    return Path(run_dir) / "checkpoints"


def step_directory(directory: Path, step: int) -> Path:
    return directory / f"step-{step:09d}"


def steps_on_disk(directory: Path) -> list[int]:
    """The steps of all committed checkpoints, rising; by number, not by file time."""
    names = [path.name.removeprefix("step-") for path in directory.glob("step-*")]
    return sorted(int(name) for name in names if name.isdigit())


def save(engine: Any, directory: Path, optimizer: str, header: dict[str, Any]) -> Path:
    """Write and commit a checkpoint of the engine between two optimizer steps; every rank calls it.

    header: the trainer's part of the Manifest, with its "step". Returns the step directory. Raises
    CheckpointError on every rank if any could not write (disk full, read-only): the previous checkpoint is
    then still in charge.
    """
    steps = state.optimizer_steps(engine)
    states = ("fp32", *(state.OPTIMIZER_STATES[optimizer] if steps > 0 else ()))
    owned = state.owned_states(engine, states)
    temporary = directory / f"{_TEMPORARY}step-{header['step']:09d}"
    _together(
        lambda: _prepare(directory, temporary) if distributed.is_main() else None, "preparing", temporary
    )

    file = f"rank-{distributed.rank():05d}.safetensors"
    named = {
        f"{name}/{parameter}": tensor for name, part in owned.items() for parameter, tensor in part.items()
    }
    info = _together(
        lambda: write_safetensors(temporary / file, named, {"format": "pt"}), "writing", temporary / file
    )
    pieces = [(fragment.name, fragment.start, fragment.count) for fragment in state.fragments(engine)]
    everyone = distributed.gather_json([file, dataclasses.asdict(info), pieces])

    tensors = {name: TensorInfo(shape=shape, fragments=()) for name, shape in state.shapes(engine).items()}
    for name, _, owned_pieces in everyone:
        for parameter, start, count in owned_pieces:
            old = tensors[parameter]
            tensors[parameter] = dataclasses.replace(old, fragments=(*old.fragments, (name, start, count)))
    manifest = Manifest(
        **header,
        optimizer=optimizer,
        optimizer_steps=steps,
        states=states,
        world_size=distributed.world_size(),
        zero_stage=engine.zero_optimization_stage(),
        loss_scaler=state.loss_scaler(engine),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        tensors=tensors,
        files={name: FileInfo(**info) for name, info, _ in everyone},
    )
    final = step_directory(directory, manifest.step)
    _together(
        lambda: _commit(manifest, temporary, final) if distributed.is_main() else None, "committing", final
    )
    return final


def retained(steps: Sequence[int], keep_last: int, keep_every_steps: int) -> set[int]:
    """Which of the steps to keep: the last ones, and every n-th for ever."""
    forever = {step for step in steps if keep_every_steps and step % keep_every_steps == 0}
    return {*sorted(steps)[-keep_last:], *forever}


def apply_retention(directory: Path, config: CheckpointConfig) -> None:
    """Delete what need not be kept; rank 0 calls it after a commit. A failed deletion is reported and tried
    again later.
    """
    steps = steps_on_disk(directory)
    for step in sorted(set(steps) - retained(steps, config.keep_last, config.keep_every_steps)):
        try:
            _delete(step_directory(directory, step))
        except OSError as error:
            logger.warning(
                "old checkpoint %s could not be deleted (%s); trying again after the next save", step, error
            )


def verify(directory: Path) -> Manifest:
    """Check the manifest and every file of a step directory. Raises CheckpointError naming the first that is
    wrong.
    """
    manifest = Manifest.load(directory)
    for name, info in manifest.files.items():
        try:
            found = hash_file(directory / name)
        except FileNotFoundError:
            raise CheckpointError(f"{directory / name} is missing") from None
        if found.num_bytes != info.num_bytes:
            raise CheckpointError(
                f"{directory / name} has {found.num_bytes:,} bytes, the manifest says {info.num_bytes:,}"
            )
        if found.checksum != info.checksum:
            raise CheckpointError(f"{directory / name} is damaged: its checksum does not match the manifest")
    for name, tensor in manifest.tensors.items():
        covered = sum(count for _, _, count in tensor.fragments)
        if covered != numel(tensor.shape):
            raise CheckpointError(
                f"{directory}: its fragments hold {covered:,} of the {numel(tensor.shape):,} values of {name}"
            )
    return manifest


def newest_good(directory: Path) -> tuple[Path, Manifest] | None:
    """The newest checkpoint that verifies; newer ones that do not are named in a warning. None if there is
    none at all.

    Raises CheckpointError if there are checkpoints but none of them verifies: starting from scratch would
    lose the run.
    """
    broken = []
    for step in reversed(steps_on_disk(directory)):
        try:
            return step_directory(directory, step), verify(step_directory(directory, step))
        except CheckpointError as error:
            broken.append(str(error))
            logger.warning("checkpoint passed over: %s", error)
    if broken:
        raise CheckpointError(
            f"no checkpoint in {directory} verifies ({broken[0]}); restore one, or move the folder away to "
            "start afresh"
        )
    return None


def _prepare(directory: Path, temporary: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob(f"{_TEMPORARY}*"):  # of a save that was killed
        shutil.rmtree(leftover)
    temporary.mkdir()


def _commit(manifest: Manifest, temporary: Path, final: Path) -> None:
    manifest.save(temporary / MANIFEST)
    storage.fsync_directory(temporary)
    if final.exists():  # a broken one that was passed over: the run has now redone its steps
        _delete(final)
    os.rename(temporary, final)
    storage.fsync_directory(final.parent)
    storage.write_atomic(final.parent / LATEST, f"{final.name}\n".encode())


def _delete(path: Path) -> None:
    """Take the final name away first, so that a kill in the middle leaves no half checkpoint under it."""
    doomed = path.with_name(f"{_TEMPORARY}deleted-{path.name}")
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def _together(action: Callable[[], Any], verb: str, path: Path) -> Any:
    """Run a local action on every rank, and fail on every rank if it failed on any."""
    result, failure = None, ""
    try:
        result = action()
    except OSError as error:
        failure = f"{verb} {path} failed: {error.strerror or error}"
    failures = [text for text in distributed.gather_json(failure) if text]
    if failures:
        raise CheckpointError(
            f"{failures[0]}; the last checkpoint is intact: free space or mend the path, and start again"
        )
    return result


def numel(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
