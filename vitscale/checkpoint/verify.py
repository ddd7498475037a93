"""Which checkpoint is good: checks its manifest, what its fragments cover, and every checksum.

A reader trusts checksums, not names, and walks back to the newest checkpoint that passes:
alone, with a few threads, or on all ranks together, each hashing its share of the files.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from vitscale import distributed, toml
from vitscale.checkpoint import store
from vitscale.checkpoint.manifest import MANIFEST, Manifest, absence, read_text
from vitscale.checkpoint.safetensors import FileInfo, hash_file
from vitscale.errors import CheckpointError, StoreError
from vitscale.stores import storage

logger = logging.getLogger(__name__)
THREADS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """A step directory, its manifest if that is readable, and its first problem; "" = none."""

    folder: str
    manifest: Manifest | None
    problem: str


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that passed. passed_over: the folders or URLs of newer ones that failed."""

    folder: str
    manifest: Manifest
    passed_over: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.folder


Check = Callable[[str], Verdict]
Untried = Callable[[Collection[str]], str]


def newest_good(untried: Untried, place: str, check: Check) -> Checkpoint | None:
    """The newest candidate that passes, or None if there are none.

    untried: gives the newest candidate that is not among those that have failed, "" if there is
        none. It looks again each time: a live run may have saved another one meanwhile.
    place: the run that the error names, or the step directory if that is the only candidate.
    check: `alone`, `at_a_glance` or `together`.

    Each candidate that is passed over is logged as a warning. Raises CheckpointError if there
    are some and none passes: to start from scratch would lose the run.
    """
    problems: dict[str, str] = {}  # of those that failed
    while folder := untried(problems):
        verdict = check(folder)
        if verdict.manifest and not verdict.problem:
            return Checkpoint(folder, verdict.manifest, tuple(problems))
        problems[folder] = verdict.problem
        if distributed.is_main() and folder != place:
            logger.warning("checkpoint passed over: %s", verdict.problem)
    if not problems:
        return None
    first = next(iter(problems.values()))
    if list(problems) == [place]:
        raise CheckpointError(first)
    raise CheckpointError(
        f"no checkpoint in {place} verifies ({first}); restore one, or move the folder away to start from "
        "scratch"
    )


def first_untried(committed: Iterable[tuple[int, str]], failed: Collection[str]) -> str:
    """The first folder of some checkpoints that is not among those that failed; "" = none."""
    return next((folder for _, folder in committed if folder not in failed), "")


def alone(folder: str) -> Verdict:
    """Check a step directory in this process, with a few threads that hash the files."""
    return check_all([folder])[0]


def at_a_glance(folder: str) -> Verdict:
    """As alone, by the sizes of the files: nothing is hashed."""
    return check_all([folder], checksums=False)[0]


def together(folder: str) -> Verdict:
    """Check a step directory on all ranks, each hashing its share of the files.

    Rank 0 reads the manifest for all of them. A share is hashed by a few threads.
    Every rank gets the same verdict. Raises StoreError on every rank if one of them gets a
    refusal or no answer, which says nothing about the checkpoint.
    """
    text, problem = distributed.on_main(lambda: _read(folder))
    if problem:
        return Verdict(folder=folder, manifest=None, problem=problem)
    manifest, problem = distributed.together(lambda: _check_share(folder, text))
    return Verdict(folder=folder, manifest=manifest, problem=distributed.first_of(problem or None) or "")


def _read(folder: str) -> tuple[str, str]:
    """The text of a manifest, and why it cannot be read."""
    try:
        return read_text(folder), ""
    except CheckpointError as error:
        return "", str(error)
    except PermissionError as error:
        raise StoreError(f"{error.filename or folder} cannot be read: {error.strerror}") from None
    except OSError as error:
        return "", f"{error.filename or folder} cannot be read: {error.strerror}"


def _check_share(folder: str, text: str) -> tuple[Manifest | None, str]:
    """The manifest, and what is wrong with it or with this rank's files.

    text: of the manifest, as rank 0 read it; one rank of each node compares it with its own.
    """
    manifest = None
    try:
        first_of_node = distributed.local_rank() == 0 and not distributed.is_main()
        if first_of_node and storage.is_local(folder) and _read(folder)[0] != text:
            differs = f"{folder} differs between ranks 0 and {distributed.rank()}"
            return None, f"{differs}: it must be on a file system that all nodes share"
        manifest = Manifest.parse(text, folder)
        problem = check_manifest(folder, manifest)
        share = [] if problem else manifest.file_names[distributed.rank() :: distributed.world_size()]
        storage.connect(folder)
        with ThreadPoolExecutor(THREADS) as pool:
            problems = pool.map(lambda name: check_file(folder, name, manifest.files[name]), share)
            problem = next(filter(None, (problem, *problems)), "")
    except CheckpointError as error:
        problem = str(error)
    except PermissionError as error:
        raise StoreError(f"{error.filename or folder} cannot be read: {error.strerror}") from None
    except OSError as error:
        problem = f"{error.filename or folder} cannot be read: {error.strerror}"
    return manifest, problem


def places_of(run: str) -> list[str]:
    """Where a run keeps its checkpoints.

    For a directory: in it, and in the store that its config names. For a URL: below it.
    """
    if not storage.is_local(run):
        return [store.child_of_run(run)]
    directory = Path(storage.local_path(run))
    try:
        config = toml.parse((directory / "config.toml").read_text(encoding="utf-8"))
        url = config["checkpoint"]["store"]
    except (OSError, ValueError, KeyError, TypeError):
        url = ""
    return [str(store.directory_of(directory)), *([store.child_of_run(url)] if url else [])]


def committed(run: str) -> list[tuple[int, str]]:
    """(step, folder) of all checkpoints of a run, sorted by step."""
    return sorted(store.committed_in(places_of(run)))


def untried_at(path: str, failed: Collection[str]) -> str:
    """The newest checkpoint of a run or step directory that has not failed; "" = none.

    Raises CheckpointError if there are none, also for an export.
    """
    names = storage.names_in(path)
    if MANIFEST in names:
        return "" if path in failed else path
    folder = first_untried(store.committed_in(places_of(path)), failed)
    if folder or (failed and path not in failed):
        return folder
    if path.endswith(".safetensors") or any(name.startswith("model.safetensors") for name in names):
        raise CheckpointError(f"{path} is an export: it holds weights alone; give a run or step directory")
    if store.step_of(path) is not None:
        raise CheckpointError(absence(path))
    raise CheckpointError(
        f"{path} is not a checkpoint: give a run directory with checkpoints in it, a step directory, or for "
        "weights alone an export in safetensors; convert other files with tools/checkpoint.py import"
    )


def open_directory(path: str, check: Check = alone) -> Checkpoint:
    """The checkpoint that a path means: a run's newest good one, or a step directory.

    check: `alone` or `at_a_glance`. Raises CheckpointError if there is none that passes.
    """
    checkpoint = newest_good(lambda failed: untried_at(path, failed), path, check)
    assert checkpoint, "there are candidates, or an error"
    return checkpoint


def open_together(path: str) -> Checkpoint:
    """As open_directory, checked by all ranks together; every rank calls it."""
    with distributed.alike():
        checkpoint = newest_good(
            lambda failed: distributed.on_main(lambda: untried_at(path, failed)), path, together
        )
    assert checkpoint, "there are candidates, or an error"
    return checkpoint


def check_all(folders: Sequence[str], *, checksums: bool = True) -> list[Verdict]:
    """Check step directories in this process, with a progress bar on a terminal.

    checksums: False compares only the sizes of the files with the manifest.
    """
    verdicts = [_open(folder) for folder in folders]
    files = [
        (index, verdict.folder, name, info)
        for index, verdict in enumerate(verdicts)
        if verdict.manifest and not verdict.problem
        for name, info in verdict.manifest.files.items()
    ]
    places = [(folder, name, info) for _, folder, name, info in files]
    problems: dict[int, str] = {}
    results = _check_files(places) if checksums else _check_sizes(places)
    for (index, *_), problem in zip(files, results, strict=True):
        if problem:
            problems.setdefault(index, problem)
    return [
        dataclasses.replace(verdict, problem=verdict.problem or problems.get(index, ""))
        for index, verdict in enumerate(verdicts)
    ]


def check_file(folder: str | Path, name: str, expected: FileInfo) -> str:
    """What is wrong with a file, as a sentence; "" if size and checksum are the manifest's."""
    path = storage.child(folder, name)
    try:
        actual = hash_file(path)
    except FileNotFoundError:
        return f"{path} is missing"
    if actual.num_bytes != expected.num_bytes:
        return _wrong_size(path, actual.num_bytes, expected)
    if actual.checksum != expected.checksum:
        return f"{path} is damaged: its checksum does not match the manifest"
    return ""


def check_manifest(folder: str | Path, manifest: Manifest) -> str:
    """Why a manifest cannot be that of its folder, as a sentence; "" if it can."""
    step = store.step_of(folder)
    if step not in (None, manifest.step):
        return f"{folder} holds the {MANIFEST} of step {manifest.step:,}: rename it or delete it"
    return _check_coverage(folder, manifest)


def _check_coverage(folder: str | Path, manifest: Manifest) -> str:
    """Which tensor the fragments do not cover exactly once, as a sentence; "" if none.

    Sorted by start, each must begin where the last one ended; by (start, count):

        (0, 4), (4, 6)    cover 10 values
        (0, 4), (5, 5)    leave a gap
        (0, 4), (3, 7)    overlap
    """
    for name, tensor in manifest.tensors.items():
        num_values = math.prod(tensor.shape)
        ordered = sorted(tensor.fragments, key=lambda fragments: fragments.start)
        starts = [*(fragments.start for fragments in ordered), num_values]
        if starts != [0, *(fragments.end for fragments in ordered)]:
            return f"{folder}: its fragments do not hold the {num_values:,} values of {name} once each"
    return ""


def _open(folder: str) -> Verdict:
    try:
        manifest = Manifest.load(folder)
    except CheckpointError as error:
        return Verdict(folder=folder, manifest=None, problem=str(error))
    except OSError as error:
        return Verdict(folder=folder, manifest=None, problem=f"{folder} cannot be read: {error.strerror}")
    return Verdict(folder=folder, manifest=manifest, problem=check_manifest(folder, manifest))


def _check_sizes(files: Sequence[tuple[str, str, FileInfo]]) -> list[str]:
    paths = [storage.child(folder, name) for folder, name, _ in files]
    problems = []
    for path, num_bytes, (_, _, info) in zip(paths, storage.sizes(paths), files, strict=True):
        if num_bytes is None:
            problems.append(f"{path} is missing")
        else:
            problems.append("" if num_bytes == info.num_bytes else _wrong_size(path, num_bytes, info))
    return problems


def _wrong_size(path: str, num_bytes: int, expected: FileInfo) -> str:
    return f"{path} has {num_bytes:,} bytes, the manifest says {expected.num_bytes:,}"


def _check_files(files: Sequence[tuple[str, str, FileInfo]]) -> list[str]:
    total = sum(info.num_bytes for _, _, info in files)
    for folder in {storage.scheme(folder): folder for folder, _, _ in files}.values():
        storage.connect(folder)
    with (
        # disable=None: shown on a terminal only
        tqdm(total=total, unit="B", unit_scale=True, desc="verifying", leave=False, disable=None) as bar,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        tasks = {pool.submit(_problem, *file): file[2].num_bytes for file in files}
        try:
            for task in as_completed(tasks):
                bar.update(tasks[task])
            return [task.result() for task in tasks]
        except BaseException:  # Ctrl-C, too, must not wait for the files in the queue
            pool.shutdown(cancel_futures=True)
            raise


def _problem(folder: str, name: str, info: FileInfo) -> str:
    try:
        return check_file(folder, name, info)
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"{storage.child(folder, name)} cannot be read: {error.strerror}"
