"""Every ZeRO stage, world size and precision reads what every other one wrote, unconverted.

By default each layout reads its own checkpoint and a few others, with --sweep all of them.
"""

import itertools
import json
import random
from collections.abc import Collection, Sequence
from pathlib import Path

import pytest
from multiprocess import grid
from multiprocess.grid import STAGES, name_of
from multiprocess.zygote import Zygote

SEED = 0
OTHERS = 2  # how many checkpoints of other layouts each layout reads by default
WORLDS = (1, 2, 3, 4)
TOLERANCES = {"fp32": 2e-6, "offload": 2e-6, "bf16": 2e-2}
TIMEOUT_SECONDS = 180


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_every_layout_reads_what_every_layout_wrote(
    tmp_path: Path, zygote: Zygote, mode: str, sweep: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    layouts = [name_of(mode, stage, world) for world in WORLDS for stage in STAGES]
    pairs = draw_pairs(layouts, len(layouts) - 1 if sweep else OTHERS)
    expected = write(tmp_path, zygote, [mode], WORLDS)
    losses = read(tmp_path, zygote, [mode], WORLDS, pairs)
    assert losses.keys() == set(pairs)
    differences = {
        (writer, reader): max(
            abs(a - b) for a, b in zip(losses[writer, reader], expected[writer], strict=True)
        )
        for writer, reader in pairs
    }
    for pair, difference in differences.items():
        assert difference <= TOLERANCES[mode], f"{pair}: the losses differ by {difference}"
    for layout in layouts:
        assert differences[layout, layout] == 0, f"{layout} does not continue its own run bit for bit"
    with capsys.disabled():
        worst = max(differences.values())
        print(
            f"\n{mode}: {len(pairs)} pairs of layouts (seed {SEED}), the losses differ by {worst:.1e} at most"
        )


def test_precisions_and_offload_read_one_another(tmp_path: Path, zygote: Zygote, sweep: bool) -> None:
    """Written on 2 ranks, read on 3; by default a layout reads one checkpoint of each mode."""
    modes, rng = ("fp32", "bf16", "offload"), random.Random(SEED)
    pairs = [
        (name_of(written_mode, written_stage, 2), name_of(mode, stage, 3))
        for mode, stage, written_mode in itertools.product(modes, STAGES, modes)
        for written_stage in (STAGES if sweep else rng.sample(STAGES, 1))
    ]
    expected = write(tmp_path, zygote, modes, worlds=(2,))
    losses = read(tmp_path, zygote, modes, (3,), pairs)
    assert losses.keys() == set(pairs)
    for (writer, reader), values in losses.items():
        tolerance = 0.05 if "bf16" in writer + reader else TOLERANCES["fp32"]
        assert values == pytest.approx(expected[writer], abs=tolerance), f"{writer} {reader}"


def draw_pairs(layouts: Sequence[str], others: int) -> list[tuple[str, str]]:
    """(writer, reader): each layout with itself, and with `others` as writer and as reader.

    On a circle of shuffled layouts, the readers are at random distances from their writers.
    """
    rng = random.Random(SEED)
    circle = rng.sample(layouts, len(layouts))
    distances = [0, *rng.sample(range(1, len(circle)), others)]
    return [
        (circle[i], circle[(i + distance) % len(circle)])
        for i in range(len(circle))
        for distance in distances
    ]


def write(
    folder: Path, zygote: Zygote, modes: Sequence[str], worlds: Sequence[int]
) -> dict[str, list[float]]:
    """Losses after the save, by layout."""
    saved, log = folder / "saved", folder / "log"
    for world in worlds:
        statuses = zygote.run(world, grid.write, saved, modes, log=log, timeout_seconds=TIMEOUT_SECONDS)
        assert statuses == [0] * world, log.read_text()[-3000:]
    return {path.name: json.loads((path / "losses.json").read_text()) for path in saved.iterdir()}


def read(
    folder: Path,
    zygote: Zygote,
    modes: Sequence[str],
    worlds: Sequence[int],
    pairs: Collection[tuple[str, str]],
) -> dict[tuple[str, str], list[float]]:
    """Losses after the load, by (writer, reader)."""
    saved, result, log = folder / "saved", folder / "result.json", folder / "log"
    losses = {}
    for world in worlds:
        arguments = (saved, modes, pairs, result)
        statuses = zygote.run(world, grid.read, *arguments, log=log, timeout_seconds=TIMEOUT_SECONDS)
        assert statuses == [0] * world, log.read_text()[-3000:]
        losses |= {(writer, reader): values for writer, reader, values in json.loads(result.read_text())}
    return losses
