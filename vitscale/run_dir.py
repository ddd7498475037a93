"""A run directory: who holds it, its config.toml, and whether a job may continue its run."""

import contextlib
import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vitscale import __version__, distributed, history
from vitscale import config as configs
from vitscale.checkpoint import store
from vitscale.checkpoint.manifest import saved_config
from vitscale.checkpoint.verify import Checkpoint
from vitscale.data.quarantine import FILE_NAME as QUARANTINE_NAME
from vitscale.data.record import FILE_NAME as RECORD_NAME
from vitscale.data.record import DataRecord
from vitscale.errors import BusyError, ConfigError, StoreError, UserError
from vitscale.guard import ending
from vitscale.guard.spikes import FILE_NAME as SPIKES_NAME
from vitscale.job import Job
from vitscale.metrics import goodput
from vitscale.metrics.rows import each_row
from vitscale.metrics.writer import FILE_NAME as METRICS_NAME
from vitscale.progress import Progress
from vitscale.run_lock import RunLock
from vitscale.system import atomic
from vitscale.train_config import TrainConfig

CONFIG_NAME = "config.toml"
# The files that a run replaces as a whole.
REPLACED = (
    CONFIG_NAME, ending.STATUS_NAME, goodput.FILE_NAME, METRICS_NAME, QUARANTINE_NAME, RECORD_NAME,
    SPIKES_NAME,
)  # fmt: skip
# What may change at a resume: place, speed, logging, saving, evaluation, checks, expectations,
# and a longer total. check_continuation compares the JPEG decoder that is in use, and
# check_teacher the teacher itself.
LENGTH = ("total_steps", "total_epochs", "total_samples")
CHANGEABLE = (
    "run_dir",
    "engine",
    "log",
    "guard",
    "checkpoint",
    "evals",
    "expect",
    "finetune",
    *LENGTH,
    "data.decoder",
    "data.max_bad_fraction",
    "data.num_samples",
    "objective.teacher",
    "objective.teacher_weights",
)
# What a run that continues the full state of another must have in common with it.
SAME_STATE = ("model", "optim.name", "optim.freeze")
STATELESS = ("model.dropout", "model.drop_path")


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
    problem = _difference(f"run_dir {folder}", source, old, job, beside) or _left_behind(old, job)
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


def check_continuation(job: Job, checkpoint: Checkpoint) -> None:
    """Raise ConfigError unless the job may continue the checkpoint.

    It must be of this experiment (run directories with the same store share its checkpoints),
    and have been trained on the data that the config names now, or on shards in which nothing
    but damage was fixed since. Every rank calls it.
    """
    folder, train = checkpoint.folder, checkpoint.manifest.train
    old = saved_config(TrainConfig, train.config, "", folder, train.writer)
    # [init] is not read again, and the fingerprint shows if the data differ.
    problem = _difference(folder, folder, old, job, ("data", "init"))
    if problem:
        raise ConfigError(problem)
    if train.data_fingerprint != job.data_fingerprint:
        change = distributed.on_main(lambda: _data_change(job, old, train.data_fingerprint))
        if change:
            raise ConfigError(
                f"{folder} was trained on other data than the config names now ({change}), so it cannot "
                "continue where it stopped; restore the shards and index, or choose "
                f"{_another_run(folder, ['data'], job.config)}"
            )
    if train.decoder != job.decoder:
        raise ConfigError(
            f"{folder} was trained with the JPEG decoder {train.decoder}, here it is {job.decoder}; set "
            f'data.decoder = "{train.decoder}" (turbojpeg needs: pip install turbojpeg)'
        )
    if train.step > job.total_steps:
        raise ConfigError(
            f"{folder} is beyond the run's {job.total_steps:,} steps; raise the total or use another run_dir"
        )


def check_teacher(checkpoint: Checkpoint, digest: str, weights: str) -> None:
    """Raise ConfigError if a checkpoint was distilled from another teacher.

    digest, weights: of the teacher now; earlier versions saved that of the weights. Where its
    files are may change.
    """
    before = checkpoint.manifest.train.teacher
    if before not in (digest, weights):
        raise ConfigError(
            f"{checkpoint.folder} was distilled from another teacher, of digest {before}, and objective."
            f"teacher has the digest {digest}; name that teacher, or choose another run_dir with [init] "
            f'checkpoint = "{checkpoint.folder}", full_state = true, which continues it with the change'
        )


def _data_change(job: Job, old: TrainConfig, fingerprint: str) -> str:
    """What the job's data change beside damaged samples, as a clause; "" if nothing.

    old, fingerprint: the config and the data before. Only the run directory's record can show
    that nothing else has changed.
    """
    record = _record(job)
    if not record or fingerprint not in map(job.fingerprint_with, record.fingerprints):
        changed = [change for change in _changes(old, job.config) if is_among(change[0], ("data",))]
        return _text(changed) or ("shards, their order or chunking, label maps or exclusions changed")
    return record.change([source.index for source in job.sources], _replaced(Path(job.config.run_dir)))


def _record(job: Job) -> DataRecord | None:
    """The run directory's record of its data, unless that is of another number of sources."""
    record = DataRecord.load(job.config.run_dir)
    return record if record and len(record.sources) == len(job.sources) else None


def write_record(job: Job) -> None:
    """Keep what the job reads and, if only damage was fixed, which indexes it read before.

    Rank 0 calls it. A job that resumes calls it before it drops rows of the quarantine, which
    show what damage the run has found.
    """
    folder, indexes = Path(job.config.run_dir), [source.index for source in job.sources]
    old, new = _record(job), DataRecord.of(indexes)
    if old and not old.change(indexes, _replaced(folder)):
        new = old.followed_by(indexes)
    if new is not old:
        with _writing(job):
            new.save(folder)


def _replaced(folder: Path) -> Iterator[str]:
    """The sentences about all samples that the run could not use."""
    path = folder / QUARANTINE_NAME
    for row in each_row(path) if path.exists() else ():
        yield str(row.get("sample"))


def check_new_length(checkpoint: str, step: int, total_steps: int) -> None:
    """Raise ConfigError if another run's checkpoint leaves this run no steps to do."""
    if step >= total_steps:
        raise ConfigError(
            f"{checkpoint}, which init.full_state continues, has done all of the run's {total_steps:,} "
            "steps; raise the total, or take its weights alone: init.full_state = false"
        )


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


def _difference(place: str, source: str, old: TrainConfig, job: Job, beside: Sequence[str] = ()) -> str:
    """Why this job may not continue what is at `place`; "" if it may.

    source: what [init] checkpoint would name to start from it. old: its config. beside: more
    keys or sections that may differ.
    """
    new = job.config
    if changed := _changes(old, new, beside):
        keys = [key for key, _, _ in changed]
        return (
            f"{place} holds another experiment: {_text(changed)}; set them back to resume it, or choose "
            f"{_another_run(source, keys, new)}"
        )
    before, now = old.num_steps(job.mixture.steps_per_epoch), job.total_steps
    if before > now:
        return (
            f"{place} was started for {before:,} steps and cannot be shortened to {now:,}; set the total "
            f"back, or choose {_another_run(source, ['total_steps'], new)}"
        )
    return ""


def _another_run(source: str, keys: Sequence[str], new: TrainConfig) -> str:
    """Where a change of these keys is possible, with the lines that continue `source` there."""
    another = "another run_dir and checkpoint.store" if new.checkpoint.store else "another run_dir"
    changed = [key for key in keys if not is_among(key, ("init",))]
    if not changed:
        return another
    if any(is_among(key, SAME_STATE) and not is_among(key, STATELESS) for key in changed):
        return f'{another}, which [init] checkpoint = "{source}" starts from its weights'
    lines = f'[init] checkpoint = "{source}", full_state = true'
    return f"{another} with {lines}, which continues it with the change"


def _changes(old: TrainConfig, new: TrainConfig, beside: Sequence[str] = ()) -> list[tuple[str, Any, Any]]:
    """What differs and is neither CHANGEABLE nor among `beside`: keys with both values."""
    changes = configs.differences(configs.to_dict(old), configs.to_dict(new))
    return [change for change in changes if not is_among(change[0], (*CHANGEABLE, *beside))]


def _text(changes: Sequence[tuple[str, Any, Any]]) -> str:
    return ", ".join(f"{key} was {old!r}, now {new!r}" for key, old, new in changes)


def is_among(key: str, names: Sequence[str]) -> bool:
    """Whether a dotted key is one of the keys, or lies in one of the sections."""
    return any(key == name or key.startswith(f"{name}.") for name in names)
