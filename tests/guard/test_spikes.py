"""Which losses stand out, and what is written down about them."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from make import write_index

from vitscale.data.data_config import DataConfig
from vitscale.data.index import Index
from vitscale.data.sources import open_sources
from vitscale.guard.spikes import NEEDED, Normal, Spikes


def losses(count: int) -> list[float]:
    rng = random.Random(0)
    return [2.0 + rng.gauss(0, 0.1) for _ in range(count)]


def test_a_loss_stands_out_by_its_deviations() -> None:
    normal = Normal(10.0)
    assert not any(normal.stands_out(loss) for loss in losses(200))
    median, deviation = normal.median_and_deviation()
    assert median == pytest.approx(2.0, abs=0.03) and deviation == pytest.approx(0.1, abs=0.02)
    assert normal.stands_out(median + 10.5 * deviation) and not normal.stands_out(median + 9.5 * deviation)
    assert not normal.stands_out(0.0)  # it may fall as far as it likes


def test_spikes_do_not_become_normal_and_a_new_level_does() -> None:
    normal = Normal(10.0)
    for loss in losses(100):
        normal.stands_out(loss)
    for _ in range(10):
        assert all(normal.stands_out(9.0) for _ in range(NEEDED - 1)) and not normal.stands_out(2.0)
    assert normal.median_and_deviation()[0] == pytest.approx(2.0, abs=0.05)
    assert all(normal.stands_out(7 + loss) for loss in losses(NEEDED))
    assert not any(normal.stands_out(7 + loss) for loss in losses(200))
    assert normal.stands_out(12.0)


def test_the_first_losses_are_not_judged_but_must_be_finite() -> None:
    normal = Normal(1.0)
    assert not any(normal.stands_out(loss) for loss in [2.0, 2.1] * (NEEDED // 2))
    assert Normal(1.0).stands_out(math.nan) and Normal(1.0).stands_out(math.inf)
    assert normal.stands_out(9.0)


def spikes_of(tmp_path: Path, deviations: float) -> list[dict]:
    path = write_index(tmp_path / "shards", [40, 37, 20])
    sources = open_sources(DataConfig(index=str(path)))
    spikes = Spikes(str(tmp_path), sources, [0], deviations)
    for step, loss in enumerate([*losses(60), 7.5, 2.0, math.nan], 1):
        spikes.add(step, step + 7, torch.tensor(loss), np.arange(step, step + 4))
        if step % 10 == 0:
            spikes.write()
    spikes.write()
    file = tmp_path / "spikes.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_a_step_is_written_down_with_the_places_of_its_samples(tmp_path: Path) -> None:
    spike, not_finite = spikes_of(tmp_path, 10.0)
    assert (spike["step"], spike["loss"], not_finite["step"], not_finite["loss"]) == (61, 7.5, 63, "nan")
    assert 1.8 < spike["median"] < 2.2 and 0.05 < spike["deviation"] < 0.2
    index = Index.load(str(tmp_path / "shards" / "index.json"))
    assert spike["data_step"] == 68
    assert len(spike["samples"]) == 4 and spike["samples"][0].startswith(f"{index.shards[1].url}, bytes ")
    assert spike["samples"][0].endswith("sample number 61")


def test_zero_writes_nothing_down(tmp_path: Path) -> None:
    assert spikes_of(tmp_path, 0.0) == []
