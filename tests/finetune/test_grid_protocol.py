"""A recipe from its learning rates to mean and deviation, killed and continued."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from finetune.commands import ROOT, TIMEOUT_SECONDS, run
from make import write_index, write_step

from tools.evaluate import main
from vitscale import config as configs
from vitscale.errors import ConfigError
from vitscale.finetune import grid
from vitscale.finetune.grid import GridResult, absolute_pattern, read, values_for
from vitscale.finetune.model import KEYS, tuned_model
from vitscale.finetune.runs import located
from vitscale.guard import ending
from vitscale.models.hybrid import HybridConfig
from vitscale.models.resnet import ResNetConfig
from vitscale.models.vit_config import ViTConfig
from vitscale.stores import storage
from vitscale.train_config import InitConfig, TrainConfig

RECIPE = """
run_dir = "unused"
global_batch = 8
total_steps = 4

[model]
variant = "B/4"                    # the checkpoint has another, which counts
image_size = 12
num_classes = 5

[data]
index = "{index}"

[optim]
name = "sgd"
lr = 0.5

[engine]
micro_batch = 4
num_workers = 0

[finetune]
learning_rates = [0.1, 1e-9]
dev_fraction = 0.3
seeds = [3, 4]

[evals.test]
kind = "classify"
test = "{test}"
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    index = write_index(tmp_path / "shards", [40, 43])
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(index=index, test=index.parent / "train-*.tar"))
    return path


def command(model: Path, recipe: Path, *options: str) -> list[str]:
    words = ["tools/evaluate.py", "finetune", model, "--recipe", recipe, "--out", recipe.parent / "out"]
    return [sys.executable, *map(str, words), *options]


def finetune(model: Path, recipe: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return run(command(model, recipe, *options))


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("./test-0.tar", ["test-0.tar"]),
        ("test-[0].tar", ["test-0.tar"]),
        ("x/../test-*.tar", ["test-0.tar", "test-1.tar"]),
    ],
)
def test_test_shards_are_found_from_a_folder_of_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, names: list[str]
) -> None:
    odd = tmp_path / "odd [x]*"
    odd.mkdir()
    monkeypatch.chdir(odd)
    for number in range(2):
        (odd / f"test-{number}.tar").touch()
    absolute = absolute_pattern(pattern)
    assert storage.expand(absolute) == [f"{odd}/{name}" for name in names]
    assert absolute_pattern(absolute) == absolute and absolute_pattern("s3://b/*.tar") == "s3://b/*.tar"


def test_a_recipe_is_done_once_whole(model: Path, recipe: Path, sweep: bool) -> None:
    if not sweep:
        pytest.skip("with --sweep: eight processes; test_vtab_run.py kills and continues fine-tunings, too")
    out = recipe.parent / "out"
    first = subprocess.Popen(command(model, recipe), cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not (out / "lr0.1" / "result.json").exists():
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before = (out / "lr0.1" / "result.json").stat().st_mtime_ns
    second = finetune(model, recipe)
    assert second.returncode == 0, second.stderr
    assert (out / "lr0.1" / "result.json").stat().st_mtime_ns == before
    results = json.loads((out / "results.json").read_text())
    assert set(results["dev"]) == {"0.1", "1e-09"} and len(results["accuracies"]) == 2
    best = max(results["dev"], key=results["dev"].get)
    assert results["learning_rate"] == float(best)
    for seed in (3, 4):
        text = (out / f"final-seed{seed}" / "config.toml").read_text()
        assert f"lr = {results['learning_rate']!r}" in text and "validation_fraction = 0.0" in text
        assert "image_size = 12" in text and 'variant = "Ti/4"' in text and f"seed = {seed}" in text
    split = json.loads((out / "lr0.1" / "result.json").read_text())["results"]
    assert 10 < split["num_samples"] < 40 and "loss" in split
    assert "rate 0.1" in second.stdout and "±" in second.stdout


def test_all_runs_of_a_recipe_start_from_one_step(tmp_path: Path, recipe: Path) -> None:
    vit = {"kind": "vit", **dataclasses.asdict(ViTConfig(variant="mu/4", image_size=8))}
    step = write_step(tmp_path / "live", 2, {("fp32", "a"): torch.zeros(2)}, config={"model": vit})
    runs = {"lr0.1": 0.2, "lr1e-09": 0.3, "final-seed3": 0.5, "final-seed4": 0.7}
    for name, top1 in runs.items():  # done, so that no process starts
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "result.json").write_text(json.dumps({"results": {"top1": top1}}))
    result = grid.run(str(tmp_path / "live"), str(recipe), tmp_path / "out", said=lambda _: None)
    assert (result.checkpoint, result.accuracies) == (str(step), (0.5, 0.7))
    for name in runs:
        config = configs.load(TrainConfig, [tmp_path / "out" / name / "config.toml"])
        assert config.init.checkpoint == str(step)
        assert config.seed == (4 if name == "final-seed4" else 3)


def test_further_test_sets_are_scored_on_the_final_runs_and_change_no_training(
    model: Path, recipe: Path
) -> None:
    out, said = recipe.parent / "out", []

    def result_of(top1: dict[str, float], *overrides: str) -> GridResult:
        for name, value in top1.items():  # done, so that no process starts
            (out / name).mkdir(parents=True)
            (out / name / "result.json").write_text(json.dumps({"results": {"top1": value}}))
        return grid.run(str(model), str(recipe), out, overrides, said=said.append)

    plain = result_of({"lr0.1": 0.2, "lr1e-09": 0.3, "final-seed3": 0.5, "final-seed4": 0.7})
    more = "finetune.test_sets.more=/nowhere/index.json"
    assert result_of({}, more) == dataclasses.replace(plain, overrides=(more,)) and not plain.test_sets
    assert said[-1].startswith("more is not scored: /nowhere/index.json is missing; pack it, and the same")
    found = result_of({"final-seed3/on-more": 0.25, "final-seed4/on-more": 0.75}, more)
    assert found.test_sets == {"more": (0.25, 0.75)}
    assert found.to_json()["test_sets"] == {"more": {"accuracies": (0.25, 0.75), "mean": 0.5, "std": 0.25}}
    assert "Not the recipe" not in found.text()
    assert result_of({}, 'finetune.test_sets.more=""').test_sets == {}
    scores = {"final-seed3/on-test": 0.1, "final-seed4/on-test": 0.1}
    text = result_of(scores, "finetune.test_sets.test=x").text()
    assert "test 60.00" in text and "test 10.00" in text
    (out / "final-seed4/on-more/source.json").write_text(json.dumps({"evaluation": "e"}))
    (out / "results.json").unlink()
    with pytest.raises(ConfigError, match=r"on-more holds .* evaluation \(e, now .*, or delete that folder$"):
        result_of({}, more)
    assert "test 60.00" in said[-1] and f"In {out}: results.json, with all but" in said[-1]
    results = json.loads((out / "results.json").read_text())
    assert results["mean"] == 0.6 and not results["test_sets"]  # what was trained is not lost


def test_the_score_maps_the_labels_of_the_test_set(
    model: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe.write_text(f'{recipe.read_text()}label_map = "map.json"\n')
    folder = tmp_path / "out" / "final-seed3"
    folder.mkdir(parents=True)
    source = {"checkpoint": str(located(str(model))), "evaluation": "another"}
    (folder / "source.json").write_text(json.dumps(source))
    with pytest.raises(ConfigError, match=rf"another evaluation \(.* --label-map {tmp_path}/map.json\)"):
        grid.run(str(model), str(recipe), tmp_path / "out", ["finetune.learning_rates=[]"])


@pytest.mark.parametrize(
    ("diverged", "error"),
    [
        (["lr0.1"], ""),
        (["lr0.1", "lr1e-09"], "{out}: the runs of all learning rates have diverged; lower {way_out}"),
        (["final-seed4"], "{out}/final-seed4: the run has diverged ({out}/final-seed4/log); lower {way_out}"),
    ],
)
def test_a_learning_rate_that_diverged_loses_and_only_a_recipe_without_a_result_fails(
    model: Path, recipe: Path, capsys: pytest.CaptureFixture[str], diverged: list[str], error: str
) -> None:
    out = recipe.parent / "out"
    for name in ("lr0.1", "lr1e-09", "final-seed3", "final-seed4"):  # done, so that no process starts
        (out / name / "run").mkdir(parents=True)
        if name in diverged:
            ending.write(out / name / "run", "failed", 4, 8, "the run has diverged", 2, diverged=True)
        else:
            (out / name / "result.json").write_text(json.dumps({"results": {"top1": 0.5}}))
    assert main(command(model, recipe)[2:]) == (2 if error else 0)
    said = capsys.readouterr()
    assert said.err.count("\n") == bool(error)
    way_out = f"finetune.learning_rates in {recipe}, and delete {out} or name another --out"
    assert error.format(out=out, way_out=way_out) in said.err
    if not error:
        results = json.loads((out / "results.json").read_text())
        assert (results["dev"], results["diverged"]) == ({"1e-09": 0.5}, [0.1])
        assert f"{out}/lr0.1 diverged" in said.out and "  rate 0.1      diverged" in said.out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["--set", "finetune.dev_fraction=0"],
            "finetune.dev_fraction 0.0 must lie in [0, 1), and above 0 where",
        ),
        (["--set", "finetune.seeds=[]"], "finetune.seeds [] must list different numbers"),
        (
            ["--set", "finetune.test_sets.a/b=x"],
            "finetune.test_sets.'a/b' names a folder; take letters,",
        ),
        (["--set", "finetune.learning_rates=[0]"], "finetune.learning_rates [0.0] must be above 0"),
        (
            ["--set", "init.checkpoint=x", "--set", "init.full_state=true"],
            "error: the recipe's init.full_state continues a run, and a fine-tuning is a new one: leave",
        ),
        (["--set", "evals.test=false"], 'the recipe has no [evals.NAME] of kind "classify" with test shards'),
    ],
)
def test_a_recipe_that_cannot_be_done_is_refused(
    model: Path, recipe: Path, capsys: pytest.CaptureFixture[str], options: list[str], sentence: str
) -> None:
    assert main(command(model, recipe, *options)[2:]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("error: ") == 1, error
    assert not (recipe.parent / "out").exists()


@pytest.mark.parametrize(
    ("override", "owner"),
    [
        ("optim.lr=0.5", "finetune.learning_rates"),
        ("seed=9", "finetune.seeds"),
        ("data.validation_fraction=0.2", "finetune.dev_fraction"),
        ("init.checkpoint=other", "CKPT"),
        ("model.pool=mean", "CKPT"),
        ("run_dir=x", "--out"),
        ("checkpoint.keep_best=eval/test/top1", "the protocol, by which the last step is scored,"),
    ],
)
def test_what_a_fine_tuning_sets_itself_cannot_be_overridden(recipe: Path, override: str, owner: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(
        ConfigError, match=f"^--set {override}: {key} follows from {owner} here; leave it out"
    ):
        read(str(recipe), [override])


def test_a_recipe_without_rates_and_the_models_size_can_be_overridden(recipe: Path) -> None:
    overrides = ["finetune.learning_rates=[]", "optim.lr=0.25", "model.image_size=16"]
    config, _ = read(str(recipe), overrides)
    assert config.optim.lr == 0.25 and config.model.image_size == 16


def test_overrides_that_change_no_result_are_no_deviation() -> None:
    overrides = ("engine.micro_batch=8", "checkpoint.keep_best=eval/x/top1", "log.norms=true", "optim.lr=0.1")
    result = GridResult(
        checkpoint="c",
        recipe="r",
        dev={},
        diverged=(),
        learning_rate=0.1,
        accuracies=(0.5,),
        test_sets={},
        overrides=overrides,
    )
    said = [line for line in result.text().splitlines() if line.startswith("Not the recipe")]
    assert said == [f"Not the recipe: {overrides[1]}", "Not the recipe: optim.lr=0.1"]


def test_a_recipe_says_what_is_taken_along_of_a_checkpoint() -> None:
    recipe = configs.load(TrainConfig, [ROOT / "configs/finetune/deit_b16_384.toml"])
    model = ViTConfig(variant="Ti/16", image_size=224, num_classes=1000, distilled=True)
    tuned = configs.from_dict(TrainConfig, values_for(recipe, "s3://bucket/run", model))
    assert tuned.init == InitConfig(checkpoint="s3://bucket/run", ema=True, head=True)
    assert tuned.model == dataclasses.replace(model, image_size=384, drop_path=0.1)
    assert not tuned.evals and tuned.augment == recipe.augment


def test_a_fine_tuning_takes_of_a_recipe_what_its_kind_of_model_has() -> None:
    values = {"image_size": 32, "num_classes": 5, "representation_size": 8, "head_bias": -1.0, "dropout": 0.1}
    assert set(KEYS) <= set(dataclasses.asdict(ViTConfig()))
    assert tuned_model(ViTConfig(variant="mu/16"), values) == ViTConfig(variant="mu/16", **values)
    resnet = ResNetConfig(image_size=32, num_classes=5, head_bias=-1.0)
    assert tuned_model(ResNetConfig(), values) == resnet


def test_what_a_recipe_lacks_is_not_taken_from_the_checkpoint() -> None:
    model = ViTConfig(variant="mu/16", representation_size=8, dropout=0.1, drop_path=0.1, head_bias=-1.0)
    recipe = ResNetConfig(image_size=32, num_classes=5)
    tuned = tuned_model(model, dataclasses.asdict(recipe))
    assert tuned == ViTConfig(variant="mu/16", image_size=32, num_classes=5)


def test_the_papers_recipes_have_its_dropout() -> None:
    names = ["l16_imagenet_512", "h14_imagenet_518"]
    names += [f"{name}_384" for name in ("imagenet", "cifar10", "cifar100", "pets", "flowers102")]
    for name in names:
        model = configs.load(TrainConfig, [ROOT / f"configs/finetune/{name}.toml"]).model
        assert isinstance(model, ViTConfig) and model.dropout == 0.1, name


def test_augregs_models_are_fine_tuned_without_the_papers_dropout() -> None:
    option = "model.dropout=0"
    for path in (ROOT / "configs/pretrain").glob("*_augreg.toml"):
        assert f"--set {option} " in path.read_text().partition("run_dir")[0], path.name
    recipe, _ = read(str(ROOT / "configs/finetune/imagenet_384.toml"), [option])
    for model in (ViTConfig(variant="B/16"), HybridConfig(variant="R26+S/32")):
        tuned = configs.from_dict(TrainConfig, values_for(recipe, "runs/augreg", model)).model
        assert isinstance(tuned, ViTConfig) and tuned.dropout == 0


def test_a_recipe_that_keeps_its_best_checkpoint_is_tuned_without_evaluations(recipe: Path) -> None:
    with recipe.open("a") as file:
        file.write('\n[checkpoint]\nkeep_best = "eval/test/top1"\n')
    config, _ = read(str(recipe))
    values = values_for(config, "runs/vit", ViTConfig(variant="mu/4"))
    assert values["evals"] == {} and values["checkpoint"]["keep_best"] == ""
