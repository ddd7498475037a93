"""A start takes the memory of what a rank keeps: at ZeRO 3, none ever holds the whole model."""

import json
from pathlib import Path

import pytest
from multiprocess.job import Job
from multiprocess.ranks import Stop
from multiprocess.starts import check_values, count_reads, measure, note_programs
from multiprocess.zygote import Zygote

# 12 blocks, so that a tensor is small beside the model. DeepSpeed keeps small parameters whole,
# and has buffers of its own: both are below 1% here, as they are of a large model.
MODEL = (
    "model.width=64",
    "model.depth=12",
    "model.mlp_dim=256",
    "model.num_heads=4",
    "engine.deepspeed_extra={zero_optimization={stage3_param_persistence_threshold=300,"
    "reduce_bucket_size=1000,stage3_prefetch_bucket_size=1000}}",
)


def start_peak(zygote: Zygote, job: Job, world_size: int, *overrides: str) -> float:
    """The most that a rank held at a start, in bytes per byte of the model in fp32."""
    out = job.run_dir.parent / "peak"
    options = (*MODEL, "data.lanes=8", "engine.micro_batch=1", *overrides)
    statuses = zygote.run(world_size, measure, job.config, options, out, log=job.log)
    assert statuses == [0] * world_size, job.output()
    figures = [json.loads(Path(f"{out}-{rank}.json").read_text()) for rank in range(world_size)]
    return max(peak / model_bytes for model_bytes, peak in figures)


# In bytes per byte of the model in fp32, on n ranks, with w = 1 in fp32 and 1/2 in bf16:
#
#     ZeRO 1    weights w, twice while DeepSpeed moves them to its flat buffer; masters 1/n; in
#               bf16 also gradients 1
#     ZeRO 3    weights w/n, masters 1/n, gradients 1/n, and for a moment a few tensors of 1/37
@pytest.mark.parametrize(
    ("stage", "precision", "world_size", "most"),
    [(1, "fp32", 2, 2.1), (1, "bf16", 2, 2.1), (3, "fp32", 4, 0.9), (3, "bf16", 8, 0.4)],
)
def test_a_new_run_starts_in_the_memory_of_what_it_keeps(
    tmp_path: Path, index: Path, zygote: Zygote, stage: int, precision: str, world_size: int, most: float
) -> None:
    job = Job(tmp_path, index)
    overrides = (f"engine.zero_stage={stage}", f"precision={precision}")
    assert start_peak(zygote, job, world_size, *overrides) < most


def test_a_start_asks_no_compiler(tmp_path: Path, index: Path, zygote: Zygote) -> None:
    job, out = Job(tmp_path, index), tmp_path / "programs"
    assert zygote.run(1, note_programs, job.config, out, log=job.log) == [0], job.output()
    assert json.loads(out.read_text()) == []


def test_a_resumed_and_a_fine_tuned_run_never_have_the_whole_model(
    tmp_path: Path, index: Path, zygote: Zygote
) -> None:
    """The resumed one also has the two moments, 2/8."""
    job, stage = Job(tmp_path / "a", index), "engine.zero_stage=3"
    assert zygote.train(job, 2, *MODEL, "data.lanes=8", event=Stop(batch=2)) == [75, 75], job.output()
    assert start_peak(zygote, job, 8, stage) < 1.0
    other = Job(tmp_path / "b", index)
    options = (stage, f"init.checkpoint={job.run_dir}", "model.num_classes=6")
    assert start_peak(zygote, other, 4, *options) < 1.0


@pytest.mark.parametrize("stage", [1, 3])
def test_a_resume_on_the_same_layout_reads_a_ranks_file_at_once(
    tmp_path: Path, index: Path, zygote: Zygote, stage: int
) -> None:
    job, options = Job(tmp_path, index), (f"engine.zero_stage={stage}", "optim.ema_decay=0.9")
    assert zygote.train(job, 2, *options, event=Stop(batch=2)) == [75, 75], job.output()
    out = tmp_path / "reads"
    for world_size, reads in ((2, [1, 1]), (1, [2])):  # alone, both files
        statuses = zygote.run(world_size, count_reads, job.config, options, out, log=job.log)
        assert statuses == [0] * world_size, job.output()
        counted = [json.loads(Path(f"{out}-{rank}.json").read_text()) for rank in range(world_size)]
        assert counted == reads


PLAIN = [(1, "bf16"), (2, "fp32"), (3, "bf16")]  # tried always without options, the others with them


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [(), ("model.posemb=sincos2d", "model.pool=mean", "optim.freeze=['patch_embed.*','blocks.0.*']")],
    ids=["plain", "fixed positions, frozen parameters"],
)
def test_weights_are_those_of_the_whole_model(
    tmp_path: Path,
    index: Path,
    zygote: Zygote,
    stage: int,
    precision: str,
    options: tuple[str, ...],
    sweep: bool,
) -> None:
    if not sweep and bool(options) == ((stage, precision) in PLAIN):
        pytest.skip("with --sweep: any two of stage, precision and options are tried together always")
    job = Job(tmp_path, index)
    overrides = (f"engine.zero_stage={stage}", f"precision={precision}", "optim.ema_decay=0.9", *options)
    world = (f"data.lanes={stage}", f"global_batch={2 * stage}")
    statuses = zygote.run(stage, check_values, job.config, (*overrides, *world), log=job.log)
    assert statuses == [0] * stage, job.output()
