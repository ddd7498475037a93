"""What people see of checkpoints: real files are listed, shown, compared, and found damaged."""

import dataclasses
import datetime
import json
import math
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from data.servers import s3_server, use_s3
from make import CONFIG, FIXED, SHAPES, state_of, write_step

from tools.checkpoint import main
from vitscale.checkpoint.safetensors import write_safetensors
from vitscale.report import compare, contents, listing, show, text

NOW = datetime.datetime(2026, 1, 2, 5, 4, 5, tzinfo=datetime.UTC)
METRICS = """{"step": 10, "train/loss": 2.5}
{"step": 10, "eval/cifar10/top1": 0.25}
{"step": 18, "train/loss": 1.75}
{"step": 20, "eval/cifar10/top1": 0.5, "eval/cifar10/10shot": 0.4375, "eval/cifar10/num_samples": 900}
{"step": 25, "train/loss": "nan"}
{"step": 31, "train/loss": 9.0}
{"step": 30, "train/lo"""
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Checkpoints of steps 10, 20 and 30 in a run directory with metrics."""
    folder = tmp_path / "run"
    for step in (10, 20, 30):
        write_step(folder, step, state_of(step))
    (folder / "metrics.jsonl").write_text(METRICS)
    (folder / "checkpoints" / "latest").write_text("step-000000030\n")
    return folder


def call(capsys: Capture, *arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of tools/checkpoint.py."""
    status = main(list(map(str, arguments)))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def call_json(capsys: Capture, *arguments: object) -> Any:
    """What tools/checkpoint.py prints with --json, which must be strict JSON, without NaN."""

    def refuse_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(call(capsys, *arguments, "--json")[1], parse_constant=refuse_constant)


def damage(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def test_the_list_has_a_row_for_each_step_with_its_metrics(run: Path) -> None:
    printed = listing.render(listing.list_run(str(run)), NOW)
    rows = {line.split()[0]: line for line in printed.splitlines() if re.match(r" *\d", line)}
    assert list(rows) == ["10", "20", "30"]
    assert re.search(r"\b80 .* 2 h .* 3 +1  fp32 +verified +loss 2.5000, cifar10/top1 0.25$", rows["10"])
    assert rows["20"].endswith("loss 1.7500 (step 18),") and "num_samples" not in printed
    assert rows["30"].endswith("verified, latest  loss nan (step 25)")
    assert "cifar10/10shot 0.4375" in printed and printed.count("latest") == 1
    assert max(map(len, printed.splitlines())) <= 120 + len(str(run))


def test_many_metrics_continue_below_their_row(run: Path) -> None:
    accuracies = {f"set{i}/accuracy": i / 100 for i in range(20)}
    with open(run / "metrics.jsonl", "w") as file:
        row = {"step": 20, **{f"eval/{name}": accuracy for name, accuracy in accuracies.items()}}
        file.write(json.dumps(row) + "\n")
    lines = listing.render(listing.list_run(str(run)), NOW).splitlines()[2:]
    assert max(map(len, lines)) <= 120
    start = lines[0].index("metrics")
    shown = [metric for line in lines[1:] for metric in line[start:].split(", ") if metric]
    assert [metric.rstrip(",") for metric in shown] == [
        f"{name} {accuracy:.4g}" for name, accuracy in accuracies.items()
    ]


@pytest.mark.parametrize("fast", [False, True])
def test_damage_is_named_in_the_list_and_does_not_end_it(run: Path, capsys: Capture, fast: bool) -> None:
    folder = run / "checkpoints"
    damage(folder / "step-000000010" / "rank-00001.safetensors")
    (folder / "step-000000020" / "rank-00002.safetensors").unlink()
    (folder / "step-000000030" / "manifest.json").write_text("{}")
    options = ["--fast"] if fast else []
    status, out, err = call(capsys, "list", run, *options)
    assert status == 2 and "the newest checkpoint, step 30, is damaged, and " in err
    assert ("training would resume from step 10;" if fast else "no other verifies;") in err
    # A flipped bit, of step 10, shows only where the files are read.
    assert out.count("DAMAGED") == (2 if fast else 3)
    assert ("step 10: " in out) is not fast
    assert ("rank-00001.safetensors is damaged: its checksum does not match the manifest" in out) is not fast
    assert "step 20: " in out and "rank-00002.safetensors is missing" in out
    assert "step 30: " in out and "manifest.json is damaged" in out
    rows = call_json(capsys, "list", run, *options)["checkpoints"]
    assert call(capsys, "list", run, *options, "--json")[0] == 2
    assert rows[0]["num_bytes"] > 0 and (rows[2]["num_bytes"], rows[2]["facts"]) == (0, {})
    assert [row["state"] for row in rows] == ["not verified" if fast else "DAMAGED", "DAMAGED", "DAMAGED"]


def test_a_list_whose_newest_checkpoint_is_good_succeeds(run: Path, capsys: Capture) -> None:
    damage(run / "checkpoints" / "step-000000020" / "rank-00001.safetensors")
    status, out, err = call(capsys, "list", run)
    assert (status, out.count("DAMAGED"), err) == (0, 1, "")


def test_a_file_of_another_size_is_found_without_reading_it(run: Path) -> None:
    with open(run / "checkpoints" / "step-000000010" / "rank-00000.safetensors", "ab") as file:
        file.write(b"x")
    first = listing.list_run(str(run), checksums=False).checkpoints[0]
    assert first.status == "DAMAGED" and re.search(r"has [\d,]+ bytes, the manifest says", first.problem)


def test_leftovers_and_a_wrong_latest_are_mentioned(run: Path, capsys: Capture) -> None:
    leftover = run / "checkpoints" / ".tmp-step-000000040"
    leftover.mkdir()
    (leftover / "rank-00000.safetensors").write_bytes(bytes(2500))
    (run / "checkpoints" / "latest").write_text("step-000000020\n")
    out = call(capsys, "list", run)[1]
    assert ".tmp-step-000000040 (2.50kB) is a save in progress" in out
    assert 'the file "latest" names step-000000020, but the newest here is step-000000030' in out
    values = call_json(capsys, "list", run)
    assert len(values["notes"]) == 2
    assert [row["latest"] for row in values["checkpoints"]] == [False, True, False]
    assert values["checkpoints"][2]["metrics"] == {"train/loss": "nan"}


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


def export(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    write_safetensors(path, tensors, {f"vitscale.{name}": value for name, value in metadata.items()})
    return path


def weights(step: int) -> dict[str, torch.Tensor]:
    return {name: tensor for (slot, name), tensor in state_of(step).items() if slot in ("fp32", "fixed")}


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


def test_equal_checkpoints_are_equal_whoever_wrote_them(run: Path, tmp_path: Path, capsys: Capture) -> None:
    config = {**CONFIG, "run_dir": "elsewhere", "engine": {"zero_stage": 3}}
    other = write_step(tmp_path / "b", 30, state_of(30), world_size=5, zero_stage=3, config=config)
    status, out, _ = call(capsys, "diff", run, other, "--states")
    assert status == 0 and out.endswith("equal\n") and "19 tensors are identical, 0 differ" in out
    assert re.search(
        r"config that may differ .*\nrun_dir +\"runs/a\" +\"elsewhere\"\nengine.zero_stage +1 +3", out
    )
    assert re.search(r"world_size +3 +5", out) and "that differ" not in out


def test_a_diff_says_which_tensors_differ_and_by_how_much(run: Path, tmp_path: Path, capsys: Capture) -> None:
    tensors = state_of(30)
    a = tensors["fp32", "head.weight"]
    b = a.clone()
    b[1, 2] += 0.5
    b[4, 0] -= 2.0
    tensors["fp32", "head.weight"] = b
    tensors["fixed", "count"] = tensors["fixed", "count"] + 1
    other = write_step(tmp_path / "b", 30, tensors, config={**CONFIG, "seed": 4, "model": {"variant": "S/4"}})
    comparison = call_json(capsys, "diff", run, other)
    head, count = comparison["different"]
    assert (head["name"], count["name"]) == ("head.weight", "count") and not comparison["equal"]
    assert (head["state"], comparison["states"]) == ("fp32", ["fp32"])
    assert (head["num_different"], head["num_values"], head["max_abs"]) == (2, 40, pytest.approx(2.0))
    assert head["relative"] == pytest.approx(((a - b).norm() / max(a.norm(), b.norm())).item())
    assert (count["num_different"], count["max_abs"]) == (1, 1.0)
    assert {change["key"]: (change["a"], change["b"]) for change in comparison["config"]} == {
        "seed": (3, 4),
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


def test_damage_is_refused_and_a_run_falls_back_to_its_newest_good(
    run: Path, capsys: Capture, caplog
) -> None:
    newest = run / "checkpoints" / "step-000000030"
    damage(newest / "rank-00002.safetensors")
    for command in (["show", newest], ["verify", newest], ["diff", newest, run], ["diff", run, newest]):
        status, out, err = call(capsys, *command)
        assert status == 2 and "rank-00002.safetensors is damaged: its checksum" in err and not out
    status, out, err = call(capsys, "verify", run)
    assert status == 2 and out.startswith(f"{run}/checkpoints/step-000000020: 7 tensors")
    assert err.startswith("error: the newest checkpoint, step 30, is damaged, and training would resume from")
    assert "checkpoint passed over" in caplog.text
    assert call(capsys, "show", run)[0] == 0


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["list", "{}/nothing"],
            r"holds no checkpoints: there are no step-\* folders in .*/nothing/checkpoints",
        ),
        (["list", "{}/run/checkpoints/step-000000010"], "is one checkpoint, but list takes a run directory"),
        (["show", "{}/nothing"], "is not a checkpoint: give a run directory"),
        (["show", "{}"], "is not a checkpoint: give a run directory"),
        (["show", "{}/text"], "is not a checkpoint: give a run directory"),
        (["diff", "{}/run", "{}/absent.safetensors"], "absent.safetensors: No such file"),
        (["verify", "{}/cut.safetensors"], "cut.safetensors ends inside b"),
    ],
)
def test_wrong_input_is_one_sentence(
    run: Path, tmp_path: Path, capsys: Capture, command: list[str], message: str
) -> None:
    (tmp_path / "text").write_text("hello, this is text")
    cut = export(tmp_path / "cut.safetensors", {"a": torch.ones(3), "b": torch.ones(3)})
    cut.write_bytes(cut.read_bytes()[:-1])
    status, out, err = call(capsys, *(part.format(tmp_path) for part in command))
    assert status == 2 and not out and re.search(message, err) and err.count("\n") == 1


def test_checkpoints_in_a_store_are_listed_and_compared(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "served").mkdir()
    remote, local = tmp_path / "served" / "bucket" / "run", tmp_path / "run"
    for step in (10, 20):
        write_step(remote, step, state_of(step))
    (remote / "checkpoints" / "step-000000030").mkdir()
    (remote / "checkpoints" / "step-000000030" / "rank-00000.safetensors").write_bytes(b"without a manifest")
    same = write_step(local, 20, state_of(20))
    (local / "config.toml").write_text('[checkpoint]\nstore = "s3://bucket/run"\n')
    with s3_server(tmp_path / "served") as port:
        use_s3(monkeypatch, port)
        listed = call_json(capsys, "list", "s3://bucket/run")
        assert [(row["step"], row["state"]) for row in listed["checkpoints"]] == [
            (10, "verified"),
            (20, "verified"),
        ]
        assert [row["step"] for row in call_json(capsys, "list", local)["checkpoints"]] == [10, 20, 20]
        assert call(capsys, "diff", same, "s3://bucket/run", "--states")[0] == 0
        assert call(capsys, "show", "s3://bucket/run/checkpoints/step-000000010")[0] == 0
        damage(remote / "checkpoints" / "step-000000020" / "rank-00001.safetensors")
        assert call_json(capsys, "list", "s3://bucket/run")["checkpoints"][1]["state"] == "DAMAGED"
        assert "step-000000010" in call(capsys, "verify", "s3://bucket/run")[1]


def test_a_table_is_as_wide_as_it_needs_to_be() -> None:
    assert text.table(("a", "long"), [("xyz", "1"), ("x", "22")], left=(0,)) == [
        "a    long",
        "xyz     1",
        "x      22",
    ]


@pytest.mark.parametrize(
    ("created", "age"),
    [
        ("2026-01-02T05:04:00+00:00", "5 s"),
        ("2026-01-02T04:00:00+00:00", "64 min"),
        ("2026-01-01T04:00:00+00:00", "25 h"),
        ("2025-12-31T05:04:06+00:00", "48 h"),
        ("2025-12-31T05:04:05+00:00", "2 d"),
        ("2026-01-02T06:00:00+00:00", "0 s"),  # a clock that is ahead of ours
        ("2025-12-20T04:00:00+00:00", "13 d"),
    ],
)
def test_ages_are_in_the_unit_that_people_would_use(created: str, age: str) -> None:
    moment = datetime.datetime.fromisoformat(created).astimezone()
    assert text.when(created, NOW) == (f"{moment:%Y-%m-%d %H:%M}", age)


def test_a_time_that_is_none_is_shown_as_it_is() -> None:
    assert text.when("now", NOW) == ("now", "")


def test_the_keys_of_the_json_stay_what_scripts_read(run: Path, tmp_path: Path, capsys: Capture) -> None:
    listed = call_json(capsys, "list", run)
    assert list(listed) == ["places", "checkpoints", "notes"]
    assert list(listed["checkpoints"][0]) == [
        "path", "step", "latest", "state", "problem", "num_bytes", "facts", "metrics", "loss_step",
    ]  # fmt: skip
    shown = call_json(capsys, "show", run)
    assert list(shown["tensors"][0]) == [
        "name", "shape", "dtype", "num_values", "norm", "mean", "abs_max", "num_non_finite", "fixed",
    ]  # fmt: skip
    other = write_step(tmp_path / "b", 30, state_of(31), config={**CONFIG, "seed": 4})
    compared = call_json(capsys, "diff", run, other)
    assert list(compared) == [
        "a", "b", "equal", "config", "facts", "states", "num_identical", "different", "other_shape",
        "only_in_a", "only_in_b",
    ]  # fmt: skip
    assert list(compared["config"][0]) == ["key", "a", "b", "counts"]
    assert list(compared["different"][0]) == [
        "name", "state", "shape", "num_values", "num_different", "max_abs", "relative",
    ]  # fmt: skip


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
