"""A run directory: who holds it, and what a start leaves in it."""

import contextlib
import errno
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vitscale import __version__, distributed
from vitscale import config as configs
from vitscale.checkpoint import store
from vitscale.data.quarantine import FILE_NAME as QUARANTINE_NAME
from vitscale.data.record import FILE_NAME as RECORD_NAME
from vitscale.data.record import DataRecord
from vitscale.errors import BusyError, ConfigError, StoreError, UserError
from vitscale.guard import ending
from vitscale.guard.spikes import FILE_NAME as SPIKES_NAME
from vitscale.job import Job
from vitscale.metrics import goodput
from vitscale.metrics.writer import FILE_NAME as METRICS_NAME
from vitscale.progress import Progress
from vitscale.run_dir import history
from vitscale.run_dir.continuation import difference, record_of, replaced_samples
from vitscale.run_dir.lock import RunLock
from vitscale.system import atomic
from vitscale.train_config import TrainConfig

CONFIG_NAME = "config.toml"
# The files that a run replaces as a whole.
REPLACED = (
    CONFIG_NAME, ending.STATUS_NAME, goodput.FILE_NAME, METRICS_NAME, QUARANTINE_NAME, RECORD_NAME,
    SPIKES_NAME,
)  # fmt: skip


@contextlib.contextmanager
def claimed(job: Job) -> Iterator[None]:
    """Hold the run directory within the block; every rank enters it.

    Raises BusyError if another job holds it, ConfigError if another experiment is in it or its
    checkpoints are where this config does not look, and StoreError if it cannot be written
    or its store does not answer.
    """
    folder = Path(job.config.run_dir)
    lock: RunLock | None = None

    def claim() -> None:
        nonlocal lock
        with _writing(job):
            folder.mkdir(parents=True, exist_ok=True)
            lock = RunLock(folder)
        for name in REPLACED:  # a kill may have left a half written one
            atomic.clean(folder / name)
        try:
            check_run_dir(job)
        except UserError as error:
            lock.release()
            note_refusal(str(folder), error)
            raise

    try:
        distributed.on_main(claim)
        if distributed.local_rank() == 0:  # with checkpoint.store, each node may have its own folder
            store.clean(store.directory_of(folder))
        yield
    finally:
        if lock:
            lock.release()


def note_refusal(run_dir: str, error: UserError) -> None:
    """Let the status of a run that is not done say why it was not started.

    Rank 0 calls it. It does nothing where one is under way, or where no run was started yet
    and no launcher hides the exit status.
    """
    status = ending.read(run_dir) or {"state": "", "step": 0, "total_steps": 0}
    if status["state"] == "done" or not (status["state"] or distributed.is_launched()):
        return
    with contextlib.suppress(OSError, BusyError):
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        lock = RunLock(run_dir)
        step, total_steps = status["step"], status["total_steps"]
        ending.write(Path(run_dir), "failed", step, total_steps, str(error), error.status)
        lock.release()


def check_place(job: Job) -> None:
    """Raise StoreError if the run directory could not be made or written; nothing is."""
    folder = Path(job.config.run_dir).absolute()
    with _writing(job):
        existing = next(place for place in (folder, *folder.parents) if place.exists())
        if not existing.is_dir():
            reason = errno.EEXIST if existing == folder else errno.ENOTDIR
            raise OSError(reason, os.strerror(reason))
        if not os.access(existing, os.W_OK | os.X_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))


def check_run_dir(job: Job) -> None:
    """Raise ConfigError if the run directory's config is another experiment's.

    And if its checkpoints are where the job's config does not look.
    """
    folder = Path(job.config.run_dir)
    if not (folder / CONFIG_NAME).exists():
        return
    old = saved_config_at(folder / CONFIG_NAME)
    # Where there is a checkpoint, its fingerprint shows whether the data are others.
    beside = ("data",) if store.Home.of(str(folder), old.checkpoint).newest() else ()
    source = old.checkpoint.store or str(folder)
    problem = difference(f"run_dir {folder}", source, old, job, beside) or _left_behind(old, job)
    if problem:
        raise ConfigError(problem)


def write_config(job: Job, progress: Progress, versions: Mapping[str, str]) -> dict[str, Any]:
    """Write the resolved config, the record of the data and the start into the run directory.

    Every rank calls it. A job calls it once it has started: a mistake at the first start then
    binds nobody. Returns the row of history.jsonl.
    """

    def write() -> dict[str, Any]:
        folder = Path(job.config.run_dir)
        path = folder / CONFIG_NAME
        write_record(job)
        with _writing(job):
            row = history.add_start(job, progress, saved_config_at(path) if path.exists() else None, versions)
            atomic.write(path, configs.to_toml(job.config).encode())
        return row

    return distributed.on_main(write)


def write_record(job: Job) -> None:
    """Keep what the job reads and, if only damage was fixed, which indexes it read before.

    Rank 0 calls it. A job that resumes calls it before it drops rows of the quarantine, which
    show what damage the run has found.
    """
    folder, indexes = Path(job.config.run_dir), [source.index for source in job.sources]
    old, new = record_of(job), DataRecord.of(indexes)
    if old and not old.change(indexes, replaced_samples(folder)):
        new = old.followed_by(indexes)
    if new is not old:
        with _writing(job):
            new.save(folder)


def saved_config_at(path: Path, elsewhere: str = "") -> TrainConfig:
    """The config of the run that is there.

    elsewhere: what else a user may do if this version does not read it; "" = continue the run
    in another run_dir. Raises ConfigError, which names the file and that.
    """
    new_run = f'another run_dir with [init] checkpoint = "{path.parent}", full_state = true'
    try:
        return configs.load(TrainConfig, [path])
    except ConfigError as error:
        raise ConfigError(
            f"{path} cannot be read by this vitscale ({__version__}): {error}; "
            f"use the version that began the run, or {elsewhere or new_run}"
        ) from None


@contextlib.contextmanager
def _writing(job: Job) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"run_dir {job.config.run_dir} cannot be written: {error.strerror}; choose another"
        ) from None


def _left_behind(old: TrainConfig, job: Job) -> str:
    """Why checkpoint.store may not change; "" if the old place has nothing newer."""
    new = job.config
    if old.checkpoint.store == new.checkpoint.store:
        return ""
    before, now = (store.Home.of(new.run_dir, c.checkpoint).newest() for c in (old, new))
    if not before or (now and now[0] >= before[0]):
        return ""
    return (
        f"run_dir {new.run_dir} has its newest checkpoint at {before[1]}, where checkpoint.store = "
        f"{new.checkpoint.store!r} does not look; set it back to {old.checkpoint.store!r}, or copy the "
        "checkpoints to the new place first"
    )
