"""What ends a run from outside: signals, a launcher that is gone, and ranks that have died.

A thread looks once a second, and at once when a signal comes: also while the trainer waits in a
collective, where Python's own handlers would not run.
"""

import contextlib
import itertools
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import psutil

from vitscale import distributed
from vitscale.errors import RankLost

T = TypeVar("T")
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
LOOK_SECONDS = 1.0
# From the death of a rank on this machine to the end of this one. Usually a collective fails
# before, and says more; on a GPU it may hang. The second: if this one has failed, and closes;
# it finishes a save meanwhile (LAST_SAVE_SECONDS).
GRACE_SECONDS, CLOSING_SECONDS = 5.0, 180.0
# A launcher passes on a Ctrl-C that the terminal has sent to this process already.
SAME_KEY_SECONDS = 0.5


class Watch:
    """Within the block, what should stop the run is noted; every rank enters it.

    identities: of the processes of all ranks.
    peers: the processes of the other ranks of this machine; None = it was dead at the start.
    asked: whether to save and end. SIGTERM, SIGUSR1, SIGHUP (which nohup ignores) and Ctrl-C
    ask for it, and so do the disappearance of a launcher and a file stop_file, which rank 0
    looks for. A second Ctrl-C ends the process at once.

    If another rank of this machine dies, this one ends too: by the failure of a collective or,
    GRACE_SECONDS later, from here. tell(error) then says why, and gives the exit status.
    failing: this rank has failed, too, and has CLOSING_SECONDS to close what it has open.
    """

    def __init__(self, tell: Callable[[BaseException], int], stop_file: Path | None = None) -> None:
        self.asked = False
        self.reason = ""
        self.failing = False
        self._stop_file = stop_file if distributed.is_main() else None
        self._waiting_since, self._interrupting = 0.0, False
        self._waiter = threading.get_ident()
        self._tell = tell
        self._ancestry = launcher_ancestry()
        self.identities = [Identity(*values) for values in distributed.gather_json(_identity())]
        here = self.identities[distributed.rank()]
        self.peers = {
            rank: _process(identity.pid)
            for rank, identity in enumerate(self.identities)
            if identity[:-1] == here[:-1] and identity != here
        }
        self._interrupts: list[float] = []
        self._previous: dict[int, Any] = {}
        self._previous_fd = -1
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> "Watch":
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._previous_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in stop_signals():
            self._previous[number] = signal.signal(number, self._handle)
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind:
            return  # this process is about to end: what hangs on the way is still ended from here
        self._closing.set()
        signal.set_wakeup_fd(self._previous_fd)
        os.write(self._writer, b"\0")
        self._thread.join()
        os.close(self._reader)
        os.close(self._writer)
        # Launchers send several signals, and after a stop the process still has to end cleanly.
        for number, handler in {} if self.asked else self._previous.items():
            signal.signal(number, handler)

    def unless_asked(self, wait: Callable[[], T]) -> T | None:
        """The result of wait(), or None if it takes long and this rank is asked to stop.

        Whatever wait() was doing is broken off. The thread that made the watch calls it.
        """
        self._waiting_since = time.monotonic()
        try:
            return wait()
        except _Interrupted:
            return None
        finally:
            self._waiting_since, self._interrupting = 0.0, False

    def ask(self, reason: str) -> None:
        """Note that the run should stop, and why; the first reason counts."""
        if not self.asked:
            self.reason = reason
            self.asked = True

    def lost(self, wait_seconds: float = 0.0) -> RankLost | None:
        """The error that says which ranks of this machine are dead; None if all live.

        wait_seconds: for how long to look. A process that dies closes its connections a moment
        before it is seen to be dead.
        """
        deadline = time.monotonic() + wait_seconds
        while True:
            dead = [rank for rank, peer in self.peers.items() if not lives(peer)]
            if dead:
                who = ", ".join(f"rank {rank} (process {self.identities[rank].pid})" for rank in dead)
                died = "has died" if len(dead) == 1 else "have died"
                return RankLost(
                    f"{who} on {socket.gethostname()} {died}: killed, perhaps for lack of memory, or "
                    "crashed; the same command resumes from the newest checkpoint"
                )
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.05)

    def _run(self) -> None:
        dead_since = None
        poll = select.poll()  # select.select refuses descriptors above 1,023, which large jobs have
        poll.register(self._reader, select.POLLIN)
        while not self._closing.is_set():
            if poll.poll(LOOK_SECONDS * 1000):
                for number in os.read(self._reader, 4096):
                    self._take(number)
            if not self.asked and not intact(self._ancestry):
                self._ask("the launcher is gone")
            with contextlib.suppress(OSError):  # of a file server, which may answer the next look
                if not self.asked and self._stop_file and self._stop_file.exists():
                    self._ask(f"the file {self._stop_file}")
            since = self._waiting_since
            if self.asked and since and time.monotonic() - since > LOOK_SECONDS:
                self._interrupting = True
                signal.pthread_kill(self._waiter, signal.SIGTERM)  # runs _handle in the waiting thread
            if error := self.lost():
                dead_since = dead_since or time.monotonic()
                if time.monotonic() - dead_since > (CLOSING_SECONDS if self.failing else GRACE_SECONDS):
                    os._exit(self._tell(error))

    def _handle(self, *_: object) -> None:
        if self._interrupting and self._waiting_since:
            raise _Interrupted

    def _take(self, number: int) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            self._interrupts.append(now)
            if now - self._interrupts[0] > SAME_KEY_SECONDS:
                os._exit(self._tell(KeyboardInterrupt("ended by a second Ctrl-C, without a save")))
        if number in SIGNALS:
            self._ask("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)

    def _ask(self, reason: str) -> None:
        self.ask(f"{reason} (rank {distributed.rank()})")


class _Interrupted(BaseException):
    """Breaks off what the trainer waits for; no `except Exception` on its way catches it."""


class Identity(NamedTuple):
    """Which process a rank is. boot_id: of the machine; two may have the same name."""

    host: str
    boot_id: str
    pid_namespace: str
    pid: int


def _identity() -> Identity:
    boot_id, namespace = "", ""
    if sys.platform == "linux":
        namespace = os.readlink("/proc/self/ns/pid")
        with contextlib.suppress(OSError):  # a sandbox may hide it
            boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return Identity(socket.gethostname(), boot_id, namespace, os.getpid())


def _process(pid: int) -> psutil.Process | None:
    """A process of this machine; None if there is none."""
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None


def stop_signals() -> tuple[signal.Signals, ...]:
    """SIGNALS, but for a SIGHUP that this process was started to ignore, as by nohup."""
    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
    return tuple(number for number in SIGNALS if number not in ignored)


def lives(process: psutil.Process | None) -> bool:
    """Whether it runs: neither its end nor a step of the clock makes another process of it."""
    try:
        return bool(process and process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:  # AccessDenied: another user's process has the number now
        return False


def launcher_ancestry() -> list[tuple[psutil.Process, int]]:
    """(process, its parent's id) from this process up to the launcher; empty without one.

    A launcher is known by what it puts into the environment. A program that was started by hand
    has none: its parent may go, and it stays. That a terminal is closed, SIGHUP says.

        torchrun            torchrun - rank
        srun                slurmstepd - rank
        deepspeed           deepspeed - launch.py - rank
        deepspeed by pdsh   sshd - (shell) - launch.py - rank
    """
    me = psutil.Process()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return [(me, os.getppid())]
    if "CROSS_RANK" in os.environ:
        ancestors = _ancestors(me)
        last = _top_of_deepspeed([_command(process) for process in ancestors])
        return [(process, parent.pid) for process, parent in itertools.pairwise([me, *ancestors[:last]])]
    if "SLURM_STEP_ID" in os.environ and "SLURM_PROCID" in os.environ:
        return [(me, os.getppid())]
    return []


def _ancestors(process: psutil.Process) -> list[psutil.Process]:
    """Nearest first, up to one of another user where /proc hides those (hidepid)."""
    found = []
    with contextlib.suppress(psutil.Error):
        while parent := (found[-1] if found else process).parent():
            found.append(parent)
    return found


def intact(ancestry: Sequence[tuple[psutil.Process, int]]) -> bool:
    """Whether every process still has the parent that it had."""
    try:
        return all(process.ppid() == parent for process, parent in ancestry)
    except psutil.Error:
        return False


def _top_of_deepspeed(commands: Sequence[str]) -> int:
    """How many of a rank's ancestors, nearest first, belong to deepspeed.

    commands: their command lines.
    """
    named = [number for number, command in enumerate(commands, 1) if "deepspeed" in command]
    top = named[-1] if named else 0
    if top and "deepspeed.launcher.launch" in commands[top - 1]:  # no runner above it: it came by ssh
        sessions = [number for number, command in enumerate(commands, 1) if command.startswith("sshd")]
        return next((number for number in sessions if number > top), top)
    return top


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()[:4])
    except psutil.Error:
        return ""
