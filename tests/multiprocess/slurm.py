"""A real Slurm on the two hosts of hosts.py: its daemons, and what it says of jobs."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from multiprocess.hosts import Hosts, two_hosts
from multiprocess.job import wait_until

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
CONFIG = """
ClusterName=test
SlurmctldHost=node1(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=node1 NodeAddr=10.77.0.1 CPUs=1 RealMemory=1000
NodeName=node2 NodeAddr=10.77.0.2 CPUs=1 RealMemory=1000
PartitionName=low Nodes=node1,node2 Default=YES MaxTime=60 State=UP PriorityTier=1 PreemptMode=REQUEUE \
GraceTime=30
PartitionName=high Nodes=node1,node2 MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF
"""


class Slurm:
    """A cluster of node1 and node2 with partitions low and high; it ends with its hosts."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        for name in ("state", "spool/node1", "spool/node2"):
            (folder / name).mkdir(parents=True)
        self.config = folder / "slurm.conf"
        self.config.write_text(CONFIG.format(folder=folder))
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        for number in (1, 2):
            self._start_munge(number, key)
        self._start(1, "slurmctld", "-D", "-c")
        for number in (1, 2):
            self._start(number, "slurmd", "-D", "-N", f"node{number}")
        wait_until(lambda: self.command("sinfo", "-h", "-o", "%T %D") == "idle 2", self.log)

    def command(self, *words: object) -> str:
        """What a command prints on node1."""
        ended = self.hosts.run(1, "env", f"SLURM_CONF={self.config}", *words)
        return (ended.stdout + ended.stderr).strip()

    def submit(self, *words: object) -> str:
        """The number of a job that sbatch has taken."""
        said = self.command("sbatch", "--parsable", *words)
        assert said.isdigit(), said
        return said

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        pairs = self.command("scontrol", "show", "job", "-o", number).split()
        return dict(pair.split("=", 1) for pair in pairs if "=" in pair)

    def log(self) -> str:
        return "\n".join(path.read_text()[-3000:] for path in sorted(self.folder.glob("*.log")))

    def _start_munge(self, number: int, key: Path) -> None:
        files = [f"--{kind}-file={self.folder}/munge-{kind}-{number}" for kind in ("log", "pid", "seed")]
        assert self.hosts.run(number, "mkdir", "/run/munge").returncode == 0
        self._start(number, "munged", "--foreground", "--force", f"--key-file={key}", *files)
        wait_until(lambda: self.hosts.run(number, "sh", "-c", "munge -n | unmunge").returncode == 0, self.log)

    def _start(self, number: int, *words: str) -> subprocess.Popen[bytes]:
        log = self.folder / f"{words[0]}-{number}.out.log"
        return self.hosts.start(number, list(words), log, {"SLURM_CONF": str(self.config)})


@contextmanager
def two_node_slurm(folder: Path) -> Iterator[Slurm]:
    """Slurm on two hosts; the test is skipped where either is impossible."""
    with two_hosts(folder / "hosts", *PROGRAMS) as hosts:
        yield Slurm(hosts, folder / "slurm")
