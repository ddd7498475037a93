"""--dry-run shows what follows from a config and writes nothing; all of configs/ loads."""

import gc
import json
from pathlib import Path

import pytest
from make import write_index

from launch.train import main
from vitscale import config as configs
from vitscale.dry_run import describe
from vitscale.train_config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
STUDIES = set((ROOT / "configs" / "study").glob("*.toml"))  # tests/study has them
CONFIGS = sorted(set((ROOT / "configs").rglob("*.toml")) - STUDIES)


def test_the_numbers_are_shown_and_the_run_directory_is_left_alone(tmp_path: Path, index, capsys) -> None:
    overrides = [
        f"data.index={tmp_path}/shards/index.json",
        f"run_dir={tmp_path}/run",
        "global_batch=16",
        "log.tensorboard=false",
    ]
    overrides += ["model.variant=B/16", "schedule.warmup_steps=1", "optim.weight_decay=0.03"]
    overrides += ["precision=fp32", "optim.ema_decay=0.9"]
    path = tmp_path / "c.toml"
    path.write_text("total_epochs = 3\n")
    frozen = gc.get_freeze_count()
    assert main([str(path), *overrides, "--dry-run"]) == 0
    assert gc.get_freeze_count() > frozen  # what it imported is not searched for garbage
    shown = " ".join(capsys.readouterr().out.split())
    for part in (
        "86,567,656",
        "parameters and state 1.93 GiB",  # 8 + 12 + 4 bytes of each
        "buffers 1.86 GiB",  # a bucket of 5e8 gradients
        "6.907755",
        "3e-05 per step",
        '"train_batch_size": 16',
        "97 in 3 shards",
        "1 each epoch (different ones)",
    ):
        assert part in shown, shown
    assert not (tmp_path / "run").exists()
    assert main([str(path), *overrides, "--dry-run", "modle.variant=B/16"]) == 2
    assert "did you mean model?" in capsys.readouterr().err


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_loads_and_says_what_to_expect(path: Path) -> None:
    config = configs.load(TrainConfig, [path])
    header = path.read_text().split("\n\n")[0].split("run_dir")[0]
    assert "Expected" in header and ("easured here" in header or "not run here" in header)
    assert configs.from_dict(TrainConfig, configs.to_dict(config)) == config


@pytest.mark.parametrize("name", ["imagenet_384", "l16_imagenet_512", "h14_imagenet_518"])
def test_the_other_test_sets_of_imagenet_only_need_their_comment_marks_removed(
    tmp_path: Path, name: str
) -> None:
    text = (ROOT / f"configs/finetune/{name}.toml").read_text()
    before, _, sections = text.partition("# [evals.real]")
    path = tmp_path / "c.toml"
    path.write_text(before + "[evals.real]" + sections.replace("\n# ", "\n").replace("\n#\n", "\n\n"))
    evals = configs.load(TrainConfig, [path]).evals
    tests = {name: task.test.partition("/")[2] for name, task in evals.items()}
    assert tests == {  # the first is what tools/evaluate.py finetune scores
        "val": "imagenet/val.index.json",
        "real": "imagenet_real/val.index.json",
        "v2": "imagenet_v2/test.index.json",
        "objectnet": "objectnet/test.index.json",
    }
    assert next(iter(tests)) == "val"
    crops = {name: task.crop for name, task in evals.items()}
    assert crops == {**dict.fromkeys(tests, "resize"), "objectnet": "center"}


def test_a_config_can_be_written_and_read_back(tmp_path: Path) -> None:
    config = configs.load(
        TrainConfig, [ROOT / "configs/pretrain/vit_b16_in21k.toml"], ["engine.deepspeed_extra.a.b=1"]
    )
    (tmp_path / "c.toml").write_text(configs.to_toml(config))
    assert configs.load(TrainConfig, [tmp_path / "c.toml"]) == config


def test_a_missing_index_is_named_with_the_command_that_makes_it() -> None:
    path = ROOT / "configs/pretrain/vit_b16_in21k.toml"
    config = configs.load(TrainConfig, [path], ["data.num_samples=0"])
    with pytest.raises(
        ValueError, match=r"index data/in21k/index.json is missing; pack .*tools/data.py index SHARDS"
    ):
        describe(config, 8)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_is_planned_without_its_data(path: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)  # where none of the data are
    # What starter.toml leaves to the user.
    overrides = ["data.num_samples=1000", "model.num_classes=3"] if path.stem == "starter" else []
    assert main([str(path), *overrides, "--dry-run", "--world-size", "4"]) == 0
    shown = capsys.readouterr().out
    config = configs.load(TrainConfig, [path], overrides)
    missing = f"{config.data.index} is missing; planned for {config.data.num_samples:,} samples"
    assert shown.count(missing) == 1
    noted = shown.split("# not there yet")[1].split("# data")[0]
    assert config.init.checkpoint in noted
    assert not config.evals or next(iter(config.evals.values())).test in noted
    assert (" about " in shown) == bool(config.data.validation_fraction)
    assert list(tmp_path.iterdir()) == []


def test_a_validation_split_is_counted_and_what_it_leaves_out_is_said(run: list[str], capsys, caplog) -> None:
    assert main([*run, "--dry-run", "data.validation_fraction=0.02", "evals.val.split=validation"]) == 0
    shown = capsys.readouterr().out
    assert "classes               5; model.num_classes is 5" in shown
    assert "train                 94 samples of 5 classes" in shown
    assert "validate              3 samples of 3 classes" in shown
    assert "steps per epoch         11" in shown
    assert "leaves 2 of 5 classes without validation samples: label 0, 3" in caplog.text


@pytest.mark.parametrize(("label_map", "warns"), [("", True), ("{map}", False)])
def test_a_test_set_without_the_label_map_of_the_data_is_named(
    run: list[str], tmp_path: Path, caplog, label_map: str, warns: bool
) -> None:
    path = tmp_path / "map.json"
    path.write_text("[4, 3, 2, 1, 0]")
    index = f"{tmp_path}/shards/index.json"
    evals = [f"evals.val.test={index}", f"evals.val.label_map={label_map.format(map=path)}"]
    evals += ["data.validation_fraction=0.2", "evals.split.split=validation"]
    assert main([*run, "--dry-run", f"data.label_map={path}", *evals]) == 0
    asked = f'the labels of {index} are not mapped; if they are those of {index}, set evals.val.label_map = "'
    assert (asked + str(path) in caplog.text) == ("label_map" in caplog.text) == warns


def test_classes_that_are_numbered_differently_are_named(run: list[str], tmp_path: Path, caplog) -> None:
    paths = [write_index(tmp_path / name, [10]) for name in ("a", "b", "test")]
    for path, names in zip(paths, (["ant", "cat"], ["cat", "dog"], ["bee", "ant", "cat"]), strict=True):
        (path.parent / "classes.json").write_text(json.dumps(names))
    sources = f"data.sources=[{{index='{paths[0]}'}}, {{index='{paths[1]}'}}]"
    assert main([*run, "--dry-run", "data.index=", sources, f"evals.val.test={paths[2]}"]) == 0
    of_sources, of_test = (record.getMessage() for record in caplog.records)
    assert of_sources.startswith(
        f"'cat' is class 1 in {paths[0]} and class 0 in {paths[1]}: the labels of data"
    )
    assert of_test.startswith(
        f"'ant' is class 0 in {paths[0]} and class 1 in {paths[2]}: the test labels of eva"
    )


def test_a_number_of_classes_that_is_missing_is_named(run: list[str], capsys) -> None:
    assert main([*run, "--dry-run", "model.num_classes=0"]) == 2
    assert "model.num_classes is 0, which builds a model without a head; set it to 5" in (
        capsys.readouterr().err
    )
    assert main([*run, "--dry-run", "model.num_classes=0", "data.index=none", "data.num_samples=9"]) == 2
    assert "set it to the number of classes" in capsys.readouterr().err


def test_a_validation_split_that_is_not_cut_is_refused(run: list[str], capsys) -> None:
    assert main([*run, "--dry-run", "evals.val.split=validation"]) == 2
    assert 'evals.val.split = "validation" needs samples that are not trained on; set' in (
        capsys.readouterr().err
    )


def test_the_stated_number_of_samples_gives_the_plan_of_the_index(
    run: list[str], tmp_path: Path, capsys
) -> None:
    assert main([*run, "data.num_samples=97", "--dry-run"]) == 0
    with_index = capsys.readouterr().out
    assert "not there yet" not in with_index
    (tmp_path / "shards" / "index.json").unlink()
    assert main([*run, "data.num_samples=97", "--dry-run"]) == 0
    without = capsys.readouterr().out
    for line in ("steps per epoch", "total steps", "lanes", "global batch"):
        lines = [
            [row for row in shown.splitlines() if row.startswith(line)] for shown in (with_index, without)
        ]
        assert lines[0] == lines[1] != [], line


def test_another_number_of_samples_than_the_index_has_is_refused(run: list[str], capsys) -> None:
    assert main([*run, "data.num_samples=96", "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert "has 97 samples, data.num_samples says 96; index all of the shards, or set it to 97" in error


def test_a_world_size_is_planned_that_is_not_here(run: list[str], capsys) -> None:
    assert main([*run, "--dry-run", "--world-size", "8"]) == 0
    assert '"train_micro_batch_size_per_gpu": 1,' in capsys.readouterr().out
    assert main([*run, "--dry-run", "--world-size", "3"]) == 2
    assert "3 processes cannot share 8 lanes evenly; start one of 1, 2, 4, 8" in capsys.readouterr().err
    for wrong in (["--world-size", "2"], ["--dry-run", "--world-size", "0"]):
        with pytest.raises(SystemExit) as ended:
            main([*run, *wrong])
        assert ended.value.code == 2
        assert "--world-size is a number from 1, for --dry-run only" in capsys.readouterr().err


@pytest.fixture
def run(tmp_path: Path, index) -> list[str]:
    """The arguments of a small run that could start."""
    path = tmp_path / "c.toml"
    path.write_text(f'''
run_dir = "{tmp_path}/run"
global_batch = 8
total_steps = 4
[model]
variant = "Ti/4"
width = 16
depth = 1
num_heads = 2
mlp_dim = 16
image_size = 8
num_classes = 5
[data]
index = "{tmp_path}/shards/index.json"
[engine]
num_workers = 0
[checkpoint]
every_steps = 2
[log]
tensorboard = false
''')
    return [str(path)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evals.x.test=nowhere/*.tar", "no file matches 'nowhere/*.tar'"),
        ("evals.x.test=nowhere/index.json", "index nowhere/index.json is missing"),
        (
            "evals.x={kind='fewshot',shots=[1,99],train='HERE/shards/*.tar',test='HERE/shards/*.tar'}",
            "99-shot evaluation needs 99 training examples of every class, but class 0 has ",
        ),
        ("optim.freeze=['no_such.*']", "optim.freeze 'no_such.*' matches no parameter"),
        ("init.checkpoint=no.npz", "an export in safetensors; convert other files with tools/checkpoint.py"),
        ("init={checkpoint='nowhere',full_state=true}", "nowhere is not a checkpoint: give a run"),
        ("run_dir=", 'run_dir is empty; name a folder, like "runs/a"'),
        (
            "run_dir=s3://b/x",
            'run_dir "s3://b/x" is a URL; run_dir is a folder on disk: set checkpoint.store = "s3://b/x" and',
        ),
        ("run_dir=HERE/c.toml", "c.toml cannot be written: File exists; choose another"),
        ("run_dir=HERE/c.toml/a/b", "c.toml/a/b cannot be written: Not a directory; choose another"),
        (
            "engine.deepspeed_extra.zero_optimization=3",
            "engine.deepspeed_extra.zero_optimization must be a table, not 3; remove it, and set",
        ),
        (
            "engine.deepspeed_extra.zero_optimization.foo=1",
            "engine.deepspeed_extra holds what DeepSpeed refuses",
        ),
        (
            "engine.deepspeed_extra.seq_parallel_communication_data_type=fp17",
            "Invalid communication_data_type",
        ),
        (
            "engine.reduce_precision=bf16",
            'engine.reduce_precision = "bf16" does not fit precision = "fp32"; use "fp32"\n',
        ),
        (
            "precision=bf16 engine.reduce_precision=fp16",
            'engine.reduce_precision = "fp16" does not fit precision = "bf16"; use "fp32" or "bf16"\n',
        ),
    ],
)
def test_what_training_refuses_a_dry_run_refuses(
    run: list[str], tmp_path: Path, override: str, message: str, capsys
) -> None:
    assert main([*run, "--dry-run"]) == 0
    capsys.readouterr()
    override = override.replace("HERE", str(tmp_path))
    sentences = []
    for dry in (["--dry-run"], []):
        assert main([*run, *override.split(), *dry]) == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error
        sentences += [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 2 and len(set(sentences)) == 1, sentences
