"""How many cores this process may use. Nothing here takes long to import."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def num_cores() -> int:
    """Fewer than the machine has where taskset or a container leaves this process some of them.

    A part of a core, as of `docker --cpus 1.5`, counts as one.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([allowed, *quotas(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def quotas(membership: Path, root: Path) -> Iterator[int]:
    """The CPU time that each control group of this process may use, in cores, rounded up.

    membership: a file with lines like "0::/pod/container" (version 2) and "4:cpu,cpuacct:/pod".
    In a container the path may be the host's: then the limit is at the root.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):
            top = root / "cpu" if controllers else root
            own = top / path.strip("/")
            for folder in (own, *own.parents):
                if folder.is_relative_to(top):
                    yield from _quota(folder)


def _quota(folder: Path) -> Iterator[int]:
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        with contextlib.suppress(OSError, ValueError):  # there is none, or it is "max"
            quota, period = (int(word) for name in names for word in (folder / name).read_text().split())
            if quota > 0:  # -1: no limit
                yield -(-quota // period)
