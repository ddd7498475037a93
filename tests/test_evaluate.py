"""tools/evaluate.py end to end on a small export: results, JSON, ranks, wrong input."""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from make import write_step
from PIL import Image

from tools import study
from tools.evaluate import main, print_details
from vitscale.checkpoint.safetensors import write_safetensors
from vitscale.config import to_dict
from vitscale.evals import ClassifyConfig
from vitscale.evaluate import evaluate
from vitscale.models import build_model
from vitscale.models.vit_config import ViTConfig
from vitscale.weights.saved import load_model

ROOT = Path(__file__).resolve().parents[1]
CLASSES = 7


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untrained model, with a head that is not zero, exported at step 123."""
    return write_model(tmp_path_factory.mktemp("export") / "model.safetensors")


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with finite weights that overflow in every forward pass."""
    return write_model(tmp_path_factory.mktemp("export") / "overflowing.safetensors", final_norm=3e38)


def write_model(path: Path, *, final_norm: float = 1.0) -> Path:
    config = ViTConfig(
        width=16, depth=1, num_heads=2, mlp_dim=32, patch_size=4, image_size=8, num_classes=CLASSES
    )
    state = build_model(config, seed=0).state_dict()
    generator = torch.Generator().manual_seed(1)
    state["head.weight"] = torch.randn(state["head.weight"].shape, generator=generator)
    state["norm.weight"] = torch.full_like(state["norm.weight"], final_norm)
    metadata = {"format": "pt", "vitscale.model": json.dumps(to_dict(config)), "vitscale.step": "123"}
    write_safetensors(path, state, metadata)
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """42 samples to train on and 23 to test on: no number of ranks divides 23."""
    folder = tmp_path_factory.mktemp("shards")
    generator = np.random.default_rng(0)
    for name, count in (("train-000000.tar", 42), ("test-000000.tar", 23)):
        with tarfile.open(folder / name, "w") as tar:
            for i in range(count):
                image = io.BytesIO()
                Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(image, "png")
                for extension, data in (("png", image.getvalue()), ("cls", str(i % CLASSES).encode())):
                    member = tarfile.TarInfo(f"{i:05d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder


def run_tool(*arguments: object, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["tools/evaluate.py", *map(str, arguments)]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_classify_scores_the_models_own_logits(export: Path, shards: Path):
    test = ClassifyConfig(test=f"{shards}/test-*.tar", batch_size=10)
    outcome = evaluate(str(export), "classify", test, torch.device("cpu"))
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    with tarfile.open(shards / "test-000000.tar") as tar:
        files = [tar.extractfile(f"{i:05d}.png").read() for i in range(23)]  # type: ignore[union-attr]
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(io.BytesIO(file)))) for file in files])
    with torch.no_grad():
        logits = load_model(export)(pixels.permute(0, 3, 1, 2) / 127.5 - 1.0)
    order, labels = logits.argsort(1, descending=True), torch.arange(23)[:, None] % CLASSES
    ranks = (order == labels).int().argmax(1)  # where the right class stands
    expected = {"top1": int((ranks < 1).sum()) / 23, "top5": int((ranks < 5).sum()) / 23, "num_samples": 23}
    assert 0 < expected["top1"] < expected["top5"] < 1
    assert outcome.pop("details")["calibration_error"] > 0
    assert outcome == {"checkpoint": str(export), "step": 123, "results": expected}


@pytest.mark.parametrize("in_list", [False, True])
def test_a_label_map_is_asked_for_where_the_training_had_one(
    export: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog, capsys, in_list: bool
):
    monkeypatch.setenv("LOCAL_RANK", "0")
    model = load_model(export)
    tensors = {("fp32", name): param.detach() for name, param in model.named_parameters()}
    data = {"index": "data/index.json", "label_map": "data/map 1.json"}
    section = {"index": "", "label_map": "", "sources": [data]} if in_list else data
    write_step(tmp_path / "run", 2, tensors, config={"model": to_dict(model.config), "data": section})
    (tmp_path / "map.json").write_text("[1, 2, 3, 4, 5, 6, 0]")
    words = ["classify", str(tmp_path / "run"), "--data", str(shards), "--json", str(tmp_path / "out.json")]
    asked = "those of data/index.json, pass --label-map 'data/map 1.json'"
    for more, first in (([], "0"), (["--label-map", str(tmp_path / "map.json")], "0 (from 6)")):
        caplog.clear()
        assert main([*words, *more]) == 0, capsys.readouterr().err
        assert (asked in caplog.text) == (not more)
        details = json.loads((tmp_path / "out.json").read_text())["details"]
        assert details["per_class"][0]["name"] == first


def test_three_ranks_give_the_json_that_one_process_gives(export: Path, shards: Path, tmp_path: Path):
    outcomes = []
    odd = tmp_path / "odd [x]"
    odd.symlink_to(shards)
    for ranks, folder in ((1, odd), (3, shards)):
        out = tmp_path / f"{ranks}.json"
        words = ("classify", export, "--data", folder, "--batch-size", 5, "--json", out)
        result = run_tool(*words, ranks=ranks)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("step 123") == 1  # one rank speaks
        outcomes.append(json.loads(out.read_text()))
    # A sum of confidences, which batches of other sizes round differently.
    errors = [outcome["details"].pop("calibration_error") for outcome in outcomes]
    assert errors[0] == pytest.approx(errors[1], rel=1e-6)
    assert outcomes[0] == outcomes[1]
    assert set(outcomes[0]["results"]) == {"top1", "top5", "num_samples"}
    assert set(outcomes[0]) == {"checkpoint", "step", "results", "details"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fewshot", "{export}"], "fewshot needs --data FOLDER"),
        (["fewshot", "{export}", "--data", "{shards}", "--shots", "50"], "class 0 has 6"),
        (["fewshot", "{export}", "--data", "{shards}", "--shots", "few"], "whole numbers with commas"),
        (["classify", "{export}", "--data", "nowhere"], "no file matches"),
        (["classify", "nowhere", "--data", "{shards}"], "nowhere is not a checkpoint"),
        (["classify", "{export}", "--data", "{shards}/none.tar"], "none.tar"),
        (
            ["classify", "{overflowing}", "--data", "{shards}", "--predictions", "{shards}/rows.jsonl"],
            "overflowing.safetensors, step 123: the logits of 23 of 23 images are not finite, so there is",
        ),
        (["fewshot", "{overflowing}", "--data", "{shards}", "--shots", "1"], "step 123: the features of"),
    ],
)
def test_what_the_user_gets_wrong_is_one_sentence_and_status_2(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    export: Path,
    overflowing: Path,
    shards: Path,
    arguments: list[str],
    message: str,
):
    monkeypatch.setenv("LOCAL_RANK", "0")
    places = {"export": export, "overflowing": overflowing, "shards": shards}
    with pytest.raises(SystemExit) as ended:
        sys.exit(main([word.format(**places) for word in arguments]))
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and error.count("error: ") == 1, error


@pytest.mark.parametrize(
    ("option", "path", "message"),
    [
        ("--json", "data/train-000000.tar", "train-000000.tar does not end in .json; name a file that does"),
        ("--json", "/proc/result.json", "/proc/result.json cannot be written ("),
        ("--predictions", "data", "data is a folder; name a file in it, like data/out.jsonl"),
        ("--predictions", "data/classes.json", "classes.json does not end in .jsonl; name a file that does"),
        ("--cache", "data/classes.json", "data/classes.json cannot be written ("),
    ],
)
def test_a_place_for_results_is_refused_before_the_checkpoint_is_opened(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    path: str,
    message: str,
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "0")
    (tmp_path / "data").mkdir()
    for name in ("train-000000.tar", "classes.json"):
        (tmp_path / "data" / name).write_text("kept")
    kind = "kmeans" if option == "--cache" else "classify"
    assert main([kind, "nowhere", "--data", "data/test-*.tar", option, path]) == 2
    assert message in capsys.readouterr().err
    assert {file.read_text() for file in (tmp_path / "data").iterdir()} == {"kept"}


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (main, ["finetune", "x", "--recipe", "x", "--out", "x"]),
        (main, ["vtab", "x", "--data", "x", "--out", "x"]),
        (study.main, ["run", "x"]),
    ],
)
@pytest.mark.parametrize("slots", ["0", "-1"])
def test_a_number_of_processes_below_1_is_refused(
    capsys: pytest.CaptureFixture[str], program: Callable[[list[str]], int], words: list[str], slots: str
):
    with pytest.raises(SystemExit) as ended:
        program([*words, "--slots", slots])
    assert ended.value.code == 2 and f"--slots {slots} must be above 0" in capsys.readouterr().err


def test_a_launcher_that_is_no_command_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        study.main(["run", "x", "--launcher", "deepspeed '"])
    assert ended.value.code == 2 and "deepspeed ' is no command: No closing quot" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("num_classes", "shown"),
    [
        (1, "accuracy by class: c0 0.00\n"),
        (2, "accuracy by class: c0 0.00, c1 0.10\n"),
        (6, "accuracy by class: from c0 0.00, c1 0.10, c2 0.20 to c5 0.50\n"),
    ],
)
def test_any_number_of_classes_is_shown(capsys: pytest.CaptureFixture[str], num_classes: int, shown: str):
    rows = [{"name": f"c{i}", "accuracy": i / 10} for i in reversed(range(num_classes))]
    print_details({"calibration_error": 0.1, "per_class": rows, "confusions": []})
    assert shown in capsys.readouterr().out


def test_help_shows_an_example_and_needs_no_torch():
    for arguments in ([], ["fewshot"], ["classify"], ["vtab"]):
        result = run_tool(*arguments, "--help")
        assert result.returncode == 0 and "python tools/evaluate.py" in result.stdout
    code = "import sys; sys.path.insert(0, 'tools'); import evaluate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
