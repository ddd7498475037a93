"""Every ZeRO stage, world size and precision writes; every other one reads: no conversion, nothing
forgotten.
"""

import json
from pathlib import Path

import pytest
from multiprocess.zygote import Zygote

WORLDS = (1, 2, 3, 4)
TOLERANCES = {"fp32": 2e-6, "offload": 2e-6, "bf16": 2e-2}


@pytest.mark.parametrize("modes", ["fp32", "bf16"])
def test_every_layout_reads_what_every_layout_wrote(
    tmp_path: Path, zygote: Zygote, modes: str, capsys
) -> None:
    written = write_all(tmp_path, zygote, modes)
    assert len(written) == 3 * len(WORLDS) * len(modes.split())
    worst, exact = 0.0, 0
    for world in WORLDS:
        for pair, losses in read_all(tmp_path, zygote, world, modes).items():
            writer, reader = pair.split()
            expected = written[writer]
            difference = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
            if writer == reader:
                assert losses == expected, f"{pair} is the same layout, and not bit for bit the same"
                exact += 1
            assert difference <= TOLERANCES[modes], f"{pair}: the losses differ by {difference}"
            worst = max(worst, difference)
    assert exact == len(written)
    with capsys.disabled():
        pairs = len(written) ** 2
        print(
            f"\n{modes}: {pairs} pairs of layouts, worst difference of the losses {worst:.1e}, {exact} exact"
        )


def test_precisions_and_offload_read_one_another(tmp_path: Path, zygote: Zygote) -> None:
    written = write_all(tmp_path, zygote, "fp32 bf16 offload", worlds=(2,))
    for pair, losses in read_all(tmp_path, zygote, 3, "fp32 bf16 offload").items():
        writer = pair.split()[0]
        tolerance = 0.05 if "bf16" in pair else TOLERANCES["fp32"]
        assert losses == pytest.approx(written[writer], abs=tolerance), pair


def write_all(
    folder: Path, zygote: Zygote, modes: str, worlds: tuple[int, ...] = WORLDS
) -> dict[str, list[float]]:
    """Losses after the save, by the name of the checkpoint."""
    log = folder / "log"
    for world in worlds:
        statuses = zygote.run(
            world, "multiprocess.grid:write", folder / "saved", modes, log=log, timeout_seconds=180
        )
        assert statuses == [0] * world, log.read_text()[-3000:]
    return {
        path.name: json.loads((path / "losses.json").read_text()) for path in (folder / "saved").iterdir()
    }


def read_all(folder: Path, zygote: Zygote, world: int, modes: str) -> dict[str, list[float]]:
    """Losses after the load, by "WRITER READER"."""
    log, result = folder / "log", folder / "result.json"
    statuses = zygote.run(
        world, "multiprocess.grid:read", folder / "saved", modes, result, log=log, timeout_seconds=180
    )
    assert statuses == [0] * world, log.read_text()[-3000:]
    return json.loads(result.read_text())
