"""Whether a job may continue a run: by its settings, its length, its data and its teacher."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vitscale import config as configs
from vitscale import distributed
from vitscale.checkpoint.manifest import saved_config
from vitscale.checkpoint.verify import Checkpoint
from vitscale.data.quarantine import FILE_NAME as QUARANTINE_NAME
from vitscale.data.record import DataRecord
from vitscale.errors import ConfigError
from vitscale.job import Job
from vitscale.metrics.rows import each_row
from vitscale.train_config import TrainConfig

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


def check_continuation(job: Job, checkpoint: Checkpoint) -> None:
    """Raise ConfigError unless the job may continue the checkpoint.

    It must be of this experiment (run directories with the same store share its checkpoints),
    and have been trained on the data that the config names now, or on shards in which nothing
    but damage was fixed since. Every rank calls it.
    """
    folder, train = checkpoint.folder, checkpoint.manifest.train
    old = saved_config(TrainConfig, train.config, "", folder, train.writer)
    # [init] is not read again, and the fingerprint shows if the data differ.
    problem = difference(folder, folder, old, job, ("data", "init"))
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
    record = record_of(job)
    if not record or fingerprint not in map(job.fingerprint_with, record.fingerprints):
        changed = [change for change in _changes(old, job.config) if is_among(change[0], ("data",))]
        return _text(changed) or ("shards, their order or chunking, label maps or exclusions changed")
    return record.change([source.index for source in job.sources], replaced_samples(Path(job.config.run_dir)))


def record_of(job: Job) -> DataRecord | None:
    """The run directory's record of its data, unless that is of another number of sources."""
    record = DataRecord.load(job.config.run_dir)
    return record if record and len(record.sources) == len(job.sources) else None


def replaced_samples(folder: Path) -> Iterator[str]:
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


def difference(place: str, source: str, old: TrainConfig, job: Job, beside: Sequence[str] = ()) -> str:
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
