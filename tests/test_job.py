"""What follows from a config and its data before anything starts."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from make import write_index

from vitscale import config as configs
from vitscale.data.sources import open_sources
from vitscale.errors import ConfigError
from vitscale.job import derive, worlds
from vitscale.train_config import TrainConfig


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], [1, 2, 3, 4, 6, 8, 12, 24]),
        (["engine.micro_batch=4"], [1, 2, 3, 6]),
        (["augment.mixup=0.2"], [1, 2, 3, 4, 6, 12]),
        (["augment.repeats=3", "engine.micro_batch=6"], [1, 2, 4]),
    ],
)
def test_the_numbers_of_processes_that_can_share_a_run(
    tmp_path: Path, overrides: list[str], expected: list[int]
) -> None:
    config = config_of(tmp_path, *overrides)
    assert worlds(config, open_sources(config.data)) == expected


def test_a_model_that_cannot_be_compiled_is_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path, "engine.compile=true", "precision=bf16", "model.mlp_dim=100")
    with pytest.raises(ConfigError, match=r"refused with model.mlp_dim = 100: .* use a multiple of 8"):
        derive(config, 1, open_sources(config.data))


@pytest.mark.parametrize(
    ("batch", "lanes", "way_out", "changes"),
    [
        (24, 12, "data.lanes = 0, or half as many", [["data.lanes=0"], ["data.lanes=6"]]),
        (18, 0, "global_batch = 16", [["global_batch=16"]]),
        (18, 3, "global_batch = 16", [["global_batch=16", "data.lanes=4"]]),
    ],
)
def test_what_leaves_repeated_samples_without_pairs_is_refused_with_a_way_out(
    tmp_path: Path, batch: int, lanes: int, way_out: str, changes: list[list[str]]
) -> None:
    given = ["augment.repeats=2", "augment.mixup=0.5", f"global_batch={batch}", f"data.lanes={lanes}"]
    config = config_of(tmp_path, *given)
    with pytest.raises(ConfigError, match=f"an even number .* in a step, not [0-9]*; use {way_out}$"):
        derive(config, 1, open_sources(config.data))
    for change in changes:
        changed = config_of(tmp_path, *given, *change)
        assert derive(changed, 1, open_sources(changed.data)).mixture.draws_per_step % 2 == 0


def test_what_a_job_reads_is_hashed_once(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    sources = open_sources(config.data)
    fewer = [dataclasses.replace(sources[0], excluded=np.array([3, 7]))]
    jobs = [derive(config, 1, tuple(opened)) for opened in (sources, fewer)]
    digests = [job.data_fingerprint for job in jobs]
    assert digests == [job.mixture.fingerprint([job.sources[0].fingerprint()]) for job in jobs]
    assert all(job.data_fingerprint is digest for job, digest in zip(jobs, digests, strict=True))
    assert jobs[0].fingerprint_with([sources[0].index.fingerprint()]) == digests[0]
    assert len({*digests, jobs[0].fingerprint_with(["another"])}) == 3


def config_of(folder: Path, *overrides: str) -> TrainConfig:
    index = write_index(folder / "shards", [40])
    given = [f"run_dir={folder / 'run'}", f"data.index={index}", "global_batch=24", "total_steps=1"]
    return configs.load(TrainConfig, [], [*given, "model.variant=Ti/16", "model.num_classes=5", *overrides])
