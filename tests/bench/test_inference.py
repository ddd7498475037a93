"""The inference bench: rows of tiny models, the end of a sweep, its file, and Figure 12."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tools.bench import FIGURE12_MODELS, FIGURE12_SIZES, main
from vitscale.bench import inference
from vitscale.bench.figures import draw_inference
from vitscale.bench.inference import InferenceBench, at_size, measure, model_of, past_peak, sweep
from vitscale.inspection.figures import new_figure
from vitscale.models import build_model
from vitscale.models.resnet import ResNetConfig
from vitscale.models.vit_config import ViTConfig

SMALL = ["--max-batch", "2", "--rounds", "1"]


@pytest.fixture(autouse=True)
def rounds_are_short(monkeypatch) -> None:
    monkeypatch.setattr(inference, "ROUND_SECONDS", 1e-3)


def bench(max_batch: int = 2, precision: str = "fp32") -> InferenceBench:
    return InferenceBench(models={}, sizes=[32], precision=precision, max_batch=max_batch, rounds=1)


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    results = json.loads(path.read_text())["results"]
    return {name: row for name, row in results.items() if isinstance(row, dict)}


def test_each_model_and_size_is_a_row_and_a_file_is_continued(tmp_path: Path) -> None:
    out, plot = tmp_path / "new" / "out.json", tmp_path / "out.png"
    words = [*SMALL, "--json", str(out), "--sizes", "32", "50"]
    assert main(["inference", *words, "--models", "ViT-mu/16"]) == 0
    first = rows_of(out)
    # Of 50 px a ViT takes whole patches.
    assert list(first) == ["mu/16 at 32 px", "mu/16 at 48 px"]
    for row in first.values():
        speeds = row["images/s at a batch of"]
        assert list(speeds) == ["1", "2"] and row["peak, images/s"] == max(speeds.values())
        assert speeds[str(row["peak at a batch of"])] == row["peak, images/s"]
        assert "largest batch" not in row  # which a CPU would swap to find
    config = ["configs/demo/shapes.toml", "model.kind=hybrid", "model.variant=R26+mu/32", "model.width=0"]
    config += ["model.depth=1", "model.num_heads=0", "model.mlp_dim=0", "model.stem_stages=[1]"]
    config += ["model.stem_width=32", "model.patch_size=16"]
    assert main(["inference", *config, *words, "--models", "mu/16", "--plot", str(plot)]) == 0
    both = rows_of(out)
    assert {name: row for name, row in both.items() if name in first} == first
    assert list(both) == [*first, "shapes at 32 px", "shapes at 48 px"]
    assert both["shapes at 48 px"]["config"]["kind"] == "hybrid"
    assert plot.read_bytes().startswith(b"\x89PNG")
    # The same name, and another model.
    assert main(["inference", *config, "model.depth=2", *words]) == 0
    assert rows_of(out)["shapes at 32 px"]["config"]["depth"] == 2


def test_a_config_without_a_file_has_the_name_of_its_variant(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    config = ["run_dir=x", "data.index=x", "global_batch=8", "total_steps=3", "model.variant=mu/16"]
    assert main(["inference", *config, *SMALL, "--sizes", "16", "--json", str(out)]) == 0
    assert list(rows_of(out)) == ["mu/16 at 16 px"]


def test_an_axial_vit_is_measured_beside_the_vit_of_its_variant(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    words = [*SMALL, "--json", str(out), "--sizes", "32"]
    assert main(["inference", *words, "--models", "mu/16", "Axial-ViT-mu/16"]) == 0
    rows = rows_of(out)
    assert list(rows) == ["mu/16 at 32 px", "Axial-mu/16 at 32 px"]
    assert [row["config"]["attention"] for row in rows.values()] == ["global", "axial"]


def test_each_row_is_saved_before_the_next_is_measured() -> None:
    known = list[list[str]]()
    both = InferenceBench(
        models={"mu/16": model_of("mu/16")}, sizes=[16, 32], precision="fp32", max_batch=1, rounds=1
    )
    inference.run(both, None, lambda done: known.append([name for name in done if " at " in name]), print)
    assert known == [["mu/16 at 16 px"], ["mu/16 at 16 px", "mu/16 at 32 px"]]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--rounds", "2"], "was measured with rounds 1, and here it is 2: name a new file"),
        (["--max-batch", "4"], "was measured with timed up to a batch of 2, and here it is 4: name a new"),
        (["--precision", "bf16"], "was measured with precision fp32, and here it is bf16: name a new file"),
        ({"bench": "order"}, "has no results that can be continued; name a new file"),
        ({"results": 5}, "has no results that can be continued; name a new file"),
    ],
)
def test_a_file_of_other_settings_is_not_continued(
    tmp_path: Path, capsys, words: list[str] | dict[str, object], sentence: str
) -> None:
    """The control is the same without a change."""
    path = tmp_path / "out.json"
    same = ["inference", *SMALL, "--models", "mu/32", "--sizes", "32", "--json", str(path)]
    assert main(same) == 0
    assert main(same) == 0
    if isinstance(words, dict):
        written = json.loads(path.read_text())
        rows = dict.fromkeys(written["results"], words["results"]) if "results" in words else {}
        path.write_text(json.dumps(written | words | {"results": written["results"] | rows}))
        words = []
    before = path.read_bytes()
    capsys.readouterr()
    assert main([*same, *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: --json {path} {sentence}") and said.count("\n") == 1
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--models", "B16"], 'model.variant "B16" is not NAME/PATCH with a name of '),
        (["--models", "R51x1"], 'model.variant "R51x1" is not R{DEPTH}x{FACTOR} with a depth of '),
        (["--models", "R50+B/15"], 'model.variant "R50+B/15" is not STEM+NAME/NUMBER with '),
        (
            ["--models", "mu/16", "B/32", "--sizes", "32", "16"],
            "model.image_size 16 is not a multiple of ",
        ),
        (["--sizes", "64", "0"], "--sizes 0 must be above 0"),
        (["--max-batch", "0"], "--max-batch 0 must be above 0"),
        (["--rounds", "0"], "--rounds 0 must be above 0"),
        (["--plot", "out.pdf"], "out.pdf does not end in .png; name a file that does"),
        (["--plot", "out.png"], "figures need matplotlib; install it: bash tools/setup.sh plots"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_measured_is_refused_in_one_sentence_before_anything_is(
    tmp_path: Path, monkeypatch, capsys, words: list[str], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["inference", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {sentence}") and said.count("\n") == 1


def test_the_papers_models_have_all_its_sizes() -> None:
    models = [model_of(name) for name in FIGURE12_MODELS]
    assert [model.variant for model in models] == list(FIGURE12_MODELS)
    sizes = {model.variant: [at_size(model, size).image_size for size in FIGURE12_SIZES] for model in models}
    assert sizes.pop("H/14") == [56, 126, 224, 378, 504]
    assert all(found == list(FIGURE12_SIZES) for found in sizes.values())
    assert [model_of(name).variant for name in ("ViT-B/16", "R50+ViT-B/16")] == ["B/16", "R50+B/16"]


@pytest.mark.parametrize(
    "model", [ViTConfig(variant="mu/16", image_size=32), ResNetConfig(image_size=32, width=32, stages=(1,))]
)
def test_models_run_as_evaluations_do(monkeypatch, model: ViTConfig | ResNetConfig) -> None:
    """In evaluation mode, without gradients, in the precision, but with logits in fp32."""
    seen = set[tuple[object, ...]]()

    def built(config: ViTConfig | ResNetConfig, seed: int) -> torch.nn.Module:
        module = build_model(config, seed)
        module.register_forward_hook(
            lambda module, images, logits: seen.add(
                (module.training, logits.requires_grad, images[0].dtype, logits.dtype, tuple(logits.shape))
            )
        )
        return module

    monkeypatch.setattr(inference, "build_model", built)
    measure(bench(precision="bf16"), model, lambda stage: None)
    assert seen == {(False, False, torch.bfloat16, torch.float32, (batch, 1000)) for batch in (1, 2)}


class Clock:
    """Time that passes in forward passes alone: 2 s, and 1 s an image."""

    now = 0.0

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches = list[int]()
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def prepare(self, batch: int) -> inference.Pass:
        def forward() -> None:
            self.now += 2 + batch
            self.batches.append(batch)

        return forward


def test_images_a_second_times_the_seconds_are_the_images(monkeypatch) -> None:
    prepare = Clock(monkeypatch).prepare
    row = sweep(prepare, bench(5), lambda stage: None, to_the_end=False)
    assert row["images/s at a batch of"] == {"1": 1 / 3, "2": 2 / 4, "4": 4 / 6}
    assert (row["peak at a batch of"], row["peak, images/s"]) == (4, 4 / 6)
    monkeypatch.setattr(inference, "ROUND_SECONDS", 31)
    assert inference.seconds_of_pass(prepare(1), rounds=2) == 3


NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")
NO_KERNEL = RuntimeError("CUDA error: invalid configuration argument\nCUDA kernel errors might be")


@pytest.mark.parametrize(
    ("max_batch", "room", "error", "timed", "ended_by"),
    [
        (8, 37, NO_MEMORY, 4, "out of memory"),  # 1, 2, 4 and 8; 16 and 32 are only tried
        (64, 5, NO_MEMORY, 3, "out of memory"),
        (1, 1, NO_MEMORY, 1, "out of memory"),
        (2, 40, NO_KERNEL, 2, "CUDA error: invalid configuration argument"),
    ],
)
def test_the_largest_batch_is_found_beyond_those_that_are_timed(
    monkeypatch, max_batch: int, room: int, error: RuntimeError, timed: int, ended_by: str
) -> None:
    clock = Clock(monkeypatch)

    def prepare(batch: int) -> inference.Pass:
        if batch > room:
            raise error
        return clock.prepare(batch)

    row = sweep(prepare, bench(max_batch), lambda stage: None, to_the_end=True)
    batches = [2**power for power in range(room.bit_length())]
    assert (row["largest batch"], row["a larger one ended by"]) == (batches[-1], ended_by)
    assert list(row["images/s at a batch of"]) == list(map(str, batches[:timed]))
    # A warm-up, a pass to know its time, and a round; or a single pass.
    assert clock.batches == sorted(batches[:timed] * 3 + batches[timed:])


def test_what_does_not_run_at_all_is_a_row_without_figures_or_an_error() -> None:
    def raising(error: RuntimeError, to_the_end: bool = True) -> dict[str, Any]:
        def prepare(batch: int) -> inference.Pass:
            raise error

        return sweep(prepare, bench(), lambda stage: None, to_the_end=to_the_end)

    assert raising(NO_MEMORY) == {"failed": "out of memory"}
    for error, to_the_end in ((RuntimeError("a bug"), True), (NO_MEMORY, False)):
        with pytest.raises(type(error)):
            raising(error, to_the_end)


@pytest.mark.parametrize(
    ("speeds", "past"),
    [
        ([], False),
        ([10.0, 9.0], False),
        ([10.0, 9.0, 8.0], True),
        ([10.0, 9.0, 11.0], False),
        ([10.0, 20.0, 20.1, 20.15], True),
        ([10.0, 20.0, 20.1, 20.3], False),
        ([10.0, 20.0, 15.0, 16.0], True),
        ([10.0, 20.0, 30.0, 15.0], False),
    ],
)
def test_two_doublings_without_gain_end_the_timing(speeds: list[float], past: bool) -> None:
    assert past_peak(speeds) is past


def row(model: str, kind: str, size: int, speed: float, **more: Any) -> dict[str, Any]:
    return {"model": model, "config": {"kind": kind, "image_size": size}, "peak, images/s": speed, **more}


def test_figure_12_has_a_line_a_model_in_each_panel() -> None:
    results: dict[str, Any] = {
        "device": "CPU",
        "a": row("B/16", "vit", 224, 50.0, **{"largest batch": 64}),
        "b": row("B/16", "vit", 64, 900.0, **{"largest batch": 1024}),
        "c": row("R50x1", "resnet", 64, 500.0),
        "d": {"model": "H/14", "config": {"kind": "vit", "image_size": 56}, "failed": "out of memory"},
    }
    figure = new_figure(11.0, 4.6)
    draw_inference(figure, results)
    speed, batch = figure.axes
    lines = {line.get_label(): np.asarray(line.get_xydata()).tolist() for line in speed.lines}
    assert lines == {"B/16": [[64, 900], [224, 50]], "R50x1": [[64, 500]]}
    assert [np.asarray(line.get_xydata()).tolist() for line in batch.lines] == [[[64, 1024], [224, 64]]]
    assert batch.lines[0].get_color() == speed.lines[0].get_color() != speed.lines[1].get_color()
    for axes in figure.axes:
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        assert [label.get_text() for label in axes.get_xticklabels()] == ["64", "224"]
        (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
        for x, y in (point for line in axes.lines for point in np.asarray(line.get_xydata())):
            assert left < x < right and low < y < high


def test_the_panel_of_the_largest_batch_says_where_none_was_measured() -> None:
    figure = new_figure(11.0, 4.6)
    draw_inference(figure, {"c": row("R50x1", "resnet", 64, 500.0)})
    assert [text.get_text() for text in figure.axes[1].texts] == ["measured on a GPU alone"]
