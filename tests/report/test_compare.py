"""`diff`: which tensors, facts and keys of two checkpoints differ."""

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
from checkpoint_tool import Capture, call, call_json, export, weights
from make import CONFIG, edit_manifest, state_of, write_step

from vitscale.report import compare, contents


def test_equal_checkpoints_are_equal_whoever_wrote_them(run: Path, tmp_path: Path, capsys: Capture) -> None:
    changed = {"engine": {"zero_stage": 3}, "guard": {"rollbacks": 3}, "data": {"max_bad_fraction": 0.5}}
    config = {**CONFIG, "run_dir": "elsewhere", **changed}
    other = write_step(tmp_path / "b", 30, state_of(30), world_size=5, zero_stage=3, config=config)
    status, out, _ = call(capsys, "diff", run, other, "--states")
    assert status == 0 and out.endswith("equal\n") and "19 tensors are identical, 0 differ" in out
    assert re.search(
        r"config that may differ .*\nrun_dir +\"runs/a\" +\"elsewhere\"\nengine.zero_stage +1 +3", out
    )
    assert re.search(r"world_size +3 +5", out) and "that differ" not in out


def test_the_weights_of_a_teacher_count_and_its_place_does_not(tmp_path: Path, capsys: Capture) -> None:
    folders = [
        write_step(tmp_path / name, 30, state_of(30), config={**CONFIG, "objective": {"teacher": name}})
        for name in "ab"
    ]
    for digest, status in (("d1", 0), ("d2", 1)):
        for folder, named in zip(folders, ("d1", digest), strict=True):
            edit_manifest(
                folder / "manifest.json", lambda values, named=named: values["train"].update(teacher=named)
            )
        ended, out, _ = call(capsys, "diff", *folders)
        assert ended == status and ('teacher            "d1"  "d2"' in out) == bool(status), out


def test_a_diff_says_which_tensors_differ_and_by_how_much(run: Path, tmp_path: Path, capsys: Capture) -> None:
    tensors = state_of(30)
    a = tensors["fp32", "head.weight"]
    b = a.clone()
    b[1, 2] += 0.5
    b[4, 0] -= 2.0
    tensors["fp32", "head.weight"] = b
    tensors["fixed", "count"] = tensors["fixed", "count"] + 1
    changed = {"seed": 4, "model": {"variant": "S/4"}, "total_steps": 70}
    other = write_step(tmp_path / "b", 30, tensors, config={**CONFIG, **changed})
    comparison = call_json(capsys, "diff", run, other)
    head, count = comparison["different"]
    assert (head["name"], count["name"]) == ("head.weight", "count") and not comparison["equal"]
    assert (head["state"], comparison["states"]) == ("fp32", ["fp32"])
    assert (head["num_different"], head["num_values"], head["max_abs"]) == (2, 40, pytest.approx(2.0))
    assert head["relative"] == pytest.approx(((a - b).norm() / max(a.norm(), b.norm())).item())
    assert (count["num_different"], count["max_abs"]) == (1, 1.0)
    assert {change["key"]: (change["a"], change["b"]) for change in comparison["config"]} == {
        "seed": (3, 4),
        "total_steps": (None, 70),
        "model.variant": ("Ti/4", "S/4"),
        "model.width": (16, None),
    }
    status, out, _ = call(capsys, "diff", run, other)
    assert status == 1 and "2 of 40" in out and out.endswith("different\n") and "absent" in out
    assert "5 tensors are identical, 2 differ" in out


def test_optimizer_states_are_compared_on_request(run: Path, tmp_path: Path, capsys: Capture) -> None:
    tensors = state_of(30)
    tensors["exp_avg_sq", "scale"] = tensors["exp_avg_sq", "scale"] * 2
    other = write_step(tmp_path / "b", 30, tensors)
    assert call(capsys, "diff", run, other)[0] == 0
    status, out, _ = call(capsys, "diff", run, other, "--states")
    assert status == 1 and re.search(r"exp_avg_sq/scale +scalar +1 of 1 .* 0.5$", out, re.MULTILINE)
    assert "18 tensors are identical, 1 differ" in out


def test_other_shapes_and_names_are_reported(run: Path, tmp_path: Path, capsys: Capture) -> None:
    tensors = weights(30)
    tensors["head.weight"] = torch.zeros(5, 9)
    tensors["new"] = tensors.pop("scale")
    comparison = call_json(capsys, "diff", run, export(tmp_path / "x.safetensors", tensors))
    assert comparison["other_shape"] == [["head.weight", [5, 8], [5, 9]]]
    assert (comparison["only_in_a"], comparison["only_in_b"]) == (["scale"], ["new"])
    assert not comparison["different"]
    status, out, _ = call(capsys, "diff", run, tmp_path / "x.safetensors")
    assert status == 1 and re.search(r"head.weight +5x8 +5x9", out) and "only in B: 1 tensors\n  new" in out


def test_a_nan_is_the_same_as_a_nan_and_as_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "CHUNK", 2)  # so that the values that matter are in different chunks
    a = torch.tensor([math.nan, 1.0, 2.0, math.inf, 5.0])
    assert compare.compare_tensors("x", "fp32", a, a.clone()) is None
    b = torch.tensor([math.nan, 1.0, math.nan, math.inf, 4.0])
    for left, right in ((a, b), (b, a)):
        difference = compare.compare_tensors("x", "fp32", left, right)
        assert difference and difference.num_different == 2
        assert math.isnan(difference.max_abs) and math.isnan(difference.relative)
    assert compare.compare_tensors("x", "fp32", torch.ones(3), torch.ones(3, dtype=torch.bfloat16)) is None


def test_the_text_of_a_comparison_is_aligned_and_short() -> None:
    difference = compare.TensorDifference(
        name="head.weight",
        slot="fp32",
        shape=(5, 8),
        num_values=40,
        num_different=2,
        max_abs=2.0,
        relative=0.5,
    )
    comparison = compare.Comparison(
        a="runs/a",
        b="runs/b",
        equal=False,
        config=(
            compare.Difference(key="seed", a=3, b=None, counts=True),
            compare.Difference(key="data.train", a="0123456789" * 5, b="", counts=True),
            compare.Difference(key="run_dir", a="runs/a", b="runs/b", counts=False),
        ),
        facts=(compare.Difference(key="samples_seen", a=12345, b=240, counts=True),),
        slots=("fp32", "ema"),
        num_identical=1234,
        different=(difference, dataclasses.replace(difference, name="norm", slot="ema", shape=())),
        other_shape=(("x", (1, 2), (3,)),),
        only_in_a=(),
        only_in_b=("new",),
    )
    assert compare.render(comparison).splitlines() == [
        "A  runs/a",
        "B  runs/b",
        "",
        "config that differ  A                                         B",
        "seed                3                                         absent",
        'data.train          "01234567890123456...234567890123456789"  ""',
        "",
        "facts that differ  A       B",
        "samples_seen       12,345  240",
        "",
        "config that may differ  A         B",
        'run_dir                 "runs/a"  "runs/b"',
        "",
        "only in B: 1 tensors",
        "  new",
        "",
        "tensors of other shapes  A    B",
        "x                        1x2  3",
        "",
        "tensor            shape   values that differ  max |A-B|  relative",
        "fp32/head.weight  5x8                2 of 40          2       0.5",
        "ema/norm          scalar             2 of 40          2       0.5",
        "",
        "fp32, ema: 1,234 tensors are identical, 2 differ",
        "different",
    ]
