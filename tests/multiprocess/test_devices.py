"""On a CPU, what test_gpu.py measures on a GPU: waits, memory, skipped steps, Muon."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from multiprocess.devices import CHECKS, SHAPES, conv_error, memory_is_steady, orthogonal_error
from multiprocess.waits import step_waits_for_the_norm
from multiprocess.zygote import Zygote


@pytest.mark.parametrize("check", CHECKS)
def test_steps_fragments_norms_and_bench_hold_on_a_cpu(
    tmp_path: Path, zygote: Zygote, check: Callable[[], None]
) -> None:
    log = tmp_path / "log"
    assert zygote.run(1, check, log=log) == [0], log.read_text()


def test_a_step_reads_only_the_norm(tmp_path: Path, zygote: Zygote) -> None:
    log = tmp_path / "log"
    assert zygote.run(1, step_waits_for_the_norm, False, log=log) == [0], log.read_text()


def test_a_step_leaves_nothing_behind(tmp_path: Path, zygote: Zygote) -> None:
    log = tmp_path / "log"
    engines = [{"activation_checkpointing": policy} for policy in ("none", "selective", "full")]
    engines += [{"zero_stage": stage} for stage in (2, 3)]
    assert zygote.run(1, memory_is_steady, engines, log=log) == [0], log.read_text()


def test_a_convolution_in_fp32_is_exact_where_there_is_no_tf32() -> None:
    assert max(conv_error("cpu", tf32=tf32) for tf32 in (False, True)) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_muon_makes_of_a_matrix_what_its_singular_values_say(
    shape: tuple[int, int], dtype: torch.dtype, bound: float
) -> None:
    assert orthogonal_error("cpu", shape, dtype) < bound
