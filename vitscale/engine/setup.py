"""DeepSpeed before there is an engine: its start in this process, and memory for a model."""

import contextlib
import importlib
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from vitscale import distributed
from vitscale.models import Model

# ZeRO 1 and 2 give each rank a multiple of this many elements of a flat buffer. Eight elements
# of 16 bits are 16 bytes; at other addresses, as DeepSpeed's own multiple of 2 allows, NCCL
# copies a few bytes at a time.
RANK_MULTIPLE = 8


def prepare() -> None:
    """Prepare DeepSpeed in this process, quietly; every rank calls it, any number of times."""
    import deepspeed
    import deepspeed.ops
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    _import_muon()
    # As a property, since their __init__ sets it.
    multiple = property(lambda _: RANK_MULTIPLE, lambda _, value: None)
    for optimizer in (BF16_Optimizer, DeepSpeedZeroOptimizer):
        optimizer.nccl_start_alignment_factor = multiple  # pyright: ignore[reportAttributeAccessIssue]
    deepspeed.utils.logger.setLevel(logging.WARNING)
    deepspeed.utils.logger.addFilter(_is_worth_saying)
    # DeepSpeed 0.19 calls what torch 2.13 renames.
    warnings.filterwarnings("ignore", ".* is deprecated", FutureWarning, "torch.distributed")
    if distributed.device().type == "cpu":
        # DeepSpeed's shared-memory kernel is for inference, yet it is compiled at start,
        # which takes 30 s and a compiler, and leaves 66 MB per rank in /dev/shm. Training
        # on CPU communicates through gloo. DeepSpeed asks a compiler what it could build when
        # this list is first read; an empty list asks nothing, and nothing is built.
        ops: Any = deepspeed.ops
        ops.__compatible_ops__ = {}
    deepspeed.init_distributed(verbose=False)


def _import_muon() -> None:
    """Import DeepSpeed's Muon, which its ZeRO asks every optimizer whether it is, uncompiled.

    Nothing here uses it. Its functions are decorated with torch.compile, which would import the
    whole compiler: a fifth of the time of a start.
    """
    from deepspeed.runtime import compiler

    compile = compiler.compile
    compiler.compile = lambda: compiler.dummy_decorator
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compile


def _is_worth_saying(record: logging.LogRecord) -> bool:
    """Not DeepSpeed's warning of torch's SGD, with which our tests compare every ZeRO stage."""
    return "untested optimizer" not in record.getMessage()


@contextlib.contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Within the block, DeepSpeed takes this GPU, and not the one whose number is LOCAL_RANK.

    A scheduler may show each process its own GPU alone, as number 0 (srun --gpus-per-task 1).
    """
    local_rank = os.environ.get("LOCAL_RANK")
    if local_rank is None or device.index is None:
        yield
        return
    os.environ["LOCAL_RANK"] = str(device.index)
    try:
        yield
    finally:
        os.environ["LOCAL_RANK"] = local_rank


@torch.no_grad()
def allocate(model: Model, config: dict[str, Any], dtype: torch.dtype) -> None:
    """Give a model without values (empty_model) memory on this rank's device.

    Its parameters have whatever was in the memory, for fill or restore to set. Under ZeRO 3 a
    rank gets its part of each, and never has more than one layer whole. Every rank calls it.

    config: DeepSpeed's JSON.
    dtype: of the parameters; buffers stay as they are, as they do if DeepSpeed casts a model.
    """
    import deepspeed

    for param in model.parameters():
        param.data = param.data.to(dtype)
    if config["zero_optimization"]["stage"] < 3:
        model.allocate(distributed.device())
        return
    with on_device(distributed.device()):
        init = deepspeed.zero.Init(config_dict_or_path=config)
    for module in model.modules():
        module.to_empty(device=distributed.device(), recurse=False)
        init._convert_to_zero_parameters(module.parameters(recurse=False))
    model.init_buffers()
