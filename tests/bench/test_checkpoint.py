"""The checkpoint bench on the smallest model: what it shows, and that it leaves nothing."""

import dataclasses
import json
from pathlib import Path

import pytest

from tools.bench import main
from vitscale.bench import ranks
from vitscale.bench.checkpoint import CheckpointBench
from vitscale.bench.ranks import Sharding
from vitscale.errors import ConfigError


def test_saving_loading_and_exporting_are_measured_beside_their_baselines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    options = ["--variant", "mu/16", "--rounds", "1", "--folder", str(tmp_path / "disk"), "--no-deepspeed"]
    assert main(["checkpoint", *options, "--json", str(out)]) == 0
    results = json.loads(out.read_text())["results"]
    assert results["layout"] == "2 ranks, ZeRO 1"
    # mu/16 with 1000 classes: 76,712 parameters, each with a master and two moments in fp32.
    assert results["megabytes"] == pytest.approx(76_712 * 12 / 1e6)
    assert results["saving"]["save / raw"] > 0
    assert results["blocked"]["training blocked, seconds"] < results["blocked"]["whole save, seconds"]
    loads = results["load on 2 ranks, ZeRO 1, of a checkpoint by"]
    assert list(loads) == ["2 ranks, ZeRO 1", "1 rank, ZeRO 1", "4 ranks, ZeRO 1", "2 ranks, ZeRO 3"]
    assert all(("both / same layout" in row) == (name != "2 ranks, ZeRO 1") for name, row in loads.items())
    assert results["export"]["largest tensor, MB"] == pytest.approx(4 * 32 * 1000 / 1e6)
    assert 0 <= results["export"]["timm: peak of what it holds, MB"] < 100
    assert "save / raw" in capsys.readouterr().out
    assert list((tmp_path / "disk").iterdir()) == []


def test_a_rank_that_fails_fails_the_measurement_with_its_own_words(tmp_path: Path) -> None:
    model = CheckpointBench(variant="mu/16").model
    with pytest.raises(Exception, match="holds no checkpoint"):
        ranks.start(2, ranks.measure_loads, model, 1, {"one": tmp_path / "nothing"}, 1)


def test_a_checkpoint_is_read_by_the_layout_that_wrote_it_and_by_others() -> None:
    config = CheckpointBench(ranks=2)
    assert config.own == Sharding(2, 1)
    assert config.others == [Sharding(1, 1), Sharding(4, 1), Sharding(2, 3)]
    assert config.elsewhere == Sharding(1, 1)
    alone = dataclasses.replace(config, ranks=1)
    assert alone.others == [Sharding(2, 1), Sharding(1, 3)]
    assert alone.elsewhere == Sharding(2, 1)


@pytest.mark.parametrize("option", ["rounds", "ranks"])
def test_no_rounds_and_no_ranks_are_refused(option: str) -> None:
    CheckpointBench(**{option: 1})
    with pytest.raises(ConfigError, match=f"^--{option} 0 must be above 0$"):
        CheckpointBench(**{option: 0})


def test_an_unknown_variant_is_refused() -> None:
    bench = CheckpointBench(variant="Q/16")
    with pytest.raises(ConfigError, match="variant"):
        bench.model  # noqa: B018 (a property)
