"""Room in /dev/shm, through which data workers hand their batches over.

A container often has 64 MB of it. What a worker cannot write there never arrives, and training
would wait for it.
"""

import math
import os
import shutil
import socket
from collections.abc import Mapping

import torch

from vitscale import distributed
from vitscale.data.evalset import PREFETCHED_BATCHES
from vitscale.data.loader import PREFETCHED_STEPS
from vitscale.data.workers import check_sockets
from vitscale.errors import ConfigError
from vitscale.evals.task import Task, TaskConfig, num_samples
from vitscale.image_size import sides
from vitscale.quantities import size_text
from vitscale.train_config import TrainConfig

FOLDER = "/dev/shm"


def needed(config: TrainConfig, world_size: int, tasks: Mapping[str, Task]) -> int:
    """Bytes of the batches that the data workers of one process hold ready for it, at most.

    Those of training stay while an evaluation has its own. tasks: of the evaluations.
    """
    image_bytes, of_training = 3 * math.prod(sides(config.model.image_size)), config.engine.num_workers
    steps = PREFETCHED_STEPS + 1 if of_training else 0
    evaluations = [
        _evaluated(
            section,
            section.resolved_num_workers(of_training),
            -(-num_samples(tasks[name]) // world_size),
        )
        for name, section in config.evals.items()
    ]
    return (steps * (config.global_batch // world_size) + max(evaluations, default=0)) * image_bytes


def _evaluated(section: TaskConfig, num_workers: int, own: int) -> int:
    """How many images of an evaluation are ready or in use; on a GPU, those in use are copies.

    own: how many this rank has.
    """
    if not num_workers:
        return 0
    in_use = 0 if torch.cuda.is_available() else 1
    num_workers = min(num_workers, -(-own // section.batch_size))
    return min(own, (PREFETCHED_BATCHES * num_workers + in_use) * section.batch_size)


def free() -> int:
    """Bytes; 0 where there is no such folder."""
    return shutil.disk_usage(FOLDER).free if os.path.isdir(FOLDER) else 0


def shortage(available: int, num_processes: int, each: int) -> str:
    """What to say where the processes of a machine need more than it has; "" = they do not."""
    if available >= num_processes * each:
        return ""
    return (
        f"{FOLDER} has {size_text(available)} free, and the machine's data workers fill "
        f"{size_text(num_processes * each)}; enlarge it (docker --shm-size, in Kubernetes an emptyDir of "
        "medium Memory), or set num_workers = 0 in [engine] and in each [evals.NAME] that has its own"
    )


def check(config: TrainConfig, tasks: Mapping[str, Task]) -> None:
    """Raise ConfigError if the workers of this machine's ranks would run out of it.

    So too if they cannot make sockets. Every rank calls it, and one of each machine looks.
    """
    if distributed.local_rank():
        return
    each = needed(config, distributed.world_size(), tasks)
    if each:
        check_sockets()
    if not os.path.isdir(FOLDER):
        return
    if sentence := shortage(free(), distributed.local_world_size(), each):
        raise ConfigError(f"{socket.gethostname()}: {sentence}")
