"""Which rank this process is, and the few collectives that the library needs.

Any launcher that sets RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* will do (deepspeed, torchrun),
and so will srun. Without them the process is a world of one, in which everything here works
too. Objects travel as JSON in byte tensors: nothing is pickled between processes.
"""

import contextlib
import datetime
import json
import logging
import os
import resource
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from vitscale import errors, rendezvous, slurm
from vitscale.errors import ConfigError, StoreError, UserError
from vitscale.system import hardware, open_files
from vitscale.system.cores import num_cores

logger = logging.getLogger(__name__)
T = TypeVar("T")

JOIN_TIMEOUT = datetime.timedelta(minutes=10)  # for all ranks to start
TIMEOUT = datetime.timedelta(hours=3)  # in training, the watchdog ends what hangs long before


def initialize(*, gpu: bool = True) -> None:
    """Join the process group: NCCL with a GPU, gloo without. Every process calls it.

    gpu: whether a GPU is used if there is one. A second call does nothing. Raises ConfigError
    for a launch that cannot work, and RankLost if ranks do not come.
    """
    if dist.is_initialized():
        return
    is_alone = not is_launched()
    if is_alone:
        # For DeepSpeed. With more, what this process starts would take itself for a rank.
        os.environ["LOCAL_RANK"] = "0"
    uses_gpu = gpu and torch.cuda.is_available()
    if uses_gpu:
        torch.cuda.set_device(device())
    elif gpu:
        if local_rank() == 0 and (sentence := hardware.unused_gpus()):
            logger.warning(sentence)
        # Without it, DeepSpeed warns in every process that it has to guess.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # The ranks of a machine share its cores; by default each would start a thread per core.
    # Where torchrun starts several, it sets OMP_NUM_THREADS to 1 itself; for a single one the
    # value is the user's.
    if local_world_size() > 1 or not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(max(1, num_cores() // local_world_size()))
    open_files.allow(launched_world_size(), quiet=local_rank() != 0)  # one line per node
    try:
        where = {}
        if is_alone:
            _check_loopback()
            where = {"store": HashStore(), "rank": 0, "world_size": 1}  # nobody can connect to it
        elif store := rendezvous.own_store(JOIN_TIMEOUT):
            where = {"store": store, "rank": launched_rank(), "world_size": launched_world_size()}
        if uses_gpu:
            dist.init_process_group("cuda:nccl,cpu:gloo", timeout=JOIN_TIMEOUT, device_id=device(), **where)
        else:
            dist.init_process_group("gloo", timeout=JOIN_TIMEOUT, **where)
        wait_longer()
    except dist.DistError as error:
        if reason := rendezvous.explained(error, JOIN_TIMEOUT):
            raise reason from None
        raise


def _check_loopback() -> None:
    """Raise ConfigError where 127.0.0.1, which torch would try for minutes, is down."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
            pass
    except OSError as error:
        raise ConfigError(
            f"127.0.0.1 does not answer ({error.strerror}); bring its interface up: ip link set lo up"
        ) from None


def wait_longer(group: dist.ProcessGroup | None = None) -> None:
    """Let the collectives of a group (None = all ranks) wait for a rank in a long phase."""
    dist.distributed_c10d._set_pg_timeout(TIMEOUT, group)


def is_launched() -> bool:
    """Whether a launcher started this process, which ends with a status of its own."""
    return "WORLD_SIZE" in slurm.launched()


def shutdown() -> None:
    """Leave the process group, so that the process can end cleanly."""
    if dist.is_initialized():
        dist.destroy_process_group()


def new_channel() -> dist.ProcessGroup | None:
    """A process group for a thread beside the trainer, or None in a world of one.

    Collectives of the two may then overlap in any order. Every rank calls it at the same point.
    """
    if world_size() == 1:
        return None
    group = dist.new_group(backend="gloo", timeout=TIMEOUT)
    assert isinstance(group, dist.ProcessGroup)
    return group


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def launched_rank() -> int:
    """As rank, but already known before initialize: what the launcher says."""
    return rank() if dist.is_initialized() else int(slurm.launched().get("RANK", "0"))


def launched_world_size() -> int:
    """As world_size, but already known before initialize: what the launcher says."""
    return world_size() if dist.is_initialized() else int(slurm.launched().get("WORLD_SIZE", "1"))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Processes of this job on this machine, as torchrun or deepspeed (LOCAL_SIZE) says."""
    return int(
        os.environ.get("LOCAL_WORLD_SIZE")
        or os.environ.get("LOCAL_SIZE")
        or os.environ.get("WORLD_SIZE", "1")
    )


def is_main() -> bool:
    return rank() == 0


def device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    chosen = "CUDA_VISIBLE_DEVICES" in os.environ
    return torch.device("cuda", device_number(local_rank(), torch.cuda.device_count(), chosen=chosen))


def device_number(local_rank: int, num_devices: int, *, chosen: bool) -> int:
    """Which of the GPUs that a process sees is its own. Raises ConfigError if there is none.

    chosen: somebody chose what it sees. A scheduler may show each process its own GPU alone, as
        number 0 (srun --gpus-per-task 1).
    """
    if num_devices == 1 and chosen:
        return 0
    if local_rank >= num_devices:
        raise ConfigError(
            f"process {local_rank} of this machine has no GPU: it sees {num_devices}; "
            "start one process per GPU"
        )
    return local_rank


def device_bytes() -> int:
    """The memory that this process has of its device and can still have."""
    if not torch.cuda.is_available():
        return psutil.Process().memory_info().rss + psutil.virtual_memory().available
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved()


def peak_bytes() -> int:
    """The most memory that this process has had so far: of its GPU if it has one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone, or does not answer."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and ("gloo" in str(error) or "NCCL" in str(error))


def barrier() -> None:
    """Wait for every rank, on the CPU: work in a GPU's queue is not waited for."""
    all_reduce_sum([0.0])


def all_reduce_sum(values: list[float]) -> list[float]:
    """The sum of each value over the ranks, in float64; all ranks give equally many values."""
    return _reduce(torch.tensor(values, dtype=torch.float64), dist.ReduceOp.SUM)


def all_reduce_sum_int(values: list[int]) -> list[int]:
    """As all_reduce_sum, in 64-bit integers, which wrap around."""
    return _reduce(torch.tensor(values, dtype=torch.int64), dist.ReduceOp.SUM)


def all_reduce_max(values: list[float]) -> list[float]:
    """The maximum of each value over the ranks; all ranks give equally many values."""
    return _reduce(torch.tensor(values, dtype=torch.float64), dist.ReduceOp.MAX)


def add_up(tensor: Tensor) -> None:
    """Set a tensor, on any device, to its sum over the ranks; every rank calls it."""
    if world_size() > 1:
        dist.all_reduce(tensor)


def any_of(flag: bool) -> bool:
    """Whether the flag is set on any rank; every rank calls it."""
    return bool(all_reduce_max([float(flag)])[0])


def _reduce(tensor: Tensor, op: Any, channel: dist.ProcessGroup | None = None) -> list[Any]:
    if world_size() > 1:
        dist.all_reduce(tensor, op, group=channel)
    return tensor.tolist()


class Agreement:
    """Whether any rank has raised a flag, so that all act on it after the same step.

    The answer comes one call later: nobody waits in the call for a rank that is behind. Every
    rank calls it equally often.
    """

    def __init__(self, num_flags: int) -> None:
        self._flags = torch.zeros(num_flags, dtype=torch.int64)
        self._asked: dist.Work | None = None

    def __call__(self, *flags: bool) -> list[bool]:
        """For each flag, whether any rank raised it in the call before; at first, false."""
        if self._asked:
            self._asked.wait()
        answer = self._flags.bool().tolist()
        self._flags = torch.tensor(flags, dtype=torch.int64)
        if world_size() > 1:
            self._asked = dist.all_reduce(self._flags, dist.ReduceOp.MAX, async_op=True)
        return answer


def all_gather_rows(rows: Tensor) -> Tensor:
    """The rows [n_r, ...] of all ranks r, concatenated in rank order on the CPU of every rank.

    Ranks may give different numbers of rows: all are padded to the largest, gathered and cut.
    """
    rows = rows.detach().cpu().contiguous()
    if world_size() == 1:
        return rows
    counts = torch.zeros(world_size(), dtype=torch.int64)
    counts[rank()] = len(rows)
    dist.all_reduce(counts)
    padded = rows.new_zeros(int(counts.max()), *rows.shape[1:])
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(gathered, padded)
    return torch.cat([part[:count] for part, count in zip(gathered, counts.tolist(), strict=True)])


def gather_floats(value: float) -> list[float]:
    """The `value` of every rank, in rank order, on every rank."""
    return all_gather_rows(torch.tensor([value], dtype=torch.float64)).tolist()


def gather_json(value: Any) -> list[Any]:
    """The `value` of every rank, in rank order, on every rank; it travels as JSON.

    For small values: at thousands of ranks, what every rank gets from every rank is much.
    """
    data = _encoded(value)
    sizes = all_gather_rows(torch.tensor([len(data)])).tolist()
    parts = torch.split(all_gather_rows(data), sizes)
    return [_decoded(part) for part in parts]


def gather_rows_to_main(rows: Tensor, channel: dist.ProcessGroup | None = None) -> list[Tensor]:
    """The rows [n_r, ...] of each rank r, in rank order, on rank 0; an empty list elsewhere.

    Ranks may give different numbers of rows. channel: from new_channel; None = the trainer's.
    """
    rows = rows.detach().cpu().contiguous()
    if world_size() == 1:
        return [rows]
    (most,) = _reduce(torch.tensor([len(rows)]), dist.ReduceOp.MAX, channel)
    padded = rows.new_zeros(most, *rows.shape[1:])
    padded[: len(rows)] = rows
    counts = _gather_to_main(torch.tensor([len(rows)]), channel)
    gathered = _gather_to_main(padded, channel)
    return [part[: int(count)] for part, count in zip(gathered, counts, strict=True)]


def _gather_to_main(tensor: Tensor, channel: dist.ProcessGroup | None) -> list[Tensor]:
    gathered = [torch.empty_like(tensor) for _ in range(world_size())] if is_main() else []
    dist.gather(tensor, gathered or None, dst=0, group=channel)
    return gathered


def gather_json_to_main(value: Any, channel: dist.ProcessGroup | None = None) -> list[Any]:
    """The `value` of every rank, in rank order, on rank 0; an empty list elsewhere."""
    return [_decoded(part) for part in gather_rows_to_main(_encoded(value), channel)]


def broadcast_json(value: Any, channel: dist.ProcessGroup | None = None, source: int = 0) -> Any:
    """The `value` of the rank `source` on every rank; it travels as JSON."""
    data = _encoded(value) if rank() == source else torch.empty(0, dtype=torch.uint8)
    if world_size() > 1:
        size = torch.tensor([len(data)])
        dist.broadcast(size, source, group=channel)
        data = data if rank() == source else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(data, source, group=channel)
    return _decoded(data)


def first_of(value: T | None, channel: dist.ProcessGroup | None = None) -> T | None:
    """The `value` of the lowest rank that has one, on every rank; None if none has."""
    mine = world_size() if value is None else rank()
    (source,) = _reduce(torch.tensor([mine]), dist.ReduceOp.MIN, channel)
    return broadcast_json(value, channel, source) if source < world_size() else None


def _encoded(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decoded(data: Tensor) -> Any:
    return json.loads(bytes(data.numpy()))


def on_main(action: Callable[[], T]) -> T:
    """Run an action on rank 0, and return its result on every rank; every rank calls it.

    Rank 0 does not wait for the others. The result travels as JSON. A UserError of rank 0 is
    raised on every rank, with its class and message; an OSError becomes a StoreError.
    """
    result, failure = _attempt(action) if is_main() else (None, None)
    result, failure = broadcast_json([result, failure])
    _raise_shared(failure)
    return result


def together(action: Callable[[], T], channel: dist.ProcessGroup | None = None) -> T:
    """Run an action on every rank, and fail on all if it fails on any; every rank calls it.

    The action must not communicate. The failure of the lowest rank is raised on all of them, as
    on_main does. channel: from new_channel; None = the trainer's.
    """
    result, failure = _attempt(action)
    _raise_shared(first_of(failure, channel))
    return result


@contextlib.contextmanager
def alike() -> Iterator[None]:
    """Marks a block that does the same on every rank: an error that one raises, all raise."""
    try:
        yield
    except UserError as error:
        error.shared = True
        raise


def _attempt(action: Callable[[], T]) -> tuple[T, None] | tuple[Any, list[str]]:
    """The action's result and None, or None and the class and message of a user's error."""
    try:
        return action(), None
    except UserError as error:
        return None, [type(error).__name__, str(error)]
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return None, [StoreError.__name__, f"{where}{error.strerror or error}"]


def _raise_shared(failure: list[str] | None) -> None:
    if failure:
        kind, message = failure
        raise getattr(errors, kind)(message, shared=True)
