"""Two real hosts on one machine, made of Linux namespaces; they leave nothing behind.

Each host has its own process ids, network, name, shared memory and mounts, and an sshd that the
other reaches as node1 or node2 without a password. The disk is the machine's, as on a cluster
with a shared file system.

    node1 10.77.0.1 eth0 --- switch --- eth0 10.77.0.2 node2

The switch is a namespace of its own: a host that is switched off does not take the other's
network with it. Nothing is on the machine's own network, so hosts of several tests may exist at
the same time.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
SSHD = "/usr/sbin/sshd"
NUMBERS = (1, 2)
DEADLINE_SECONDS = 30

# Process 1 of a host. Nobody passes options to the ssh of launchers, so they are in its config.
INIT = """
set -eu
n=$1; folder=$2
hostname node$n
mount --bind "$folder/hosts" /etc/hosts
mount --bind "$folder/ssh_config" /etc/ssh/ssh_config
mount -t tmpfs tmpfs /run
mkdir /run/sshd
mount -t tmpfs tmpfs /dev/shm
ip link set lo up
until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
ip addr add 10.77.0.$n/24 dev eth0
ip link set eth0 up
exec /usr/sbin/sshd -D -e -f /dev/null -o HostKey="$folder/host_key" -o PidFile=none -o UsePAM=no \
    -o StrictModes=no -o PasswordAuthentication=no -o PermitRootLogin=yes -o MaxStartups=100 \
    -o AuthorizedKeysFile="$folder/user_key.pub" -o ListenAddress=10.77.0.$n
"""
SSH_CONFIG = """
Host *
  IdentityFile {folder}/user_key
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  ConnectTimeout 5
  ServerAliveInterval 5
  ServerAliveCountMax 3
"""
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}


def why_impossible(*programs: str) -> str:
    """Why this machine cannot have hosts, or lacks a program; "" if neither."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "two hosts need Linux and root"
    absent = [name for name in ("ip", "nsenter", "setpriv", "ssh", *programs) if not shutil.which(name)]
    if absent or not Path(SSHD).exists():
        return f"two hosts need {', '.join(absent) or SSHD}, which is missing here"
    for arguments in (["--pid", "--fork"], ["--net"], ["--mount"], ["--uts"], ["--ipc"]):
        tried = subprocess.run(["unshare", *arguments, "true"], capture_output=True, check=False)
        if tried.returncode:
            return f"two hosts need namespaces: unshare {arguments[0]} is refused here"
    made = subprocess.run(
        ["unshare", "--net", "ip", "link", "add", "switch", "type", "bridge"],
        capture_output=True,
        check=False,
    )
    return "two hosts need a network bridge, which this kernel refuses" if made.returncode else ""


class Hosts:
    """node1 and node2; a context. launch/train.py and .venv are there under the same path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._namespaces: dict[int, subprocess.Popen[bytes]] = {}  # 0: the switch
        folder.mkdir(parents=True)
        names = "".join(f"10.77.0.{n} node{n}\n" for n in NUMBERS)
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + names)
        (folder / "ssh_config").write_text(SSH_CONFIG.format(folder=folder))
        for key in ("user_key", "host_key"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))

    def __enter__(self) -> "Hosts":
        with contextlib.ExitStack() as made:
            made.callback(self.__exit__)  # of what there is, if the rest cannot be made
            self._unshare(0, "--net", "--pid", command=["sleep", "infinity"])
            self._at(0, "ip", "link", "add", "switch", "type", "bridge")
            self._at(0, "ip", "link", "set", "switch", "up")
            for number in NUMBERS:
                self.switch_on(number)
            made.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        for number in (*NUMBERS, 0):
            if number in self._namespaces:
                self.switch_off(number)

    def switch_on(self, number: int) -> None:
        """Start a host, and wait until its sshd answers."""
        kinds = ("--pid", "--mount-proc", "--net", "--uts", "--ipc", "--mount")
        init = ["bash", "-c", INIT, "init", str(number), str(self.folder)]
        self._unshare(number, *kinds, command=init)
        here, switch = self._init(number), self._init(0)
        port = f"port{number}"
        # A constant address: the other host still knows it after this one was off.
        _run("ip", "link", "add", "eth0", "address", f"02:00:00:00:00:0{number}", "netns", str(here),
             "type", "veth", "peer", "name", port, "netns", str(switch))  # fmt: skip
        self._at(0, "ip", "link", "set", port, "master", "switch", "up")
        knock = f"exec 3<>/dev/tcp/10.77.0.{number}/22"
        _wait(lambda: _succeeds(*self._entering(number, "--net"), "bash", "-c", knock), f"sshd of {number}")

    def switch_off(self, number: int) -> None:
        """As if its power failed: all of its processes are gone at once."""
        outer = self._namespaces.pop(number)
        inside = psutil.Process(outer.pid).children() if outer.poll() is None else []
        for process in inside:
            process.kill()
        outer.kill()
        outer.wait()
        psutil.wait_procs(inside, DEADLINE_SECONDS)

    def unplug(self, number: int) -> None:
        """Cut its network, in silence."""
        self._at(0, "ip", "link", "set", f"port{number}", "down")

    def start(
        self, number: int, command: list[object], log: Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a command on a host, in the checkout; it ends with the host at the latest."""
        kinds = ("--mount", "--pid", "--net", "--uts", "--ipc")
        words = [*self._entering(number, *kinds), f"--wd={ROOT}", *map(str, command)]
        with open(log, "ab") as output:
            return subprocess.Popen(
                words,
                env={**os.environ, **ENVIRONMENT, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def run(self, number: int, *command: object) -> subprocess.CompletedProcess[str]:
        """Run a command on a host to its end."""
        kinds = ("--mount", "--pid", "--net", "--uts", "--ipc")
        words = [*self._entering(number, *kinds), f"--wd={ROOT}", *map(str, command)]
        environment = {**os.environ, **ENVIRONMENT}
        return subprocess.run(
            words, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )

    def processes(self, number: int) -> list[psutil.Process]:
        """All processes of a host."""
        here = _namespace(self._init(number))
        return [process for process in psutil.process_iter() if _namespace(process.pid) == here]

    def ranks(self, number: int) -> list[psutil.Process]:
        """The ranks that run on a host."""
        found = {}
        for process in self.processes(number):
            with contextlib.suppress(psutil.Error):
                words = process.cmdline()
                if any(word.endswith("launch/train.py") for word in words[:3]) and "-c" not in words[:3]:
                    found[process.pid] = process
        return list(found.values())

    def _unshare(self, number: int, *kinds: str, command: list[str]) -> None:
        log = self.folder / f"host{number}.log"
        # Whatever becomes of the tests, a host does not outlive them.
        bound = ["setpriv", "--pdeathsig", "KILL", "unshare", "--fork", "--kill-child"]
        with open(log, "ab") as output:
            self._namespaces[number] = subprocess.Popen(
                [*bound, *kinds, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        own = os.readlink("/proc/self/ns/net")
        _wait(
            lambda: (
                psutil.Process(self._namespaces[number].pid).children()
                and os.readlink(f"/proc/{self._init(number)}/ns/net") != own
            ),
            f"host {number}: {log.read_text()}",
        )

    def _init(self, number: int) -> int:
        """The machine's id of a host's process 1."""
        return psutil.Process(self._namespaces[number].pid).children()[0].pid

    def _entering(self, number: int, *kinds: str) -> list[str]:
        return ["nsenter", "--target", str(self._init(number)), *kinds]

    def _at(self, number: int, *command: str) -> None:
        _run(*self._entering(number, "--net"), *command)


def send(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Send a signal to a command that Hosts.start has started: nsenter is its parent."""
    for child in psutil.Process(process.pid).children():
        child.send_signal(number)


@contextlib.contextmanager
def two_hosts(folder: Path, *programs: str) -> Iterator[Hosts]:
    """The hosts, in a folder of their own; the test is skipped where they are impossible."""
    reason = why_impossible(*programs)
    if reason:
        pytest.skip(reason)
    with Hosts(folder) as hosts:
        yield hosts


def _namespace(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return ""


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def _succeeds(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=False).returncode == 0


def _wait(holds: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
