"""The scale bench: what it shows of layouts so small that the figures are known."""

import json
from pathlib import Path

import numpy as np
import pytest

from tools.bench import main
from vitscale.bench.ranks import Sharding
from vitscale.bench.scale import Parts, ScaleBench
from vitscale.errors import ConfigError
from vitscale.models.vit_config import ViTConfig
from vitscale.system.open_files import sockets

PARAMETERS = 76_712  # of mu/16 with 1000 classes
BYTES = 12  # a master and two moments in fp32


def test_a_resume_reads_what_a_rank_owns_and_nothing_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    assert main(["scale", "--ranks", "8,64", "--zero", "1,3", "--variant", "mu/16", "--json", str(out)]) == 0
    results = json.loads(out.read_text())["results"]
    assert results["parameters"] == PARAMETERS
    for world_size in (8, 64):
        for stage in (1, 3):
            figures = results[f"{world_size} ranks, ZeRO {stage}"]
            assert figures["files per save"] == world_size + 2
            share = figures["share of a rank in a checkpoint, MB"] * 1e6
            assert PARAMETERS * BYTES / world_size <= share < 1.2 * PARAMETERS * BYTES / world_size
            same = figures[f"resume on {world_size} ranks, ZeRO {stage}"]
            # the length of the header, the size, the header, and all values at once
            assert (same["files opened"], same["requests"], same["read / owned"]) == (1, 4, 1)
            fewer = figures[f"resume on {world_size // 2} ranks, ZeRO {stage}"]
            assert fewer["files hashed before"] == 2 and fewer["read / owned"] >= 1
    assert "manifest, MB" in capsys.readouterr().out


@pytest.mark.parametrize("world_size", [1, 7, 1000])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_value_belongs_to_one_rank(world_size: int, stage: int) -> None:
    parts = Parts.of(ViTConfig(variant="mu/16"))
    pieces = parts.cut(Sharding(world_size, stage))
    assert len(pieces) == world_size
    seen = np.concatenate(pieces)
    for number, size in enumerate(parts.sizes):
        own = seen[seen[:, 0] == number]
        own = own[np.argsort(own[:, 1])]
        assert [0, *own[:, 1:].sum(axis=1)] == [*own[:, 1], size]


def test_the_page_has_the_sockets_of_each_rank() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/measurements.md").read_text()
    (row,) = (line for line in page.splitlines() if line.startswith("| sockets: rank 0, others |"))
    cells = [f"{sockets(ranks, 0):,}, {sockets(ranks, 1):,}" for ranks in (1024, 1024, 4096, 4096)]
    assert [cell.strip() for cell in row.split("|")[2:-1]] == cells


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ConfigError, match="--ranks 3 must be 4 or more"):
        ScaleBench(ranks=(1024, 3))
    with pytest.raises(ConfigError, match="--zero 0, 1 must be of 1, 2 and 3"):
        ScaleBench(zero=(0, 1))
