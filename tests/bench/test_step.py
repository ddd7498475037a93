"""The step bench on the smallest model: rows, baselines, and a suite that is continued."""

import gc
import importlib.metadata
import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from tools.bench import STEP_CASES, main
from vitscale import config as configs
from vitscale import distributed
from vitscale.bench import step, suite
from vitscale.bench.step import Case, Loop, Ours, Plain, StepBench, _Peak, every_case, measure
from vitscale.errors import ConfigError, DataError
from vitscale.models.vit_config import ViTConfig
from vitscale.train_config import TrainConfig

PROGRAM = Path(__file__).resolve().parents[2] / "tools" / "bench.py"
SMALL = ["--modes", "eager", "--loops", "vitscale", "plain", "--policies", "none", "--batch", "1"]


def bench(*options: object) -> None:
    """The command, in a process of its own: an engine needs torch's process group."""
    command = [sys.executable, PROGRAM, "step", *SMALL, *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_config_is_measured_beside_plain_pytorch(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    bench("configs/demo/shapes.toml", "model.depth=1", "--rounds", 2, "--steps", 1, "--json", out)
    results = json.loads(out.read_text())["results"]
    assert (results["model"], results["precision"]) == ("Ti/8 at 32 px", "fp32")
    assert results["config"]["depth"] == 1
    ours, plain = results["vitscale"], results["plain"]
    assert ours["images/s"] > 0 and ours["speed / plain loop"] > 0
    assert "speed / plain loop" not in plain
    assert "MFU, %" not in ours  # nobody knows the peak of a CPU


def test_a_suite_measures_only_what_its_file_lacks(tmp_path: Path) -> None:
    path = tmp_path / "results" / "suite.json"
    bench("--suite", path, "--variants", "mu/32")
    first: dict[str, Any] = json.loads(path.read_text())
    assert first["mu/32"]["vitscale"]["images/s"] > 0 and first["device"] == "CPU"
    part = {name: value for name, value in first["mu/32"].items() if name != "plain"}
    path.write_text(json.dumps(first | {"mu/16": part}))
    bench("--suite", path, "--variants", "mu/32", "mu/16", "--loops", "plain")
    both: dict[str, Any] = json.loads(path.read_text())
    assert both["mu/32"] == first["mu/32"] and both["mu/16"]["plain"]["images/s"] > 0
    # Rows are compared within one process.
    assert both["mu/16"]["vitscale"]["images/s"] > 0 and both["mu/16"]["vitscale"] != part["vitscale"]


def test_a_suite_measures_again_what_has_another_batch_or_lacks_a_case(tmp_path: Path) -> None:
    path, plain = tmp_path / "suite.json", Case(loop="plain")

    def measured(batch: int) -> dict[str, Any]:
        return suite.run(path, "", ["mu/32"], batch, lambda case: case == plain, lambda _: None)["mu/32"]

    first = measured(1)
    assert measured(1) == first
    assert (first["images of a step"], measured(2)["images of a step"]) == (1, 2)
    file = json.loads(path.read_text())
    file["mu/32"]["another loop"] = file["mu/32"].pop("plain")
    path.write_text(json.dumps(file))
    assert measured(2)["plain"]["images/s"] > 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"device": "NVIDIA H100"},
            "was measured with device NVIDIA H100, and here it is CPU: name a new file",
        ),
        ({"torch": "1.0"}, "was measured with torch 1.0, and here it is "),
        ({"deepspeed": "0.1"}, "was measured with deepspeed 0.1, and here it is "),
        (None, "has no results that can be continued; name a new file"),
        ({"mu/16": 5}, "has no results that can be continued; name a new file"),
        ("[1]", "has no results that can be continued; name a new file"),
        ("[" * 100_000, "cannot be read: it is not JSON; name a new file"),
        ("{", "cannot be read: it is not JSON; name a new file"),
    ],
)
def test_a_suite_continues_no_other_file(
    tmp_path: Path, capsys, change: dict[str, Any] | str | None, sentence: str
) -> None:
    """The control is the file as it was written."""
    path = tmp_path / "suite.json"
    words = ["step", "--suite", str(path), "--variants"]
    header = {name: importlib.metadata.version(name) for name in ("torch", "deepspeed")} | {"device": "CPU"}
    path.write_text(json.dumps(header))
    assert main(words) == 0
    path.write_text(change if isinstance(change, str) else json.dumps(header | change if change else {}))
    before = path.read_bytes()
    capsys.readouterr()
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: --suite {path} {sentence}") and said.count("\n") == 1
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "refused",
    [
        ["configs/demo/shapes.toml"],
        ["--variant", "B/16"],
        ["--precision", "bf16"],
        ["--rounds", "0"],
        ["--steps", "5"],
        ["configs/demo/shapes.toml", "--variant", "B/16", "--rounds", "5"],
    ],
    ids=" ".join,
)
def test_a_suite_refuses_in_one_sentence_what_it_would_not_heed(
    tmp_path: Path, capsys, refused: list[str]
) -> None:
    """The control, without the refused options, is the test of a suite above."""
    path = tmp_path / "suite.json"
    assert main(["step", *refused, "--suite", str(path), "--variants", "mu/32"]) == 2
    names = [word for word in refused if word.startswith(("--", "configs/"))]
    said = capsys.readouterr().err
    assert said.startswith(f"error: --suite does not take {', '.join(names)}: ") and said.count("\n") == 1
    assert not path.exists()


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--index", "data/imagenet/index.json"], "--index"),
        (["--variants", "B/16", "H/14"], "--variants"),
        (["--index", "", "--variants"], "--index and --variants"),
    ],
)
def test_a_single_model_refuses_in_one_sentence_what_only_a_suite_reads(
    capsys, words: list[str], names: str
) -> None:
    """The controls are the tests of a config and of a suite above."""
    assert main(["step", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {names} would be ignored: without --suite, one model is measured; add ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(("cores", "workers"), [(1, 1), (2, 2), (12, 8), (16, 16), (24, 16), (96, 64)])
def test_the_end_to_end_run_has_lanes_that_divide_its_batch(tmp_path: Path, cores: int, workers: int) -> None:
    assert suite.num_workers(cores) == workers
    path = tmp_path / "config.toml"
    path.write_text(suite.end_to_end_config(str(tmp_path), "s3://photos/index.json", "S/16", workers))
    config = configs.load(TrainConfig, [path])
    assert config.data.lanes == config.engine.num_workers == workers
    assert config.global_batch % config.data.lanes == 0
    assert config.data.index == "s3://photos/index.json"


def test_the_end_to_end_run_gives_its_last_row_of_speed(tmp_path: Path, monkeypatch) -> None:
    """A program in place of the real one, which would take hours here."""
    rows = [
        {"step": 20, "perf/images_per_second": 100.0, "time/data_wait_fraction": 0.9},
        {"step": 40, "perf/images_per_second": 300.0, "time/data_wait_fraction": 0.5},
        {"step": 40, "eval/loss": 1.0},
    ]
    program = tmp_path / "program.py"
    program.write_text(
        "import pathlib, sys, tomllib\n"
        "config = tomllib.loads(pathlib.Path(sys.argv[1]).read_text())\n"
        "run_dir = pathlib.Path(config['run_dir'])\n"
        "run_dir.mkdir()\n"
        f"(run_dir / 'metrics.jsonl').write_text({''.join(json.dumps(row) + chr(10) for row in rows)!r})\n"
    )
    monkeypatch.setattr(suite, "PROGRAM", program)
    monkeypatch.setattr(suite, "num_cores", lambda: 3)
    assert suite.end_to_end("index.json", "S/16") == {
        "model": "S/16",
        "data workers": 2,
        "images/s": 300.0,
        "images/s per data worker": 150.0,
        "waiting for data, share": 0.5,
    }


@pytest.mark.parametrize(
    ("last_words", "sentence"),
    [("", "end to end: silent.py ended with status 3"), ("a\nb\n", "end to end: b")],
)
def test_an_end_to_end_run_that_fails_is_one_sentence(
    tmp_path: Path, monkeypatch, last_words: str, sentence: str
) -> None:
    program = tmp_path / "silent.py"
    program.write_text(f"import sys; sys.stderr.write({last_words!r}); sys.exit(3)")
    monkeypatch.setattr(suite, "PROGRAM", program)
    with pytest.raises(DataError, match=f"{sentence}$"):
        suite.end_to_end("index.json", "S/16")


def test_the_baseline_computes_the_same_step() -> None:
    """The weights of both after three steps."""
    distributed.initialize()
    model = ViTConfig(variant="mu/16", image_size=32, num_classes=10)
    cases = Case(loop="vitscale"), Case(loop="plain")
    config = StepBench(model=model, batch=4, precision="fp32", cases=cases)
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(10, (4, 1))
    ours, plain = Ours(config, cases[0]), Plain(config, cases[1])
    for _ in range(3):
        ours.step(images, labels)
        plain.step(images, labels)
    weights = [list(network.parameters()) for network in (ours.engine.module, plain.network)]
    # A step moves weights by 1e-3. The bias of the keys has no gradient but rounding errors,
    # which AdamW enlarges: 1e-5 is reached.
    torch.testing.assert_close(*weights, rtol=0, atol=1e-4)
    ours.close()


class Device:
    """Memory that trainees share: each holds 3, and 4 more in a step."""

    def __init__(self, size: int) -> None:
        self.free = size

    def build(self, case: Case) -> "Held":
        return Held(self)

    def take(self, size: int) -> None:
        if size > self.free:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.free -= size


class Held:
    def __init__(self, device: Device) -> None:
        self.device = device
        device.take(3)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.device.take(4)
        self.device.free += 4

    def close(self) -> None:
        self.device.free += 3


@pytest.mark.parametrize(
    ("size", "together", "alone"),
    [(13, 3, 0), (10, 2, 1), (7, 1, 2), (2, 0, 0)],
)
def test_cases_that_have_no_room_beside_the_others_are_measured_alone(
    size: int, together: int, alone: int
) -> None:
    """One of 7 needs all of 7; three of them need 3 + 3 + 7."""
    cases = Case(loop="plain"), Case(loop="vitscale"), Case(loop="vitscale", checkpointing="full")
    device = Device(size)
    model = ViTConfig(variant="mu/16", image_size=16)
    config = StepBench(model=model, cases=cases, batch=1, rounds=2, steps=1)
    results = measure(config, device.build, lambda _: None)
    rows = [results[str(case)] for case in cases]
    measured = [row for row in rows if "images/s" in row]
    assert len(measured) == together + alone and sum("measured" in row for row in rows) == alone
    assert all(row == {"failed": "out of memory"} for row in rows if row not in measured)
    assert sum("speed / plain loop" in row for row in rows) == max(0, together - 1)
    assert device.free == size


class Full:
    """A trainee whose memory is full after so many steps."""

    def __init__(self, steps: int, error: RuntimeError) -> None:
        self.steps_left, self.closed, self.error = steps, False, error
        self.cycle = self  # as an engine has them

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        if not self.steps_left:
            raise self.error
        self.steps_left -= 1

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("full", "other", "error"),
    [
        ("vitscale", "plain", torch.OutOfMemoryError("Tried to allocate 20.00 MiB.")),
        ("plain", "vitscale", RuntimeError("CUDA error: out of memory")),
    ],
)
def test_a_case_that_runs_out_of_memory_in_a_later_round_leaves_the_others(
    full: Loop, other: Loop, error: RuntimeError
) -> None:
    """It is tried again alone, to no avail."""
    cases = Case(loop=full), Case(loop=other)
    config = StepBench(cases=cases, batch=1, rounds=3, steps=2)
    built = list[Full]()

    def build(case: Case) -> Full:
        built.append(Full(step.WARMUP_STEPS + (3 if case.loop == full else 6), error))
        return built[-1]

    results = measure(config, build, lambda _: None)
    assert results[full] == {"failed": "out of memory"}
    assert results[other]["images/s"] > 0 and "speed / plain loop" not in results[other]
    assert len(built) == 3 and all(trainee.closed for trainee in built)


def test_a_case_that_ran_out_of_memory_is_freed_before_the_next_is_measured() -> None:
    cases = Case(loop="plain"), Case(loop="vitscale")
    config = StepBench(cases=cases, batch=1, rounds=1, steps=1)
    built, living = list[weakref.ref[Full]](), list[int]()

    def build(case: Case) -> Full:
        trainee = Full(step.WARMUP_STEPS + (case.loop == "vitscale"), torch.OutOfMemoryError())
        built.append(weakref.ref(trainee))
        return trainee

    def progress(stage: str) -> None:
        living.append(sum(reference() is not None for reference in built))

    gc.disable()
    try:
        measure(config, build, progress)
    finally:
        gc.enable()
    # Before each warm-up, each case of the round, and the warm-up and round of the first alone.
    assert living == [0, 1, 2, 1, 0, 1]


def test_an_error_that_is_no_lack_of_memory_ends_a_bench() -> None:
    config = StepBench(cases=(Case(loop="plain"),), batch=1)
    with pytest.raises(RuntimeError, match="a bug"):
        measure(config, lambda _: Full(1, RuntimeError("a bug")), lambda _: None)


def test_every_policy_is_a_row_with_and_without_compilation() -> None:
    names = [str(case) for case in every_case(ViTConfig(variant="mu/16"))]
    assert len(names) == len(set(names)) == 8
    assert {"vitscale", "vitscale, selective recomputation, compiled", "plain, compiled"} < set(names)


def test_the_command_chooses_among_all_cases_and_so_does_the_suite(monkeypatch) -> None:
    monkeypatch.setattr(step, "timm_has", lambda model: True)
    cases = every_case(ViTConfig(variant="mu/16"))
    assert STEP_CASES["loops"] == list(dict.fromkeys(case.loop for case in cases))
    assert STEP_CASES["policies"] == list(dict.fromkeys(case.checkpointing for case in cases))
    compiled = suite.pieces(["mu/16"], 1, lambda case: case.compile)["mu/16"].cases
    assert compiled == tuple(case for case in cases if case.compile)


@pytest.mark.parametrize("option", ["rounds", "steps", "batch"])
def test_a_bench_of_nothing_is_refused(option: str) -> None:
    assert StepBench(cases=(), **{option: 1})
    with pytest.raises(ConfigError, match=f"^--{option} 0 must be above 0$"):
        StepBench(cases=(), **{option: 0})


def test_a_suite_of_nothing_is_refused(tmp_path: Path, capsys) -> None:
    words = ["step", "--suite", str(tmp_path / "suite.json"), "--batch", "0", "--variants"]
    assert main(words) == 2 and capsys.readouterr().err == "error: --batch 0 must be above 0\n"


def test_what_an_earlier_case_left_is_freed_before_a_peak_is_measured() -> None:
    """On a GPU it would be subtracted as what was there before, and then be freed."""
    left = torch.nn.Linear(1, 1)
    left.cycle = [left]  # type: ignore[assignment]
    reference = weakref.ref(left)
    gc.disable()
    try:
        del left
        assert reference() is not None
        with _Peak():
            assert reference() is None
    finally:
        gc.enable()
