"""Studies before they are run: which runs they are, which count, and what is refused."""

import dataclasses
import json
import math
import shutil
import tracemalloc
from pathlib import Path

import pytest
from make import write_index

from tools.study import main
from vitscale import config as configs
from vitscale.errors import ConfigError, Diverged, UserError
from vitscale.finetune.scores import Scores
from vitscale.guard import ending
from vitscale.models.flops import train_flops
from vitscale.study.cells import Cell, cells, finetune_folder, finetuned, num_images, write_result
from vitscale.study.config import StudyConfig
from vitscale.study.paper import AVERAGE5, TABLE6
from vitscale.study.points import chosen, points
from vitscale.study.run import run
from vitscale.study.text import listed, table2

KEPT = Path(__file__).resolve().parents[1] / "kept" / "3cac911" / "adafactor"
RUN = """
run_dir = "unused"
global_batch = 8
total_steps = 6

[model]
variant = "mu/4"
image_size = 8
num_classes = 5

[data]
index = "{index}"
validation_fraction = 0.3
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(RUN.format(index=write_index(tmp_path / "shards", [40, 57])))
    return path


def study_of(base: Path, **changes: object) -> StudyConfig:
    values: dict[str, object] = {
        "out": str(base.parent / "out"),
        "metric": "eval/test/top1",
        "models": [{"name": "one", "config": str(base)}],
    }
    return configs.from_dict(StudyConfig, {**values, **changes})


def finish(cell: Cell, **numbers: float) -> None:
    """What a finished run leaves of its log: a row for each evaluation, (step, top-1)."""
    folder = Path(cell.config.run_dir)
    folder.mkdir(parents=True)
    rows = [
        {"step": int(name.removeprefix("at_")), "eval/test/top1": value} for name, value in numbers.items()
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_result(cell, study_of(Path(cell.model.config)))


def diverge(cell: Cell) -> None:
    Path(cell.config.run_dir).mkdir(parents=True)
    ending.write(Path(cell.config.run_dir), "failed", 4, 6, "the run has diverged", 2, diverged=True)


def test_runs_are_all_combinations_and_each_has_its_own_folder(base: Path) -> None:
    study = study_of(
        base, fractions=[0.5, 1.0], seeds=[0, 7], sweep={"optim.lr": [1e-3, 0.01], "model.depth": [1, 2]}
    )
    runs = cells(study, overrides=["total_steps=9"])
    assert len(runs) == 16 == len({cell.folder for cell in runs})
    last = runs[-1]
    assert last.folder == base.parent / "out/one/fraction-1/seed-7/optim.lr-0.01/model.depth-2"
    assert (last.config.seed, last.config.optim.lr, last.config.model.resolved_depth) == (7, 0.01, 2)
    assert last.config.total_steps == 9 and last.config.run_dir == str(last.folder / "run")
    assert {cell.config.data.fraction for cell in runs} == {0.5, 1.0}
    assert len({json.dumps(configs.to_dict(cell.config)) for cell in runs}) == 16


def test_the_models_that_are_named_are_run_in_the_order_of_the_study(base: Path) -> None:
    study = study_of(base, models=[{"name": name, "config": str(base)} for name in "abc"])
    assert [cell.model.name for cell in cells(study, only=["c", "a"])] == ["a", "c"]


def test_a_value_of_the_sweep_is_chosen_by_the_mean_over_seeds(base: Path) -> None:
    study = study_of(base, seeds=[0, 1], sweep={"optim.lr": [0.1, 0.2]})
    runs = cells(study)
    for cell, value in zip(runs, (0.5, 0.3, 0.1, 0.4), strict=True):  # lr 0.1 has 0.5 and 0.1
        assert not points(study, runs) and not chosen(study, runs)
        finish(cell, at_6=value)
    (point,) = points(study, runs)
    assert point.swept == ("optim.lr=0.2",) and point.mean == pytest.approx(0.35)
    assert point.deviation == pytest.approx(0.05) and point.num_images == round(97 * 0.7)
    assert point.exaflops == train_flops(runs[0].config.model) * 6 * 8 / 1e18


def test_a_value_of_the_sweep_that_made_a_run_diverge_is_not_chosen(base: Path) -> None:
    study = study_of(base, seeds=[0, 1], sweep={"optim.lr": [0.1, 0.2]})
    runs = cells(study)  # lr 0.1, 0.2, and again by the other seed
    diverge(runs[1])
    finish(runs[3], at_6=0.9)
    finish(runs[0], at_6=0.3)
    assert not chosen(study, runs)
    finish(runs[2], at_6=0.4)
    assert chosen(study, runs) == [runs[0], runs[2]] and points(study, runs)[0].swept == ("optim.lr=0.1",)
    states = [line.split()[-2] for line in listed(study, runs).splitlines()[1:5]]
    assert states == ["done", "diverged", "done", "done"]
    said: list[object] = []
    run(study, said=said.append)  # starts nothing
    assert sorted(str(line).split()[-1] for line in said) == ["30.00", "40.00", "90.00", "diverged"]


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        ({"optim.lr": [0.1, 0.2]}, "{run}: .* diverged, as have runs by all .*; add a lower optim.lr to"),
        ({}, "{run}: .* diverged; lower optim.lr in {config}, and delete {out}/one or name"),
    ],
)
def test_a_model_whose_runs_diverged_is_named_once_all_others_are_done(
    base: Path, sweep: dict[str, object], said: str
) -> None:
    models = [{"name": "one", "config": str(base)}, {"name": "two", "config": str(base)}]
    study = study_of(base, models=models, sweep=sweep)
    for cell in (runs := cells(study)):
        if cell.model.name == "two":
            finish(cell, at_6=0.3)
        else:
            diverge(cell)
    lines: list[object] = []
    expected = said.format(run=runs[0].folder, config=base, out=study.out)
    with pytest.raises(Diverged, match=expected):
        run(study, said=lines.append)
    assert len(lines) == len(runs) and [point.model.name for point in points(study, runs)] == ["two"]


def test_the_images_of_a_small_fraction_are_counted_as_they_are_trained_on(base: Path) -> None:
    study = study_of(base, fractions=[1e-4], overrides=["data.num_samples=655_360"])
    overrides = ["data.validation_fraction=0.00001"]  # one hash of 65,536
    (cell,) = cells(study, overrides=overrides)
    assert num_images(cell.config) == 70  # 7 of them
    assert listed(study, [cell]).splitlines()[1].split()[2] == "70"


def test_a_recipe_whose_runs_diverged_leaves_the_others_to_be_done(base: Path) -> None:
    """Nothing is left to train: the first recipe's run has diverged, the second's is done."""
    recipes = {name: str(base.parent / f"{name}.toml") for name in ("first", "second")}
    test = f'[evals.test]\nkind = "classify"\ntest = "{base.parent}/shards/train-*.tar"\n'
    for recipe in recipes.values():
        Path(recipe).write_text(f"{base.read_text()}\n{test}\n[finetune]\nseeds = [0]\n")
    study = study_of(base, recipes=recipes)
    (cell,) = cells(study)
    finish(cell, at_6=0.3)
    shutil.copytree(KEPT / "checkpoints", Path(cell.config.run_dir) / "checkpoints")
    diverged, done = (finetune_folder(cell, name) / "final-seed0" for name in recipes)
    (diverged / "run").mkdir(parents=True)
    ending.write(diverged / "run", "failed", 4, 6, "the run has diverged", 2, diverged=True)
    done.mkdir(parents=True)
    (done / "result.json").write_text(json.dumps({"results": {"top1": 0.5}}))
    with pytest.raises(Diverged, match=rf"^{diverged}: the run has diverged .* in {recipes['first']}, and"):
        run(study, said=lambda _: None)
    assert finetuned(cell, "second") == {"mean": 0.5, "std": 0.0}


@pytest.mark.parametrize("values", [(math.nan, 0.3), (0.3, math.nan)])
def test_a_value_of_the_sweep_that_gave_no_number_is_not_chosen(
    base: Path, values: tuple[float, float]
) -> None:
    study = study_of(base, sweep={"optim.lr": [0.1, 0.2]})
    runs = cells(study)
    for cell, value in zip(runs, values, strict=True):
        finish(cell, at_6=value)
    assert [point.mean for point in points(study, runs)] == [0.3]


def test_a_run_lies_in_the_folder_of_its_study_whatever_its_name(base: Path) -> None:
    out = base.parent / "out \U0001f642 é"
    (cell,) = cells(study_of(base, out=str(out)))
    assert Path(cell.config.run_dir).is_relative_to(out)


def test_the_best_checkpoint_counts_where_the_run_keeps_it(base: Path) -> None:
    best = ["checkpoint.keep_best=eval/test/top1", "evals.test.kind=classify", "evals.test.test=x"]
    for overrides, step, value in ((best, 4, 0.5), ([], 6, 0.2)):
        study = study_of(base, out=str(base.parent / f"out{step}"))
        (cell,) = cells(study, overrides=overrides)
        finish(cell, at_0=0.9, at_2=0.1, at_4=0.5, at_6=0.2)  # of the untrained model nothing is kept
        result = cell.result()
        assert result and (result.step, result.numbers["eval/test/top1"]) == (step, value)


def test_a_long_log_is_not_held_in_memory(base: Path) -> None:
    study = study_of(base)
    (cell,) = cells(study)
    folder = Path(cell.config.run_dir)
    folder.mkdir(parents=True)
    loss = {"run/world_size": 2, **{f"loader/number_{n}": n / 7 for n in range(20)}}
    rows = [{"step": step, **({"eval/test/top1": 0.5} if step == 900 else loss)} for step in range(1, 2001)]
    rows.append({"step": 1990, "checkpoint/seconds": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    start = {"began": 0.0, "elapsed": 86_400.0, "marks": [{"step": 0, "elapsed": 1.0, "seconds": {}}]}
    (folder / "time.json").write_text(json.dumps({"starts": [start]}))
    tracemalloc.start()
    result = write_result(cell, study)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20  # the rows take three times as much
    assert (result.step, result.numbers, result.device_days) == (2000, {"eval/test/top1": 0.5}, 2.0)
    assert cell.last_step() == 2000


def test_a_number_that_no_run_logged_is_named(base: Path) -> None:
    (cell,) = cells(study_of(base))
    Path(cell.config.run_dir).mkdir(parents=True)
    (Path(cell.config.run_dir) / "metrics.jsonl").write_text('{"step": 6, "train/loss": 1.0}\n')
    with pytest.raises(ConfigError, match=r"logged no eval/test/top1; add that evaluation to .*run\.toml"):
        write_result(cell, study_of(base))


@pytest.mark.parametrize("content", ["", '{"a": 1}'])
def test_a_damaged_result_is_named_with_what_to_do(base: Path, content: str) -> None:
    (cell,) = cells(study_of(base))
    for folder, name, read in (
        (cell.folder, "result.json", cell.result),
        (finetune_folder(cell, "x"), "results.json", lambda: finetuned(cell, "x")),
    ):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
        with pytest.raises(UserError, match=rf"{name} is damaged, or of another version; delete it, and "):
            read()


def test_a_metric_that_is_changed_later_is_read_in_the_log(base: Path) -> None:
    sweep = {"optim.lr": [0.1, 0.2]}
    runs = cells(study_of(base, sweep=sweep))
    for cell, top1, top5 in zip(runs, (0.5, 0.4), (0.6, 0.7), strict=True):
        finish(cell, at_6=top1)
        with (Path(cell.config.run_dir) / "metrics.jsonl").open("a") as log:
            log.write(json.dumps({"step": 6, "eval/test/top5": top5}) + "\n")
    changed = study_of(base, sweep=sweep, metric="eval/test/top5", choose_by="eval/test/top1")
    assert [point.mean for point in points(changed, runs)] == [0.6] and "70.00%" in listed(changed, runs)
    changed = study_of(base, sweep=sweep, metric="eval/test/top1", choose_by="eval/test/top5")
    assert [point.mean for point in points(changed, runs)] == [0.4]
    with pytest.raises(ConfigError, match="logged no eval/test/top9; add that evaluation"):
        listed(study_of(base, sweep=sweep, metric="eval/test/top9"), runs)


def test_table_2_has_the_papers_columns_and_ours(base: Path) -> None:
    recipes = {"cifar10": "a.toml", "other": "b.toml"}
    study = study_of(base, recipes=recipes, metric="eval/test/top1", seeds=[0, 1])
    runs = cells(study)
    assert "Nothing was run here" in table2(study, runs)
    for cell, mean in zip(runs, (0.5, 0.7), strict=True):
        finish(cell, at_6=0.1)
        folder = cell.folder / "finetune" / "cifar10"
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps({"mean": mean, "std": 0.01}))
    vtab = Scores(checkpoint="a", protocol="paper", accuracies={"svhn": (0.2, 0.3)}).to_json()
    (runs[0].folder / "finetune" / "vtab").mkdir()
    (runs[0].folder / "finetune" / "vtab" / "results.json").write_text(json.dumps(vtab))
    lines = {line.split("  ")[0]: line for line in table2(study, runs).splitlines()}
    assert lines["CIFAR-10"].split()[-3:] == ["60.00", "±", "10.05"] and "99.50 ± 0.06" in lines["CIFAR-10"]
    assert lines["other"].split()[-1] == "-"
    assert lines["VTAB (19 tasks)"].split()[-3:] == ["25.00", "±", "5.00"]
    flops = train_flops(runs[0].config.model) * 6 * 8
    assert float(lines["TPUv3-core-days"].split()[-1]) == pytest.approx(680 * flops / 1567e18, rel=1e-2)


def test_the_row_of_real_is_its_own_recipes_or_that_of_imagenet(base: Path) -> None:
    study = study_of(base, recipes={"imagenet": "a.toml"})
    (cell,) = runs = cells(study)
    finish(cell, at_6=0.1)
    own = dataclasses.replace(
        study, metric="finetune/imagenet_real", recipes={"imagenet": "a.toml", "imagenet_real": "b.toml"}
    )
    imagenet = {"mean": 0.4, "std": 0.0, "test_sets": {"imagenet_real": {"mean": 0.5, "std": 0.01}}}
    for recipe, values in (("imagenet", imagenet), ("imagenet_real", {"mean": 0.6, "std": 0.0})):
        finetune_folder(cell, recipe).mkdir(parents=True)
        (finetune_folder(cell, recipe) / "results.json").write_text(json.dumps(values))
        lines = [
            {line.split("  ")[0]: line.split()[-3:] for line in table2(of, runs).splitlines()}
            for of in (study, own)
        ]
        assert lines[0]["ImageNet"] == ["40.00", "±", "0.00"]
        assert lines[0]["ImageNet ReaL"] == ["50.00", "±", "1.00"]
        if recipe == "imagenet":  # nothing stands in for a recipe that is to do
            assert lines[1]["ImageNet ReaL"][-1] == "-" and not points(own, runs)
        else:
            assert lines[1]["ImageNet ReaL"] == ["60.00", "±", "0.00"] and points(own, runs)


def test_average_5_is_the_mean_of_table_7_and_takes_all_five_recipes(base: Path) -> None:
    study = study_of(base, recipes=dict.fromkeys(AVERAGE5, "a.toml"), seeds=[0, 1])
    cell, other = runs = cells(study)
    finish(cell, at_6=0.1)
    finish(other, at_6=0.1)

    def tune(cell: Cell, name: str, accuracy: float) -> None:
        folder = finetune_folder(cell, name)
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps({"mean": accuracy, "std": 0.0}))

    def averages() -> list[str]:
        (line,) = [line for line in table2(study, runs).splitlines() if line.startswith("Average-5")]
        return line.split()[1:]

    for name in AVERAGE5:
        assert not points(study, runs, AVERAGE5) and averages() == [
            "95.97",
            "95.63",
            "94.40",
            "95.33",
            "-",
            "-",
        ]
        tune(cell, name, TABLE6["R50x1 7"].accuracy[name] / 100)
    assert averages()[-1] == "89.33", "the mean of the column's five"
    tune(other, "imagenet", TABLE6["R50x1 7"].accuracy["imagenet"] / 100 - 0.1)
    assert averages()[-1] == "88.33" and not points(study, runs, AVERAGE5)
    for name in AVERAGE5[1:]:
        tune(other, name, TABLE6["R50x1 7"].accuracy[name] / 100)
    (point,) = points(study, runs, AVERAGE5)
    assert point.mean == pytest.approx(0.8833) and [point.mean for point in points(study, runs)] == [0.1]


def test_the_list_has_the_mean_of_a_fine_tuning_that_is_the_metric(base: Path) -> None:
    study = study_of(base, recipes={"cifar10": "a.toml"}, metric="finetune/cifar10")
    (cell,) = runs = cells(study)
    finish(cell, at_6=0.1)
    assert listed(study, runs).splitlines()[1].split()[-2:] == ["done", "-"]
    (cell.folder / "finetune" / "cifar10").mkdir(parents=True)
    (cell.folder / "finetune" / "cifar10" / "results.json").write_text('{"mean": 0.625, "std": 0.0}')
    assert listed(study, runs).splitlines()[1].split()[-2:] == ["done", "62.50%"]


def test_a_recipe_that_does_not_fit_is_refused_before_anything_is_trained(base: Path) -> None:
    recipe = base.parent / "recipe.toml"
    recipe.write_text(base.read_text() + '\n[evals.test]\nkind = "classify"\ntest = "x"\n')
    large = {"name": "large", "config": str(base), "overrides": ["model.variant=mu/9", "model.image_size=18"]}
    models = [{"name": "one", "config": str(base)}, large]
    study = study_of(base, recipes={"small": str(recipe)}, models=models)
    refusal = "large cannot be fine-tuned by .*recipe.toml: model.image_size 8 is not a multiple of the patch"
    with pytest.raises(ConfigError, match=refusal):
        run(study)
    recipe.write_text(base.read_text())
    with pytest.raises(ConfigError, match=r"^one cannot be fine-tuned by \S*: the recipe has no \[evals"):
        run(study)
    assert not (base.parent / "out").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"models": []}, "models is empty"),
        ({"models": [{"name": "a", "config": "x"}] * 2}, "different name"),
        ({"models": [{"name": "a", "config": "x", "paper": "ViT-B/17"}]}, "no row of Table 6"),
        ({"metric": "train/loss"}, 'metric "train/loss" is neither'),
        ({"metric": "finetune/x"}, 'metric "finetune/x" names no recipe of one'),
        ({"choose_by": "top1"}, 'choose_by "top1" is not'),
        ({"fractions": []}, "fractions is empty"),
        ({"sweep": {"optim.lr": []}}, "sweep.optim.lr is empty"),
        (
            {"metric": "finetune/x", "recipes": {"x": "y"}, "sweep": {"optim.lr": [1.0]}},
            "choose_by is missing",
        ),
    ],
)
def test_a_study_that_cannot_be_is_refused(base: Path, changes: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        study_of(base, **changes)


def test_mistakes_end_with_one_sentence(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = base.parent / "study.toml"
    path.write_text(
        f'out = "{base.parent}/out"\nmetric = "eval/test/top1"\n[[models]]\nname = "a"\nconfig = "{base}"\n'
    )
    for words, said in (
        (["list", path, "--only", "b"], "the study has no model 'b'; it has a"),
        (["plot", path, base.parent], "holds no finished run"),
        (["list", base], "unknown key"),
        (["list", path, "--set", "optim.lrr=1"], "did you mean optim.lr"),
    ):
        assert main(list(map(str, words))) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error
