"""Checkpoints checked by hand: many at a time, their files hashed by a few threads, with a progress bar on a
terminal.
"""

import dataclasses
import logging
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from vitscale import storage
from vitscale.checkpoint import store
from vitscale.checkpoint.format import MANIFEST, CheckpointError, FileInfo, Manifest

logger = logging.getLogger(__name__)
THREADS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checked:
    """A step directory, its manifest if that is readable, and what is wrong: "" where nothing was found."""

    folder: str
    manifest: Manifest | None
    problem: str


def places_of(run: str) -> list[str]:
    """Where a run's checkpoints lie: in its directory and in the store that its config names, or below its
    URL.
    """
    if not storage.is_local(run):
        return [store.child_of_run(run)]
    directory = Path(storage.local_path(run))
    try:
        config = tomllib.loads((directory / "config.toml").read_text(encoding="utf-8"))
        kept_in = config["checkpoint"]["store"]
    except (OSError, ValueError, KeyError):
        kept_in = ""
    return [str(store.directory_of(directory)), *([store.child_of_run(kept_in)] if kept_in else [])]


def committed(run: str) -> list[tuple[int, str]]:
    """(step, folder) of all the checkpoints of a run by rising step."""
    found = [
        (step, store.step_folder(place, step))
        for place in places_of(run)
        for step in store.steps_on_disk(place)
    ]
    return sorted(found, key=lambda pair: pair[0])


def open_directory(path: str) -> tuple[str, Manifest]:
    """The folder of the newest good checkpoint of a run, or a step directory itself, and its manifest.

    Newer ones that do not verify are named in a warning. Raises CheckpointError if there is none that does.
    """
    if MANIFEST in storage.names_in(path):
        return path, _good(check_all([path])[0])
    problems = []
    for _, folder in reversed(committed(path)):
        (found,) = check_all([folder])
        if not found.problem:
            return folder, _good(found)
        problems.append(found.problem)
        logger.warning("checkpoint passed over: %s", found.problem)
    if problems:
        raise store.none_verifies(path, problems[0])
    raise CheckpointError(
        f"{path} is not a checkpoint: give a run directory with checkpoints in it, a step directory, or an "
        "export"
    )


def check_all(folders: Sequence[str], *, checksums: bool = True) -> list[Checked]:
    """Check step directories, and report instead of raising; of each, the first problem is told.

    checksums: False compares the sizes of the files with the manifest's, and reads none of them.
    """
    opened = [_open(folder) for folder in folders]
    files = [
        (number, one.folder, name, info)
        for number, one in enumerate(opened)
        if one.manifest and not one.problem
        for name, info in one.manifest.files.items()
    ]
    places = [(folder, name, info) for _, folder, name, info in files]
    found = _check_files(places) if checksums else _check_sizes(places)
    problems: dict[int, str] = {}
    for (number, *_), problem in zip(files, found, strict=True):
        if problem:
            problems.setdefault(number, problem)
    return [
        dataclasses.replace(one, problem=one.problem or problems.get(number, ""))
        for number, one in enumerate(opened)
    ]


def _good(found: Checked) -> Manifest:
    if found.problem or not found.manifest:
        raise CheckpointError(found.problem)
    return found.manifest


def _open(folder: str) -> Checked:
    try:
        manifest = Manifest.load(folder)
    except CheckpointError as error:
        return Checked(folder=folder, manifest=None, problem=str(error))
    except OSError as error:
        return Checked(folder=folder, manifest=None, problem=f"{folder} cannot be read: {error.strerror}")
    return Checked(folder=folder, manifest=manifest, problem=store.check_coverage(folder, manifest))


def _check_sizes(files: Sequence[tuple[str, str, FileInfo]]) -> list[str]:
    paths = [storage.child(folder, name) for folder, name, _ in files]
    return [
        f"{path} is missing"
        if size is None
        else f"{path} has {size:,} bytes, the manifest says {info.num_bytes:,}" * (size != info.num_bytes)
        for path, size, (_, _, info) in zip(paths, storage.sizes(paths), files, strict=True)
    ]


def _check_files(files: Sequence[tuple[str, str, FileInfo]]) -> list[str]:
    total = sum(info.num_bytes for _, _, info in files)
    for folder in {storage.scheme(folder): folder for folder, _, _ in files}.values():
        storage.connect(folder)
    with (
        # disable=None: shown on a terminal alone
        tqdm(total=total, unit="B", unit_scale=True, desc="verifying", leave=False, disable=None) as bar,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        tasks = {pool.submit(_problem, *file): file[2].num_bytes for file in files}
        try:
            for task in as_completed(tasks):
                bar.update(tasks[task])
            return [task.result() for task in tasks]
        except BaseException:  # Ctrl-C, too, must not wait for the files still in the queue; raised again
            pool.shutdown(cancel_futures=True)
            raise


def _problem(folder: str, name: str, info: FileInfo) -> str:
    try:
        return store.check_file(folder, name, info)
    except OSError as error:
        return f"{storage.child(folder, name)} cannot be read: {error.strerror}"
