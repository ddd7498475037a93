"""What a plan says, and what the command prints and refuses."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from make import state_of, write_step
from plan.plans import B16, H14, ROOT, VIT_22B, at_half_the_peak, load, option_of, plan

from tools.plan import main
from vitscale.errors import ConfigError
from vitscale.plan.make import Plan
from vitscale.plan.speed import Speed
from vitscale.plan.text import render

MUON = ["optim.name=muon", "optim.momentum=0.95"]


OFFLOAD = "use engine.offload_optimizer = true or more devices or GPUs with more memory"
MORE = "use more devices or GPUs with more memory"
REFUSED = [
    (["--gpus", "12"], "--gpus 12 is not a multiple of --gpus-per-node 8; use 16"),
    (["--gpus", "0"], "--gpus 0 must be above 0"),
    (["--gpus", "8", "--gpu", "tpu"], '--gpu "tpu" is not known; use one of '),
    (["--gpus", "8", "--price", "nan"], "--price nan must be above 0"),
    (["--gpus", "8", "--price", "-1"], "--price -1.0 must be above 0"),
    (["--gpus", "8", "--gpu-memory-gb", "1e300"], "--gpu-memory-gb 1e+300 must be from 1e-09 to 1e+12"),
    (["--gpus", "8", "--decode-rate", "1e-320"], "--decode-rate 1e-320 must be from 1e-09 to 1e+12"),
    (["--gpus", f"1{400 * '0'}"], f"--gpus 1{400 * '0'} must be from 1e-09 to 1e+12"),
    (["--gpus", "8", "--image-kb", "0"], "--image-kb 0.0 must be above 0"),
    (["--gpus", "8", "--gpu-memory-gb", "0"], "--gpu-memory-gb 0.0 must be above 0"),
    (["--gpus", "8", "--cores-per-node", "0"], "--cores-per-node 0 must be above 0"),
    (["--gpus", "8", "--decode-rate", "0"], "--decode-rate 0.0 must be above 0"),
    (["--gpus", "8", "data.num_samples=0"], "total_epochs = 90 needs the number of samples"),
    (["--gpus", "8", "precision=fp32"], 'precision "fp32" has no estimate of speed'),
    (["--gpus", "7"], "global_batch 4096 is not a multiple of world_size 7"),
    (["--gpus", "2048"], "--gpus 2048 does not divide the 1,024 lanes of the data; set data.lanes"),
    (["--gpus", "8", "modle.width=3"], "unknown key modle"),
    (
        ["--gpus", "8", "augment.mixup=0.2", "global_batch=8"],
        "augment.mixup and augment.cutmix pair neighbours, so the micro batch of 1 must be even; change",
    ),
    (["--gpus", "8", "--json", "train-000000.tar"], "train-000000.tar does not end in .json; name a file"),
    (["--gpus", "8", "--calibrate", "nowhere.json"], "--calibrate nowhere.json cannot be read: No such file"),
]


def test_22b_fits_only_where_its_parameters_are_cut_and_is_not_compiled() -> None:
    made = plan(load(H14, *VIT_22B), 8)
    assert not any(option.fits for option in made.options if option.zero_stage < 3)
    assert made.best and made.best.zero_stage == 3 and not made.best.compiled
    shown = render(made)
    assert "none fits" in shown and "ZeRO 3 is what lets 21.8 billion parameters train here" in shown
    assert "engine.compile=false" in shown


@pytest.mark.parametrize("name", ["vit_b32_in21k", "vit_s16_imagenet_90ep", "bit_r50x1_jft", "vit_h14_jft"])
def test_a_model_that_fits_whole_is_planned_without_zero_3(name: str) -> None:
    """At 256 GPUs communication takes so long that hiding it would make up for all else."""
    config, signs = load(ROOT / f"configs/pretrain/{name}.toml"), set[bool]()
    for gpus in (8, 32, 256):
        made = plan(config, gpus)
        assert made.best and made.best.zero_stage < 3
        hidden = option_of(made, 3, made.best.checkpointing)
        gains = hidden.step_seconds < made.best.step_seconds
        assert ("ZeRO 3 gains nothing" in " ".join(render(made).split())) is not gains
        signs.add(gains)
    assert signs == {False, True}


@pytest.mark.parametrize(
    ("overrides", "gb", "reason"),
    [
        ([], 3.5, "stage ZeRO 3 does not fit with the same recomputation"),
        (["optim.name=muon", "optim.momentum=0.95"], 80.0, "stage Muon is refused at ZeRO 3; ZeRO 2 takes +"),
        ([], 80.0, "stage ZeRO 3 gains nothing below about 2 billion parameters; ZeRO 2 takes +"),
    ],
)
def test_the_plan_says_why_it_does_not_take_zero_3(overrides: list[str], gb: float, reason: str) -> None:
    made = plan(load(B16, *overrides), 8, gpu_memory_gb=gb)
    assert made.best and made.best.zero_stage == 1 and reason in " ".join(render(made).split())


def test_a_plan_in_which_nothing_fits_says_so() -> None:
    made = plan(load(H14, *VIT_22B), 1)
    assert made.best is None and made.days == 0
    shown = render(made)
    assert "nothing fits: ZeRO 1 with the smallest micro batch and full recomputation needs" in shown
    assert "the best of them" not in shown


def test_too_few_cores_slow_training_down() -> None:
    free = plan(load(H14, "global_batch=1024"), 8)
    bound = plan(load(H14, "global_batch=1024"), 8, cores_per_node=4)
    assert free.best and not free.best.loader_bound and free.loader_cores == 7  # 3,186 images/s
    assert bound.best and bound.best.loader_bound and bound.best.images_per_second == pytest.approx(2_000)
    assert bound.loader_cores == 7 and bound.storage_gb_per_s == pytest.approx(0.22)
    assert "4 cores of a node decode less" in render(bound)
    fed = plan(load(H14, "global_batch=1024"), 8, cores_per_node=7)
    assert fed.best == dataclasses.replace(free.best, data_seconds=1024 / 3_500)


@pytest.mark.parametrize(("words", "sentence"), REFUSED, ids=lambda value: " ".join(value)[:40])
def test_what_cannot_be_planned_is_one_sentence(words: list[str], sentence: str, capsys) -> None:
    """The control is the test of the command below."""
    assert main([str(B16), *words]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"error: {sentence}") and shown.err.count("\n") == 1 and not shown.out


def test_the_command_merges_configs_prints_the_plan_and_writes_it(tmp_path: Path, capsys) -> None:
    over, out = tmp_path / "over.toml", tmp_path / "new" / "plan.json"
    over.write_text("global_batch = 16384\n[engine]\nmicro_batch = 64\n")
    words = [
        str(H14),
        str(over),
        *["--gpus", "128", "optim.ema_decay=0.999", "--price", "2.5", "--json"],
        str(out),
    ]
    assert main(words) == 0
    shown = capsys.readouterr().out
    for part in (
        "H/14 at 224 px on 128 x H100 in 16 nodes: estimates, nothing was run",
        "parameters      655,835,251",
        "4,241,997,824 images in 258,911 steps of 16,384",
        "   1  none            128 x 1 ",
        "use             ZeRO 1, micro batch 128, no recomputation",
        "set             engine.micro_batch=128",
        "ZeRO 3 gains nothing below about 2 billion parameters; ZeRO 2 takes +",
        "a guess: 42.7% of the peak",
        "at 2.5 a GPU hour",
    ):
        assert part in shown, shown
    assert max(map(len, shown.splitlines())) <= 110
    results = json.loads(out.read_text())["results"]
    assert results["best"]["micro_batch"] == 128 and len(results["options"]) == 9
    assert results["checkpoints"]["num_bytes"] == 16 * 655_835_251  # with the average
    assert results["best"]["memory"]["total_bytes"] > 50e9 and results["cost"] > 0


def test_what_the_config_says_already_is_not_to_be_set() -> None:
    made = plan(load(H14, "global_batch=16384", "checkpoint.every_steps=4000"), 128)
    shown = render(made)
    assert "set             nothing: the config says so" in shown
    assert "every_steps=" not in shown and "batch         " not in shown.partition("recommendation")[2]
    eager = render(plan(load(H14, "global_batch=16384", "engine.compile=false"), 128))
    assert "engine.compile=true is faster, by about 18%" in eager
    (row,) = at_half_the_peak(load(H14)).rows
    slower = dataclasses.replace(row, compiled=False, seconds_per_image=1.3 * row.seconds_per_image)
    measured = render(plan(load(H14, "engine.compile=false"), 8, speed=Speed(rows=(row, slower))))
    assert "engine.compile=true is faster, by about 30%" in measured
    assert "costs 0.23% of the time; 1,000 steps, as in the config, 1.16%" in " ".join(
        render(plan(load(H14), 128)).split()
    )


def test_a_teacher_is_not_counted_and_this_is_said() -> None:
    pretrain = ROOT / "configs/pretrain"
    distilled = render(plan(load(pretrain / "deit_s16_distilled_imagenet.toml"), 8))
    assert "not counted" in distilled and "22,436,432" in distilled
    assert "not counted" not in render(plan(load(pretrain / "deit_s16_imagenet.toml"), 8))


def test_views_of_one_image_are_read_once() -> None:
    config = ROOT / "configs/pretrain/deit_b16_imagenet.toml"
    thrice, once = (plan(load(config, f"augment.repeats={repeats}"), 8) for repeats in (3, 1))
    assert once.best and thrice.best and once.best.images_per_second == thrice.best.images_per_second
    assert thrice.storage_gb_per_s == pytest.approx(once.storage_gb_per_s / 3)
    said = ("; fewer will do, since 3 views share a decoding", "kB an image, read once for 3 views")
    assert all(words in render(thrice) and words not in render(once) for words in said)


def test_a_continuation_is_planned_from_its_step(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (3_000, 4_000):
        folder = write_step(run, step, state_of(step))

    def continued(checkpoint: Path, total: int = 5_000) -> Plan:
        start = ("init.full_state=true", f"init.checkpoint={checkpoint}")
        return plan(load(B16, *start, "schedule.warmup_steps=100", f"total_steps={total}"), 8)

    whole = plan(load(B16, "schedule.warmup_steps=100", "total_steps=5000"), 8)
    for place in (run, folder):
        made = continued(place)
        assert (made.first_step, made.num_images) == (4_000, 1_000 * 4_096)
        assert made.days == pytest.approx(whole.days / 5, rel=1e-2)
        assert "4,096,000 images in 1,000 steps of 4,096, after 4,000 of another run" in render(made)
    unread = continued(tmp_path / "elsewhere")
    assert unread.days == whole.days and "not counted" not in render(whole)
    assert f"the steps that {tmp_path}/elsewhere has done, which cannot be read" in " ".join(
        render(unread).split()
    )
    with pytest.raises(ConfigError, match="has done all of the run's 4,000 steps; raise the total"):
        continued(run, total=4_000)


def test_a_short_run_is_saved_at_its_end_and_counted_in_minutes() -> None:
    made = plan(load(B16, "schedule.warmup_steps=100", "total_steps=500"), 8, price=2.5)
    assert made.saving and made.best and made.saving.interval_steps == 500
    assert made.saving.interval_seconds == pytest.approx(500 * made.best.step_seconds)
    shown = " ".join(render(made).split())
    assert "best saved at the end alone; saves" in shown and "saves checkpoint.every_steps" not in shown
    minutes = made.days * 24 * 60
    assert "; saves and failures make the run 1.12% longer" in shown
    shorter = plan(load(B16, "schedule.warmup_steps=100", "total_steps=328"), 8)
    assert "time 1 minute, " in " ".join(render(shorter).split())
    longer = plan(load(B16, "schedule.warmup_steps=100", "total_steps=25_000"), 8)
    hours = 24 * longer.days
    assert 1 < hours < 2 and f"time {hours:.2g} hours, " in " ".join(render(longer).split())
    assert 1 < minutes < 10 and f"time {minutes:.2g} minutes, {8 * minutes / 60:.2g} GPU hours" in shown
    assert f"cost {2.5 * 8 * minutes / 60:.2g} at 2.5 a GPU hour" in shown


@pytest.mark.parametrize(
    ("path", "overrides", "gpus", "gb", "said"),
    [
        (H14, VIT_22B, 1, 80.0, f"of 80 GB; {OFFLOAD}"),
        (H14, [*VIT_22B, "engine.offload_optimizer=true"], 1, 80.0, f"of 80 GB; {MORE}"),
        (H14, [*VIT_22B, *MUON], 1, 80.0, f"of 80 GB; {MORE}"),
        (B16, [], 8, 2.5, f"needs 3.0 of 2.5 GB; {MORE}"),  # and 4.8 with offload
        (H14, [], 64, 6.0, f"needs 6.5 of 6 GB; {MORE}"),
        (H14, [], 1, 6.0, f"of 6 GB; {OFFLOAD}"),
    ],
)
def test_what_does_not_fit_is_told_what_needs_less(
    path: Path, overrides: list[str], gpus: int, gb: float, said: str
) -> None:
    shown = " ".join(render(plan(load(path, *overrides), gpus, gpu_memory_gb=gb)).split())
    assert "nothing fits: " in shown and said in shown


def test_an_offloaded_update_takes_its_guessed_time() -> None:
    """1 ns for each of 655,835,251 parameters, 32 GPUs."""
    config = load(H14, "engine.offload_optimizer=true")
    option, shown = option_of(plan(config, 32), 1), render(plan(config, 32))
    assert 1e3 * option.update_seconds == pytest.approx(655.835251 / 32)
    assert "a guess: 1 ns on the CPU" in shown and "1 ns" not in render(plan(load(H14), 32))


def test_the_example_of_the_page_is_what_the_command_prints(capsys) -> None:
    page = (ROOT / "docs/planning.md").read_text()
    command, printed = re.findall(r"^```(?:bash)?\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[:2]
    words = command.removeprefix("python tools/plan.py ").split()
    assert main([str(ROOT / words[0]), *words[1:]]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(("precision", "share"), [("bf16", 14), ("fp16", 21)])
def test_where_communication_is_slow_the_plan_says_what_sends_less(precision: str, share: int) -> None:
    of_run, rounded = f"precision={precision}", f"engine.reduce_precision={precision}"
    shown = " ".join(render(plan(load(H14, of_run), 128)).split())
    assert f"communication is {share}% of a step: fewer GPUs or a larger global_batch waste less" in shown
    assert f"waste less; {rounded} halves the bytes of gradients, inexactly" in shown
    shown = " ".join(render(plan(load(H14, of_run, rounded), 128)).split())
    assert ("communication is 14% of a step: fewer GPUs or" in shown) == (precision == "fp16")
    assert "reduce_precision" not in shown


def test_a_model_of_axial_attention_is_called_so() -> None:
    axial = load(B16, "model.attention=axial", "model.pool=mean")
    assert render(plan(axial, 8)).startswith("Axial-B/16 at 224 px on 8 x H100 in 1 node: ")
