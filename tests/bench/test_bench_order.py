"""The benches of data and order: small sets, sorted shards, and what is shown meanwhile."""

import json
from pathlib import Path

import pytest

from tools import bench
from tools.bench import main
from vitscale.bench import data
from vitscale.bench.data import DataBench
from vitscale.bench.order import (
    OrderBench,
    order_of,
    prove_epoch,
    prove_ranks,
    shuffle_quality,
    write_index,
)
from vitscale.bench.sorted import SortedBench, run
from vitscale.data.index import Index
from vitscale.errors import ConfigError


def test_a_small_set_is_measured(tmp_path: Path) -> None:
    """Shards of one chunk, and a number of lanes that 8 ranks cannot share."""
    options = ["--samples", "640", "--shards", "20", "--world", "5", "--global-batch", "100"]
    options += ["--workers", "0", "--sample-bytes", "3000", "--folder", str(tmp_path / "set")]
    options += ["--chunk-order", "stratified"]
    assert main(["order", *options, "--json", str(tmp_path / "out.json")]) == 0
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert results["data_side_megabytes_at_world_5"] > 0 and results["data_side_megabytes_at_world_4"] > 0
    assert results["nothing_lost_or_repeated"] and results["positions"] == 600
    assert results["ranks_do_not_overlap"] and results["ids_walked"] == 300


@pytest.mark.parametrize(
    ("samples", "shards", "world", "global_batch"),
    [(64, 1, 1, 16), (1000, 4, 4, 64), (1000, 31, 2, 8), (5000, 5, 1024, 1024)],
)
def test_the_order_of_a_set_of_any_size_is_proven(
    tmp_path: Path, samples: int, shards: int, world: int, global_batch: int
) -> None:
    config = OrderBench(
        samples=samples,
        shards=shards,
        world=world,
        global_batch=global_batch,
        sample_bytes=3000,
        folder=tmp_path,
    )
    index = Index.load(str(write_index(config)))
    assert index.num_samples == samples and len(index.shards) == shards
    mixture = order_of(index, config)
    assert prove_epoch(mixture)["nothing_lost_or_repeated"]
    assert prove_ranks(mixture, world)["ranks_do_not_overlap"]
    assert shuffle_quality(mixture)["shards_in_a_batch"] <= shards


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--samples 100 --shards 4", "--samples 100 must be at least 16384: 32 for each of the 4 shards"),
        ("--samples 9999 --shards 9999 --global-batch 8", "--samples 9999 must be at least 319968"),
        ("--samples 9999 --shards 9 --global-batch 64 --world 3", "--world 3 must divide the 64 lanes"),
        ("--shards 0", "--shards 0 must be above 0"),
        ("--world -1", "--world -1 must be above 0"),
        ("--global-batch 0", "--global-batch 0 must be above 0"),
        ("--sample-bytes 0", "--sample-bytes 0 must be above 0"),
        ("--workers -2", "--workers -2 must be 0 or more"),
    ],
)
def test_a_set_that_is_too_small_is_one_sentence(capsys, options: str, sentence: str) -> None:
    assert main(["order", *options.split()]) == 2
    assert sentence in capsys.readouterr().err


def test_sorted_shards_are_simulated_beside_uniform_draws() -> None:
    results = run(SortedBench(samples=20_000, classes=10, global_batch=64), lambda _: None)
    shuffled, before = results["shuffled shards, defaults"], results["sorted shards, defaults"]
    assert shuffled["spread_of_64_steps"] == pytest.approx(1, abs=0.25)
    assert abs(shuffled["correlation_with_the_next_batch"]) < 0.1 and results["uniform draws"] == {
        "classes_in_a_batch": 10 * (1 - 0.9**64),
        "pairs_of_one_class": 0.1,
    }
    assert before["spread_of_64_steps"] > 3 and before["correlation_with_the_next_batch"] > 0.2
    stratified = results["sorted shards, stratified"]
    assert stratified["samples_in_memory"] == before["samples_in_memory"]
    assert stratified["spread_of_64_steps"] < before["spread_of_64_steps"] / 2
    best = results["sorted shards, stratified, chunks of 8, window_chunks = 8"]
    assert best["samples_in_memory"] == before["samples_in_memory"] and best["spread_of_64_steps"] < 1.2
    assert best["spread_of_a_batch"] == pytest.approx(1, abs=0.1)


def test_a_simulation_that_cannot_be_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="--classes 1 must be from 2"):
        SortedBench(samples=100, classes=1, global_batch=4)
    with pytest.raises(ConfigError, match="--global-batch 64 must be from 2 to a quarter"):
        SortedBench(samples=100, classes=10, global_batch=64)


class Seen(Exception):
    pass


def stop(stage: str) -> None:
    raise Seen(stage)


def test_measuring_says_what_it_does_before_anything_is_read() -> None:
    with pytest.raises(Seen, match=r"reading train-\*.tar"):
        data.run(DataBench(shards="train-*.tar"), stop)


def test_progress_is_shown_without_a_terminal_but_not_too_often(capsys, monkeypatch) -> None:
    show = bench.Progress()
    show("first")
    show("second")
    assert capsys.readouterr().err == "first ...\n"
    monkeypatch.setattr(bench, "SECONDS_BETWEEN_LINES", 0)
    show("third")
    assert capsys.readouterr().err == "third ...\n"
