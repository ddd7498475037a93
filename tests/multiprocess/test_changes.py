"""What may change in a run: the place of its data, its total; the rest changes in a new run."""

import re
import shutil
from pathlib import Path

import pytest
from make import edit_manifest
from multiprocess.job import Job
from multiprocess.zygote import Zygote

from vitscale.checkpoint.manifest import Manifest


@pytest.fixture
def finished(tmp_path: Path, uninterrupted: Job, index: Path) -> Job:
    """A copy of the reference run, whose config names the original's run directory and data."""
    job = Job(tmp_path / "copy", index)
    shutil.copytree(uninterrupted.run_dir, job.run_dir)
    return job


def lines_of(sentence: str) -> list[str]:
    """The overrides that a refusal says to write under [init]."""
    match = re.search(r'\[init\] checkpoint = "([^"]+)", full_state = true', sentence)
    assert match, sentence
    return [f"init.checkpoint={match.group(1)}", "init.full_state=true"]


def test_the_same_data_at_another_place_resume(
    tmp_path: Path, finished: Job, index: Path, zygote: Zygote
) -> None:
    moved = shutil.copytree(index.parent, tmp_path / "elsewhere")
    assert zygote.train(finished, 1, f"data.index={moved}/index.json", "total_steps=22") == [0]
    sources = f"data.sources=[{{index='{moved}/index.json', name='moved'}}]"
    assert zygote.train(finished, 1, "data.index=", sources, "total_steps=24") == [0], finished.output()
    assert finished.column("step") == list(range(1, 25))


def test_before_the_first_checkpoint_the_data_of_the_config_stay(
    tmp_path: Path, finished: Job, index: Path, zygote: Zygote
) -> None:
    shutil.rmtree(finished.run_dir / "checkpoints")
    moved = shutil.copytree(index.parent, tmp_path / "elsewhere") / "index.json"
    assert zygote.train(finished, 1, f"data.index={moved}") == [2]
    assert f"data.index was '{index}', now '{moved}'" in finished.mistake()


def test_another_order_of_the_data_is_refused_by_its_key(finished: Job, zygote: Zygote) -> None:
    assert zygote.train(finished, 1, "data.lanes=2", "total_steps=22") == [2]
    assert "other data than the config names now (data.lanes was 4, now 2)" in finished.mistake()
    lines_of(finished.mistake())


@pytest.mark.parametrize(
    "changes",
    [["optim.lr=1e-4"], ["optim.clip_norm=0.1"], ["precision=bf16"], ["schedule.decay=linear"]],
    ids=lambda changes: changes[0],
)
def test_a_refused_change_is_made_by_the_lines_that_the_refusal_names(
    tmp_path: Path, finished: Job, zygote: Zygote, changes: list[str]
) -> None:
    assert zygote.train(finished, 1, *changes, "total_steps=22") == [2]
    sentence = finished.mistake()
    assert f"{changes[0].partition('=')[0]} was" in sentence and "choose another run_dir with" in sentence
    another = [f"run_dir={tmp_path}/another", "total_steps=22", *changes, *lines_of(sentence)]
    assert zygote.train(finished, 1, *another) == [0], finished.output()
    assert f"resumed from {finished.run_dir}/checkpoints/step-000000020" in finished.output()


def test_another_jpeg_decoder_is_refused_with_the_one_to_set(finished: Job, zygote: Zygote) -> None:
    (here,) = {Manifest.load(folder).train.decoder for folder in finished.checkpoints().values()}
    other = "simplejpeg" if here == "turbojpeg" else "turbojpeg"
    for folder in finished.checkpoints().values():
        edit_manifest(folder / "manifest.json", lambda values: values["train"].update(decoder=other))
    assert zygote.train(finished, 1, "total_steps=22") == [2]
    said = f'with the JPEG decoder {other}, here it is {here}; set data.decoder = "{other}"'
    assert said in finished.mistake()


@pytest.mark.parametrize("change", ["model.width=8", "optim.name=sgd", "optim.freeze=['pos_embed']"])
def test_the_full_state_is_not_named_where_it_would_not_fit(
    finished: Job, zygote: Zygote, change: str
) -> None:
    assert zygote.train(finished, 1, change, "optim.weight_decay=0") == [2]
    assert f'which [init] checkpoint = "{finished.run_dir}" starts from its weights' in finished.mistake()
    assert "full_state = true" not in finished.mistake()


def test_a_run_goes_back_to_an_older_step_in_a_new_run_directory(
    tmp_path: Path, finished: Job, uninterrupted: Job, zygote: Zygote
) -> None:
    older = finished.checkpoints()[18]
    back = Job(tmp_path / "back", Path(uninterrupted.config.read_text().split('index = "')[1].split('"')[0]))
    assert zygote.train(back, 2, f"init.checkpoint={older}", "init.full_state=true") == [0, 0], back.output()
    assert back.column("step") == [19, 20]
    assert back.column("train/loss") == uninterrupted.column("train/loss")[18:]
    assert zygote.train(back, 2, f"init.checkpoint={older}", "init.full_state=true") == [0, 0], back.output()


def test_a_total_of_another_kind_continues_the_run(finished: Job, zygote: Zygote) -> None:
    assert zygote.train(finished, 1, "total_epochs=2.2") == [0], finished.output()
    assert finished.column("step")[-1] == 22
    assert zygote.train(finished, 1, "total_samples=100") == [2]
    assert "was started for 22 steps and cannot be shortened to 12" in finished.mistake()


def test_an_evaluation_is_left_out(finished: Job, index: Path, zygote: Zygote) -> None:
    finished.config.write_text(
        finished.config.read_text() + f'\n[evals.test]\ntest = "{index.parent}/train-*.tar"\n'
    )
    assert zygote.train(finished, 1, "total_steps=22", "evals.test=false") == [0], finished.output()
    assert "eval/test" not in finished.output()
    assert zygote.train(finished, 1, "total_steps=24", "evals.tset=false") == [2]
    assert "evals.tset = false leaves out a section that was set before" in finished.mistake()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.lr=1e-4"], "optim.lr was 0.005, now 0.0001"),
        (["data.window_chunks=1"], "data.window_chunks was 2, now 1"),
        (["data.chunk_order=stratified"], "data.chunk_order was 'shuffled', now 'stratified'"),
        (["total_steps=10"], "was started for 20 steps and cannot be shortened to 10"),
        (["{another}", "{init}", "init.full_state=true"], "has done all of the run's 20 steps"),
        (
            ["{another}", "{init}", "init.full_state=true", "total_steps=22", "model.width=8"],
            "is of another model",
        ),
        (
            ["{another}", "{init}", "model.width=8"],
            "model.width is 8, but the [init] checkpoint has 16",
        ),
    ],
    ids=["rate", "window", "order", "total", "length", "state", "backbone"],
)
def test_a_dry_run_refuses_by_the_sentence_of_training_what_cannot_continue(
    tmp_path: Path, finished: Job, zygote: Zygote, overrides: list[str], message: str
) -> None:
    places = {"another": f"run_dir={tmp_path}/another", "init": f"init.checkpoint={finished.run_dir}"}
    overrides = [text.format(**places) for text in overrides]
    assert zygote.train(finished, 1, *overrides) == [2]
    sentence = finished.mistake()
    assert message in sentence
    finished.log.unlink()
    assert zygote.train(finished, 1, *overrides, "--dry-run") == [2]
    assert finished.mistake() == sentence


def test_a_dry_run_of_what_can_continue_changes_nothing(
    tmp_path: Path, finished: Job, zygote: Zygote
) -> None:
    own = (finished.log, finished.log.parent)

    def state() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path not in own}

    init = [f"run_dir={tmp_path}/another", f"init.checkpoint={finished.run_dir}"]
    before = state()
    for overrides in (["total_steps=22"], [*init, "total_steps=22", "init.full_state=true"], init):
        assert zygote.train(finished, 1, *overrides, "--dry-run") == [0], finished.output()
    assert state() == before
