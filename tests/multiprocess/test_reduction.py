"""Gradients in 16 bits are summed over ranks and micro steps in fp32, whatever the layout."""

from pathlib import Path
from typing import Any

import pytest
from multiprocess.job import Job
from multiprocess.reduction import CUT, ENGINES, NUM_PARAMS, measured
from multiprocess.sums import check_sums, check_thirds
from multiprocess.zygote import Zygote

from vitscale.plan import formulas

REUSE_DISTANCES = (0, 40_000)
SIXTEEN_BITS = {"bf16": "torch.bfloat16", "fp16": "torch.float16"}
OFFLOADED = {f"{stage}, offloaded": ENGINES[stage] | {"offload_optimizer": True} for stage in ENGINES}


def reused(distance: int) -> dict[str, Any]:
    # What is to be fetched ahead is left, too.
    zero = {**CUT, "stage3_max_reuse_distance": distance, "stage3_prefetch_bucket_size": 0}
    return {"zero_stage": 3, "deepspeed_extra": {"zero_optimization": zero}}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_mean_gradient_of_three_ranks_is_exact_and_costs_what_is_planned(
    tmp_path: Path, zygote: Zygote, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Three: to divide by the number of ranks rounds, unless it is a power of two."""
    accumulation = 3
    engines = (
        ENGINES | OFFLOADED | {f"3, reused within {reuse:,}": reused(reuse) for reuse in REUSE_DISTANCES}
    )
    results = measured(zygote, tmp_path, precision, 3, accumulation, engines)
    for name, (error, sent, norms) in results.items():
        assert error < 1e-6 and len(set(norms)) == 1, name
        reuse = int(name.partition("within ")[2].replace(",", "") or 10**9)
        monkeypatch.setattr(formulas, "MAX_REUSE_DISTANCE", reuse)
        offload = "offloaded" in name
        planned = formulas.communication(NUM_PARAMS, int(name[0]), accumulation, precision, offload=offload)
        # Cuts are padded, and flags and norms travel, too. What is gathered again are layers.
        rel = 0.1 if 0 < reuse < NUM_PARAMS else 1e-3
        assert sent["torch.float32"] == pytest.approx(planned.gradients, rel=1e-3), name
        assert sent[SIXTEEN_BITS[precision]] == pytest.approx(planned.weights, rel=rel), name
        assert sent["held"] == 0, name  # memory.state_bytes counts the sums alone
        assert name.startswith("3") or sent["misaligned"] == 0, name  # NCCL is slow from elsewhere


def test_reduced_in_bf16_it_loses_bits_and_costs_half(tmp_path: Path, zygote: Zygote) -> None:
    engines = {name: engine | {"reduce_precision": "bf16"} for name, engine in ENGINES.items()}
    for name, (error, sent, _) in measured(zygote, tmp_path, "bf16", 4, 1, engines).items():
        planned = formulas.communication(NUM_PARAMS, int(name), 1, "bf16", offload=False)
        assert 1e-3 < error < 1e-2, name
        assert sent["torch.bfloat16"] == pytest.approx(planned.gradients + planned.weights, rel=1e-3), name


def test_sums_in_bf16_are_divided_by_the_number_of_ranks_in_fp32(tmp_path: Path, zygote: Zygote) -> None:
    log = tmp_path / "log"
    assert zygote.run(3, check_thirds, log=log) == [0, 0, 0], log.read_text()


def test_a_step_reads_nothing_that_the_sums_held_before(tmp_path: Path, zygote: Zygote) -> None:
    log = tmp_path / "log"
    assert zygote.run(2, check_sums, log=log) == [0, 0], log.read_text()


@pytest.mark.parametrize("reduce_precision", ["fp32", "bf16"])
def test_a_rank_alone_keeps_what_it_accumulates(
    tmp_path: Path, zygote: Zygote, reduce_precision: str
) -> None:
    engines = {"1": {"reduce_precision": reduce_precision}}
    error, sent, _ = measured(zygote, tmp_path, "bf16", 1, 4, engines)["1"]
    assert error < 1e-6 and sent.get("torch.float32", 0) < 10  # the squares of the norm


def test_losses_in_bf16_are_those_of_any_number_of_ranks(tmp_path: Path, index: Path, zygote: Zygote) -> None:
    """Of 2 and 4, each with a thread for its matmuls; the control reduces in bf16."""
    jobs = {}
    for precision in ("fp32", "bf16"):
        for world_size in (2, 4):
            job = jobs[precision, world_size] = Job(tmp_path / f"{precision}-{world_size}", index)
            options = ("precision=bf16", f"engine.reduce_precision={precision}")
            assert zygote.train(job, world_size, *options) == [0] * world_size, job.output()
    for name in ("train/loss", "train/grad_norm"):
        two, four = (jobs["fp32", world_size].column(name) for world_size in (2, 4))
        assert two == pytest.approx(four, abs=1e-5), name
    two, four = (jobs["bf16", world_size].column("train/loss") for world_size in (2, 4))
    assert max(abs(a - b) for a, b in zip(two, four, strict=True)) > 1e-4
