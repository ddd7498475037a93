"""How many files and sockets a rank has open, and whether its machine allows so many."""

import resource
import socket

from vitscale.errors import ConfigError


def sockets(world_size: int, rank: int) -> int:
    """How many sockets a rank has, without a GPU.

    gloo connects every rank with every other, in each of three groups: torch's, DeepSpeed's
    copy of it, and the checkpoint writer's. Rank 0 also serves the store in which ranks meet,
    and the watchdog's.
    """
    return 3 * world_size + 3 + (0 if rank else 2 * (world_size + 1))


def needed(world_size: int) -> int:
    """How many files a process must be allowed to open in a job of so many ranks.

    Beside the sockets of rank 0 there are shards, pipes, logs, and on a GPU its devices and
    NCCL's connections, which are to neighbours only.
    """
    return 5 * world_size + 512


def allow(world_size: int, *, quiet: bool = False) -> None:
    """Raise the soft limit of open files, often 1,024, to the hard one.

    Raises ConfigError if that is too low for the world: gloo would fail without a word of it.
    quiet: another rank prints it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    least = needed(world_size)
    if hard != resource.RLIM_INFINITY and hard < least:
        raise ConfigError(
            f"each of {world_size:,} ranks needs {least:,} open files, and {socket.gethostname()} allows "
            f"{hard:,}: raise the hard limit to {least} (nofile in /etc/security/limits.conf, LimitNOFILE "
            "in the unit of the daemon that starts jobs, --ulimit nofile for docker)",
            shared=quiet,
        )
