"""`show`: the facts, tensors and config of a checkpoint or of a weights file."""

import json
import math
import re
import tomllib
from pathlib import Path

import torch
from checkpoint_tool import NOW, Capture, call, call_json, export, weights
from make import CONFIG, FIXED, SHAPES, state_of, write_step

from vitscale.report import contents, show


def test_show_has_facts_tensors_and_config(run: Path, capsys: Capture) -> None:
    status, out, _ = call(capsys, "show", run)
    values = state_of(30)
    assert status == 0 and out.startswith(str(run / "checkpoints" / "step-000000030"))
    assert "written by      3 ranks at ZeRO 1" in out and "2026-01-02" in out and "verified" in out
    assert "parameters      121 in 4 tensors" in out and "fixed values    14 in 3 tensors" in out
    norm = values["fp32", "patch.weight"].double().norm().item()
    assert re.search(rf"patch.weight +7x11 +float32 +77 +{norm:.5g} ", out)
    assert re.search(r"count +scalar +int64 +1 .* fixed$", out, re.MULTILINE)
    assert "NOT FINITE" not in out
    assert tomllib.loads(out.partition("\nconfig\n")[2]) == CONFIG
    assert tomllib.loads(call(capsys, "show", run, "--config")[1]) == CONFIG
    shown = call_json(capsys, "show", run)
    assert shown["step"] == 30 and shown["config"] == CONFIG and shown["num_parameters"] == 121
    stats = {tensor["name"]: tensor for tensor in shown["tensors"]}
    shapes = {**SHAPES, **{name: tuple(tensor.shape) for name, tensor in FIXED.items()}}
    assert {name: tuple(stats[name]["shape"]) for name in stats} == shapes
    assert {name for name in stats if stats[name]["fixed"]} == FIXED.keys()
    largest = max(abs(value) for value in values["fp32", "head.weight"].reshape(-1).tolist())
    assert stats["head.weight"]["abs_max"] == largest


def test_values_that_are_not_finite_are_marked(tmp_path: Path, capsys: Capture) -> None:
    tensors = state_of(1)
    tensors["fp32", "head.weight"] = torch.ones(5, 8)
    tensors["fp32", "head.weight"][2, 3:5] = torch.tensor([math.nan, -math.inf])
    write_step(tmp_path, 1, tensors)
    out = call(capsys, "show", tmp_path)[1]
    assert re.search(r"head.weight .* 6.1644 +1 +1 +2 NOT FINITE$", out, re.MULTILINE)
    assert "NOT FINITE      2 values" in out
    tensors = call_json(capsys, "show", tmp_path)["tensors"]
    assert {tensor["name"]: tensor["num_non_finite"] for tensor in tensors if tensor["num_non_finite"]} == {
        "head.weight": 2
    }


def test_an_export_shows_what_it_has_and_equals_its_checkpoint(
    run: Path, tmp_path: Path, capsys: Capture
) -> None:
    model = json.dumps(CONFIG["model"])
    export(tmp_path / "export" / "model.safetensors", weights(30), step="30", model=model)
    out = call(capsys, "show", tmp_path / "export")[1]
    assert re.search(r"^step +30$", out, re.MULTILINE) and "no checksums" in out and "mask " in out
    assert tomllib.loads(out.partition("alone)\n")[2]) == {"model": CONFIG["model"]}
    assert call(capsys, "diff", run, tmp_path / "export")[0] == 0
    assert call(capsys, "diff", tmp_path / "export", run / "checkpoints" / "step-000000020")[0] == 1
    assert "readable; an export carries no checksums" in call(capsys, "verify", tmp_path / "export")[1]


def test_shards_and_other_libraries_files_are_shown_too(tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "sharded"
    shards = {"model-00001-of-00002.safetensors": ["a"], "model-00002-of-00002.safetensors": ["b", "c"]}
    values = {"a": torch.ones(2, 2), "b": torch.zeros(3, dtype=torch.bfloat16), "c": torch.tensor(7)}
    for file, names in shards.items():
        export(folder / file, {name: values[name] for name in names})
    file_of = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {"total_size": 26}, "weight_map": file_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    shown = call_json(capsys, "show", folder)
    assert [(tensor["name"], tensor["dtype"], tensor["norm"]) for tensor in shown["tensors"]] == [
        ("a", "float32", 2.0),
        ("b", "bfloat16", 0.0),
        ("c", "int64", 7.0),
    ]
    assert call(capsys, "diff", folder, export(tmp_path / "one.safetensors", values))[0] == 0
    status, _, err = call(capsys, "show", folder, "--config")
    assert status == 2 and "holds no config" in err


def test_the_tensors_of_a_checkpoint_are_shown_in_columns(run: Path) -> None:
    opened = contents.open_contents(str(run))
    stats = [
        show.measure_tensor("head.weight", torch.tensor([[3.0, -4.0]]), untrained=False),
        show.measure_tensor("count", torch.tensor([1.0, math.nan]), untrained=True),
        show.measure_tensor("mask", torch.tensor([True, False]), untrained=True),
    ]
    lines = show.render(opened, stats, NOW).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("tensor "))
    assert lines[start : start + 4] == [
        "tensor       shape  dtype    values  norm  mean  abs max",
        "head.weight  1x2    float32       2     5  -0.5        4",
        "count        2      float32       2     1     1        1  fixed 1 NOT FINITE",
        "mask         2      bool          2     1   0.5        1  fixed",
    ]
