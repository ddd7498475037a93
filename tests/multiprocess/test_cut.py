"""The arithmetic of `tools/bench.py scale` is that of real engines."""

import json
from pathlib import Path

import pytest
from multiprocess.starts import note_pieces
from multiprocess.zygote import Zygote

from vitscale.bench.ranks import Sharding
from vitscale.bench.scale import Parts
from vitscale.models.vit_config import ViTConfig


@pytest.mark.parametrize("world_size", [1, 3])
def test_parts_are_cut_as_deepspeed_cuts_them(tmp_path: Path, zygote: Zygote, world_size: int) -> None:
    log = tmp_path / "log"
    statuses = zygote.run(world_size, note_pieces, "mu/16", tmp_path / "pieces", log=log)
    assert statuses == [0] * world_size, log.read_text()
    parts = Parts.of(ViTConfig(variant="mu/16"))
    names = list(parts.shapes)
    for stage in (1, 2, 3):
        for rank, rows in enumerate(parts.cut(Sharding(world_size, stage))):
            real = json.loads((tmp_path / f"pieces-{stage}-{rank}.json").read_text())
            assert [[names[number], start, count] for number, start, count in rows.tolist()] == real
