"""The folder and the device of a fine-tuning: what may change, and where it runs."""

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from make import write_step
from multiprocess.job import wait_until

from vitscale import command
from vitscale import config as configs
from vitscale.errors import CheckpointError, ConfigError, Diverged, UserError
from vitscale.finetune.protocols import PROTOCOLS
from vitscale.finetune.runs import (
    FineTuning,
    StartingPoint,
    finetuned,
    keep_config,
    keep_source,
    located,
    scored,
    train,
)
from vitscale.finetune.slots import Slots, in_slots
from vitscale.finetune.vtab import VtabConfig, editions, score
from vitscale.guard import ending
from vitscale.models.vit_config import ViTConfig
from vitscale.train_config import TrainConfig
from vitscale.vtab.tasks import TASKS
from vitscale.weights.export import export_metadata, write_export
from vitscale.weights.saved import SavedModel

EVALS = {"a": {"kind": "classify", "test": "x"}}
VIT = ViTConfig(variant="mu/16", image_size=16, num_classes=5)
BASE = {"run_dir": "run", "total_steps": 4, "data": {"index": "x"}, "evals": EVALS}


def config(*overrides: str) -> TrainConfig:
    return configs.resolve(TrainConfig, [BASE], overrides)


def test_a_repeated_command_may_change_what_leaves_results_as_they_are(tmp_path: Path) -> None:
    keep_config(tmp_path, config())
    changed = config("engine.micro_batch=8", "log.every_steps=1", "checkpoint.keep_last=1")
    keep_config(tmp_path, changed)
    assert configs.load(TrainConfig, [tmp_path / "config.toml"]) == changed


@pytest.mark.parametrize("override", ["optim.lr=0.5", "checkpoint.keep_best=eval/a/top1", "total_steps=5"])
def test_a_folder_with_another_run_is_left_as_it_is(tmp_path: Path, override: str) -> None:
    keep_config(tmp_path, config())
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"holds a run with other settings \({key}\); name another --out"):
        keep_config(tmp_path, config(override, "engine.micro_batch=8"))
    assert configs.load(TrainConfig, [tmp_path / "config.toml"]) == config()


def test_a_folder_of_an_earlier_version_is_continued(tmp_path: Path) -> None:
    """It lacks the keys that were added since, and its evaluations decoded in one process."""
    added = ("posemb_at", "distilled", "fraction", "label_smoothing", "head", "reduce_precision")
    lines = configs.to_toml(config("evals.a.num_workers=0")).splitlines()
    kept = [line for line in lines if line.partition(" = ")[0] not in added]
    (tmp_path / "config.toml").write_text("\n".join(kept))
    keep_config(tmp_path, config())
    assert configs.load(TrainConfig, [tmp_path / "config.toml"]) == config()


@pytest.mark.parametrize(
    ("visible", "num_gpus", "used"),
    [
        (None, 2, ["0", "1", "0"]),
        ("4,5", 2, ["4", "5", "4"]),
        ("GPU-5a,GPU-6b,GPU-7c", 3, ["GPU-5a", "GPU-6b", "GPU-7c"]),
        ("4,-1,5", 1, ["4", "4", "4"]),
        ("", 0, ["", "", ""]),
    ],
)
def test_each_process_has_one_of_the_gpus_that_are_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, num_gpus: int, used: list[str]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    code = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    with Slots(3, num_gpus) as slots:
        for _ in used:
            assert slots.run(["-c", code], tmp_path / "log", [sys.executable, "-S"]) == 0
    assert (tmp_path / "log").read_text().splitlines() == used


def test_the_last_error_of_a_process_is_told(tmp_path: Path) -> None:
    code = "print('error: the first', flush=True); exit('error: the last')"
    with Slots(1, 0) as slots, pytest.raises(UserError, match=r"ended early: the last \(.*/log\)$"):
        scored(tmp_path / "a", ["-c", code], slots)


def test_there_is_a_slot_on_each_gpu_unless_told() -> None:
    counts = [Slots(count, num_gpus).count for count, num_gpus in ((0, 3), (0, 0), (2, 3))]
    assert counts == [3, 1, 2]


def test_a_process_that_is_being_started_when_the_others_are_stopped_is_stopped(tmp_path: Path) -> None:
    slots = Slots(1, 0)

    class StoppedMeanwhile(list[str]):
        def __iter__(self) -> Iterator[str]:
            slots.stop()
            return super().__iter__()

    sleeping = StoppedMeanwhile(["-c", "import time; time.sleep(20)"])
    assert slots.run(sleeping, tmp_path / "log", [sys.executable, "-S"]) == -signal.SIGTERM


SAVING = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.2), print("saved", flush=True), sys.exit(75)))
print("begun", flush=True)
time.sleep(20)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGKILL, -signal.SIGKILL)])
def test_processes_save_when_their_command_is_ended(tmp_path: Path, number: int, status: int) -> None:
    log = tmp_path / "log"

    def program() -> int:
        with Slots(1, 0) as slots:
            words = [sys.executable, "-S"]
            in_slots({"a": lambda: [slots.run(["-c", SAVING], log, words)]}, slots, print)
        return 0

    process = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(command.run(program)))
    process.start()
    wait_until(lambda: log.exists() and log.read_text() == "begun\n", lambda: "")
    os.kill(process.pid or 0, number)
    process.join()
    if number == signal.SIGTERM:  # it has waited for what it had started
        assert log.read_text() == "begun\nsaved\n"
    wait_until(lambda: log.read_text() == "begun\nsaved\n", log.read_text)
    assert process.exitcode == status


FAILING = """
import pathlib, sys
print("begun", flush=True)
run = pathlib.Path(sys.argv[2]).parent / "run"
run.mkdir(exist_ok=True)
(run / "status.json").write_text('{"state": "failed", "step": 4, "total_steps": 8%s}')
sys.exit(2)
"""


@pytest.mark.parametrize(
    ("key", "kind", "starts"),
    [(', "diverged": true', Diverged, 1), (', "diverged": false', UserError, 2), ("", UserError, 2)],
)
def test_a_run_that_diverged_is_not_trained_again(
    tmp_path: Path, key: str, kind: type[UserError], starts: int
) -> None:
    with Slots(1, 0) as slots:
        for _ in range(2):
            with pytest.raises(UserError) as raised:
                train(tmp_path, slots, [sys.executable, "-S", "-c", FAILING % key])
            assert raised.type is kind
    assert (tmp_path / "log").read_text() == "begun\n" * starts


@pytest.fixture
def stopped() -> Slots:
    """Slots that start nothing: what a folder holds is what counts."""
    slots = Slots(1, 0)
    slots.stop()
    return slots


STEP = "/bucket/run/checkpoints/step-000000007"
START = StartingPoint(named="/bucket/run", path=STEP, step=7, model=VIT, weights="w1", version="")


def test_a_vtab_run_starts_from_the_checkpoint_that_was_located(tmp_path: Path, stopped: Slots) -> None:
    vtab = VtabConfig(checkpoint="/bucket/run", data=tmp_path / "data", out=tmp_path / "out")
    with pytest.raises(UserError, match="ended early"):
        score(vtab, TASKS["svhn"], START, stopped)
    values = tomllib.loads((tmp_path / "out/svhn/final-seed0/config.toml").read_text())
    assert values["init"]["checkpoint"] == START.path


@pytest.mark.parametrize("num_diverged", [1, 4])
def test_a_setting_of_vtabs_sweep_that_diverged_loses(
    tmp_path: Path, stopped: Slots, num_diverged: int
) -> None:
    folder, said = tmp_path / "svhn", []
    for place, setting in enumerate(PROTOCOLS["light"].settings):
        (folder / f"sweep-{setting}" / "run").mkdir(parents=True)
        if place < num_diverged:
            run = folder / f"sweep-{setting}" / "run"
            ending.write(run, "failed", 4, 8, "the run has diverged", 2, diverged=True)
        else:
            result = {"results": {"top1": 0.4 if place == 2 else 0.3}}
            (folder / f"sweep-{setting}" / "result.json").write_text(json.dumps(result))
    vtab = VtabConfig(checkpoint="a", data=tmp_path, out=tmp_path, protocol="light")
    sentence = "svhn/final-seed0: .* ended early" if num_diverged < 4 else "svhn: the runs of all"
    with pytest.raises(UserError, match=sentence):
        score(vtab, TASKS["svhn"], START, stopped, said.append)
    assert [line.split()[-1] for line in said] == ["diverged"] * num_diverged
    if num_diverged < 4:
        final = configs.load(TrainConfig, [folder / "final-seed0" / "config.toml"])
        best = PROTOCOLS["light"].settings[2]
        assert (final.optim.lr, final.total_steps) == (best.lr, best.steps)


@pytest.mark.parametrize(
    "report", ["[]", "[" * 100_000, '{"edition": 3}', None], ids=["list", "nested", "number", "none"]
)
def test_a_task_whose_report_is_damaged_is_of_an_unknown_edition(tmp_path: Path, report: str | None) -> None:
    folder = tmp_path / "svhn"
    folder.mkdir()
    for part in ("train800", "val200", "train800val200", "test"):
        (folder / f"{part}-000000.tar").touch()
    if report:
        (folder / "pack-report.json").write_text(report)
    vtab = VtabConfig(checkpoint="a", data=tmp_path, out=tmp_path / "out")
    assert editions(vtab, "svhn") == ["svhn: nothing says which images these are"]


@pytest.mark.parametrize(
    ("override", "owner"), [("seed=1", "--seeds"), ("init.checkpoint=b", "CKPT"), ("run_dir=r", "--out")]
)
def test_what_vtab_sets_itself_cannot_be_overridden(tmp_path: Path, override: str, owner: str) -> None:
    with pytest.raises(ConfigError, match=f"--set {override}: .* follows from {owner} here"):
        VtabConfig(checkpoint="a", data=tmp_path, out=tmp_path, overrides=(override,))


def test_a_live_run_is_located_at_its_newest_step(tmp_path: Path) -> None:
    model = {"kind": "vit", **dataclasses.asdict(VIT)}
    steps = [
        write_step(tmp_path, step, {("fp32", "a"): torch.full((2,), float(step))}, config={"model": model})
        for step in (1, 2)
    ]
    newest, older = located(str(tmp_path)), located(str(steps[0]))
    assert (newest.path, newest.step, newest.model) == (str(steps[1]), 2, VIT)
    assert (older.path, older.step) == (str(steps[0]), 1) and older.weights != newest.weights


def test_an_export_is_known_by_its_weights(tmp_path: Path, model: Path) -> None:
    assert located(str(shutil.copy(model, tmp_path))).weights == located(str(model)).weights


def tuning(folder: Path, start: StartingPoint = START, data: str = "/data/test.tar") -> FineTuning:
    values = {**BASE, "init": {"checkpoint": start.path}}
    return FineTuning(folder=folder, start=start, values=values, overrides=(), score=("--data", data))


def test_a_result_counts_for_its_weights_and_test_set_alone(tmp_path: Path, stopped: Slots) -> None:
    with pytest.raises(UserError, match="ended early"):
        finetuned(tuning(tmp_path), stopped)
    (tmp_path / "result.json").write_text('{"results": {"top1"')
    with pytest.raises(UserError, match=r"result\.json is damaged, .*; delete it, and the same command"):
        finetuned(tuning(tmp_path), stopped)
    (tmp_path / "result.json").write_text(json.dumps({"results": {"top1": 0.5}}))
    assert finetuned(tuning(tmp_path), stopped) == 0.5
    for other, said in (
        (
            tuning(tmp_path, dataclasses.replace(START, weights="w2")),
            r"another checkpoint \(.*step-000000007 \(step 7, model \w{32}\), now .*model \w{32}\)\); name",
        ),
        (
            tuning(tmp_path, dataclasses.replace(START, model=dataclasses.replace(VIT, gelu="exact"))),
            r"another checkpoint \(",
        ),
        (tuning(tmp_path, data="/b"), r"another evaluation \(--data /data/test.tar, now --data /b\); name"),
    ):
        with pytest.raises(ConfigError, match=f"{tmp_path} holds results of {said}"):
            finetuned(other, stopped)


@pytest.mark.parametrize("content", [b"init = 3", b"run_dir = ", b"\xff"])
def test_a_damaged_config_is_one_sentence(tmp_path: Path, stopped: Slots, content: bytes) -> None:
    (tmp_path / "config.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config.toml cannot be read by this vitscale .*another --out"):
        finetuned(tuning(tmp_path), stopped)


def test_a_source_of_an_earlier_version_counts_by_its_weights(tmp_path: Path) -> None:
    source = {"checkpoint": f"{STEP} (step 7, weights w1)", "evaluation": "--data a"}
    (tmp_path / "source.json").write_text(json.dumps(source))
    keep_source(tmp_path, START, ["--data", "a"])
    for content in ("", "{}"):
        (tmp_path / "source.json").write_text(content)
        with pytest.raises(UserError, match=r"source\.json is damaged, .*; name another --out, or delete it"):
            keep_source(tmp_path, START, ["--data", "a"])
    (tmp_path / "source.json").write_text(json.dumps(source))
    with pytest.raises(ConfigError, match=r"another checkpoint \(.*weights w1\), now "):
        keep_source(tmp_path, dataclasses.replace(START, weights="w2"), ["--data", "a"])


def test_a_result_of_an_earlier_version_counts_where_its_config_fits(tmp_path: Path, stopped: Slots) -> None:
    """It named the run, and no step; of another run it is refused."""
    config = tuning(tmp_path).config()
    for place in (START.named, START.path):
        folder = tmp_path / place.replace("/", "-")
        keep_config(
            folder, dataclasses.replace(config, init=dataclasses.replace(config.init, checkpoint=place))
        )
        (folder / "result.json").write_text(json.dumps({"results": {"top1": 0.5}}))
        assert finetuned(tuning(folder), stopped) == 0.5 and not (folder / "source.json").exists()
        other = dataclasses.replace(START, named="/bucket/other", path="/bucket/other/step")
        with pytest.raises(ConfigError, match=r"other settings \(init.checkpoint\)"):
            finetuned(tuning(folder, other), stopped)


@pytest.mark.parametrize("has_begun", [False, True])
def test_what_an_earlier_version_left_goes_on_as_it_began_or_begins_anew(
    tmp_path: Path, stopped: Slots, has_begun: bool
) -> None:
    config = tuning(tmp_path).config()
    keep_config(
        tmp_path, dataclasses.replace(config, init=dataclasses.replace(config.init, checkpoint=START.named))
    )
    if has_begun:
        (tmp_path / "run").mkdir()
    for _ in range(2):
        with pytest.raises(UserError, match="ended early"):
            finetuned(tuning(tmp_path), stopped)
        kept = tomllib.loads((tmp_path / "config.toml").read_text())
        assert kept["init"]["checkpoint"] == (START.named if has_begun else START.path)
        assert (tmp_path / "source.json").exists() != has_begun  # nobody knows from which step it began


def test_nothing_starts_from_an_export_that_was_replaced_meanwhile(
    tmp_path: Path, model: Path, stopped: Slots
) -> None:
    export = tmp_path / "e.safetensors"
    shutil.copy(model, export)
    start = located(str(export))
    vtab = VtabConfig(checkpoint=str(export), data=tmp_path, out=tmp_path / "vtab", protocol="linear")

    def probe() -> object:
        return score(vtab, TASKS["svhn"], start, stopped)

    def training() -> object:
        return finetuned(tuning(tmp_path / "tuned", start), stopped)

    os.utime(export, (1, 1))  # copied anew
    for begin in (training, probe):
        with pytest.raises(UserError, match="ended early"):
            begin()
    tensors = {name: 2 * tensor for name, tensor in SavedModel(model).tensors()}
    write_export(export, tensors.items(), SavedModel(model).shapes, export_metadata(start.model, 9, "fp32"))
    for begin in (training, probe):
        with pytest.raises(CheckpointError, match=r"e.safetensors holds other weights .* of step 0, or"):
            begin()


def test_a_probe_counts_for_its_weights_alone(tmp_path: Path, stopped: Slots) -> None:
    vtab = VtabConfig(checkpoint="a", data=tmp_path / "data", out=tmp_path, protocol="linear")
    result = tmp_path / "svhn/linear-seed0/result.json"
    result.parent.mkdir(parents=True)
    result.write_text(json.dumps({"results": {"top1": 0.5}}))
    with pytest.raises(UserError, match="ended early"):  # no source says whose result that is
        score(vtab, TASKS["svhn"], START, stopped)
    result.write_text(json.dumps({"results": {"top1": 0.5}}))
    assert score(vtab, TASKS["svhn"], START, stopped) == [0.5]
    with pytest.raises(ConfigError, match="linear-seed0 holds results of another checkpoint"):
        score(vtab, TASKS["svhn"], dataclasses.replace(START, weights="w2"), stopped)
