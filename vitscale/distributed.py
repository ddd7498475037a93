"""Who we are among the processes of a job, and the few collectives that the library needs; all of it works
alone too.

Any launcher that sets RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* will do (deepspeed, torchrun); with none of
them set the process is a world of one. Objects travel as JSON in byte tensors: nothing is pickled between
processes.
"""

import datetime
import json
import os
import socket
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = datetime.timedelta(minutes=10)
CHANNEL_TIMEOUT = datetime.timedelta(hours=3)  # a rank may write a large file while others wait for it
_STANDALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}


def initialize() -> None:
    """Join the process group: NCCL where there is a GPU, else gloo. Every process calls it once; again does
    nothing.
    """
    if dist.is_initialized():
        return
    if "WORLD_SIZE" not in os.environ:
        os.environ.update(_STANDALONE, MASTER_PORT=str(_free_port()))
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
        dist.init_process_group("cuda:nccl,cpu:gloo", timeout=TIMEOUT, device_id=device())
    else:
        os.environ.setdefault(
            "DS_ACCELERATOR", "cpu"
        )  # or DeepSpeed warns, in every process, that it has to guess
        # Ranks of one machine share its cores: with the default, each would start a thread per core.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world_size()))
        dist.init_process_group("gloo", timeout=TIMEOUT)


def shutdown() -> None:
    """Leave the process group, so that the process can end cleanly."""
    if dist.is_initialized():
        dist.destroy_process_group()


def new_channel() -> dist.ProcessGroup | None:
    """A way for the ranks to talk from another thread without disturbing what the trainer says; None when
    alone. Every rank calls it at the same point.
    """
    if world_size() == 1:
        return None
    group = dist.new_group(backend="gloo", timeout=CHANNEL_TIMEOUT)
    assert isinstance(group, dist.ProcessGroup)
    return group


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Processes of this job on this machine: deepspeed says LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE."""
    return int(
        os.environ.get("LOCAL_WORLD_SIZE")
        or os.environ.get("LOCAL_SIZE")
        or os.environ.get("WORLD_SIZE", "1")
    )


def is_main() -> bool:
    return rank() == 0


def device() -> torch.device:
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def barrier() -> None:
    """Wait for every rank (over the CPU, so that no GPU work is waited for)."""
    all_reduce_sum([0.0])


def all_reduce_sum(values: list[float]) -> list[float]:
    """Sum of each value over the ranks, in float64. Every rank calls it with as many values."""
    return _reduce(torch.tensor(values, dtype=torch.float64), dist.ReduceOp.SUM)


def all_reduce_sum_int(values: list[int]) -> list[int]:
    """Sum of each value over the ranks in wrapping 64-bit integers. Every rank brings as many."""
    return _reduce(torch.tensor(values, dtype=torch.int64), dist.ReduceOp.SUM)


def all_reduce_max(values: list[float]) -> list[float]:
    """Maximum of each value over the ranks. Every rank calls it with as many values."""
    return _reduce(torch.tensor(values, dtype=torch.float64), dist.ReduceOp.MAX)


def _reduce(tensor: Tensor, op: Any) -> list[Any]:
    if world_size() > 1:
        dist.all_reduce(tensor, op)
    return tensor.tolist()


def all_gather_rows(rows: Tensor, channel: dist.ProcessGroup | None = None) -> Tensor:
    """Concatenate the rows of all ranks in rank order, on the CPU; ranks may bring different numbers of rows
    [n_r, ...]. channel: one of new_channel; None = the trainer's.
    """
    rows = rows.detach().cpu().contiguous()
    if world_size() == 1:
        return rows
    counts = torch.zeros(world_size(), dtype=torch.int64)
    counts[rank()] = len(rows)
    dist.all_reduce(counts, group=channel)
    padded = rows.new_zeros(int(counts.max()), *rows.shape[1:])
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(gathered, padded, group=channel)
    return torch.cat([part[:count] for part, count in zip(gathered, counts.tolist(), strict=True)])


def gather_json(value: Any, channel: dist.ProcessGroup | None = None) -> list[Any]:
    """The JSON-able `value` of every rank, in rank order, on every rank."""
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = all_gather_rows(torch.tensor([len(data)]), channel).tolist()
    parts = torch.split(all_gather_rows(data, channel), sizes)
    return [json.loads(bytes(part.numpy())) for part in parts]


def broadcast_json(value: Any, channel: dist.ProcessGroup | None = None) -> Any:
    """Rank 0's JSON-able `value` on every rank."""
    return gather_json(value if is_main() else None, channel)[0]


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
