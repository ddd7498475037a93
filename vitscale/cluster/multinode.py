"""A run on the hosts of a hostfile, started again until it is done: launch/multinode.sh.

Each start asks the hosts first (preflight), then runs deepspeed over pdsh, and decides by
RUN/status.json. With --no-ssh the same command is given on every host, with its --node-rank,
and each starts its own processes and decides for itself.
"""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from vitscale import config as configs
from vitscale.cluster import hostfile, launch_environment, restarts
from vitscale.cluster.preflight import compare, rounds
from vitscale.data.sources import open_sources
from vitscale.errors import ConfigError, StoreDown
from vitscale.guard import ending
from vitscale.guard.watch import stop_signals
from vitscale.job import worlds
from vitscale.run_dir.lock import RunLock
from vitscale.train_config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "launch/train.py"
# How long to wait, after the first start, for hosts that answer but cannot run the job.
REPAIR_SECONDS = 1800.0
# Without them, pdsh waits for ever for a host that was switched off.
SSH_OPTIONS = "-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=3"


class Launch:
    """All starts of a run by one command."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._slots = hostfile.load(arguments.hostfile)
        paths, overrides = configs.divided(arguments.configs)
        self._given = [*(os.path.abspath(path) for path in paths), *overrides]
        os.chdir(ROOT)  # where ranks run, so that relative paths mean the same
        self._config = configs.load(TrainConfig, *configs.divided(self._given))
        self._environment = launch_environment.forwarded(os.environ)
        self._broken_since = 0.0  # on the monotonic clock; 0 = it is not
        if not arguments.no_ssh:
            _check_pdsh()
        if not 0 <= arguments.min_hosts <= len(self._slots):
            raise ConfigError(
                f"--min-hosts {arguments.min_hosts} must be from 0 to {len(self._slots)}, the hosts of "
                f"{arguments.hostfile}"
            )
        if arguments.max_vain < 1 or arguments.pause < 0:
            raise ConfigError(
                f"--max-vain {arguments.max_vain} must be at least 1, and --pause {arguments.pause:g} not "
                "negative"
            )
        self._launcher: subprocess.Popen[bytes] | None = None
        self._stopped = False
        if arguments.no_ssh and not 0 <= arguments.node_rank < len(self._slots):
            raise ConfigError(
                f"--node-rank {arguments.node_rank} is none of the {len(self._slots)} lines of "
                f"{arguments.hostfile}, which count from 0"
            )

    def run(self) -> int:
        if self._arguments.no_ssh:
            restarts.await_ranks(self._config.run_dir)  # of the other hosts, where this one has lost its own
        else:
            RunLock.check(self._config.run_dir)
        for number in stop_signals():
            signal.signal(number, self._stop)
        vain = restarts.Vain(restarts.newest_step(self._config) or 0)
        while not self._stopped:
            before = ending.read(self._config.run_dir)
            status = self._start()
            if status is not None:
                if not self._stopped:  # else it may have been ended before it could save
                    vain = vain.and_one(restarts.newest_step(self._config))
                decision = self._decided(status, vain.starts, before)
                if decision.kind != "again":
                    _say(f"{decision.kind}: {decision.reason}")
                    return restarts.EXIT_STATUS[decision.kind]
                soon = "" if self._stopped else f"; starting again in {self._arguments.pause:g} s"
                _say(f"{decision.reason}{soon}")
            self._sleep(self._arguments.pause)
        _say("stopped by a signal; the same command continues")
        return restarts.EXIT_STATUS["again"]

    def _decided(
        self, launcher_status: int, num_vain: int, before: Mapping[str, Any] | None
    ) -> restarts.Decision:
        """What to do after a start. before: the run's status before it."""
        status = ending.read(self._config.run_dir)
        is_old = status == before and not (status and restarts.is_finished(self._config, status))
        return restarts.decide(status, launcher_status, num_vain, self._arguments.max_vain, is_old=is_old)

    def _start(self) -> int | None:
        """Run the job once, to the end of its processes.

        Returns the launcher's exit status; None if hosts are missing, so that nothing was run.
        """
        if self._arguments.no_ssh:
            slots, address = self._slots, self._arguments.master_addr
        else:
            slots, address = self._asked()
            if not slots or self._stopped:
                return None
        with tempfile.TemporaryDirectory(prefix="vitscale-") as folder:  # readable by its owner only
            (Path(folder) / "hostfile").write_text(hostfile.text_of(slots))
            environment = self._for_launcher(Path(folder))
            self._launcher = subprocess.Popen(
                self._command(Path(folder), address), cwd=ROOT, env=environment, start_new_session=True
            )
            if self._stopped:  # just before there was a launcher
                self._launcher.send_signal(signal.SIGTERM)
            status = self._launcher.wait()
        restarts.await_ranks(self._config.run_dir)
        return status

    def _asked(self) -> tuple[dict[str, int], str]:
        """The hosts to use, and the first one's address; no hosts if there are too few now,
        or some that need repair.

        Raises ConfigError (StoreDown if a store does not answer) for what is wrong at the first
        start, or later for REPAIR_SECONDS: a
        host that is just back may still lack its file systems, its GPUs or the time.
        """
        answers = rounds.ask(self._slots, self._given, self._environment)
        print(compare.table(answers), flush=True)
        here = [answer for answer in answers if not answer.unreachable]
        least = self._arguments.min_hosts or len(answers)
        for answer in answers:
            if answer.unreachable and len(here) >= least:
                _say(f"without {answer.name}: {answer.trouble}")
        if len(here) < least:
            missing = "; ".join(answer.trouble for answer in answers if answer.unreachable)
            if not self._launcher:
                raise ConfigError(missing)
            _say(missing)
            self._broken_since = 0.0  # the time for repairs starts once it answers
            return {}, ""
        found = compare.problems(here)
        if found and self._can_wait():
            _say("; ".join(found))
            return {}, ""
        if found:
            for sentence in found[:-1]:
                print(f"error: {sentence}", file=sys.stderr)
            is_down = any(answer.facts and answer.facts.store_is_down for answer in here)
            raise (StoreDown if is_down else ConfigError)(found[-1])
        slots = {answer.name: answer.slots for answer in here}
        if len(here) < len(answers):
            numbers = worlds(self._config, open_sources(self._config.data))
            slots = hostfile.most_usable(slots, numbers)
            if len(slots) < least:
                raise ConfigError(
                    f"of the hosts that answer, fewer than {least} can share the run's work: it runs on "
                    f"{', '.join(map(str, numbers))} processes; change the slots in the hostfile"
                )
        self._broken_since = 0.0
        addresses = {answer.name: answer.facts.address for answer in here if answer.facts}
        return slots, self._arguments.master_addr or addresses[next(iter(slots))]

    def _can_wait(self) -> bool:
        """Whether a run that has been started before may wait for its hosts to be repaired."""
        self._broken_since = self._broken_since or time.monotonic()
        return bool(self._launcher) and time.monotonic() - self._broken_since < REPAIR_SECONDS

    def _for_launcher(self, folder: Path) -> dict[str, str]:
        """The launcher's environment; what ranks need is in a file for its owner alone."""
        file = folder / "environment"
        file.touch(mode=0o600)
        file.write_text(launch_environment.for_deepspeed(self._environment))
        ssh = f"{os.environ.get('PDSH_SSH_ARGS_APPEND', '')} {SSH_OPTIONS}".strip()
        return {**os.environ, "DS_ENV_FILE": str(file), "PDSH_SSH_ARGS_APPEND": ssh}

    def _command(self, folder: Path, address: str) -> list[str]:
        arguments = self._arguments
        words = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(folder / "hostfile")]
        words += ["--master_addr", address, "--master_port", str(arguments.master_port)]
        # It would log the command line, with all variables in it.
        words += ["--log_level", "warning"]
        if arguments.no_ssh:
            return [*words, "--no_ssh", "--node_rank", str(arguments.node_rank), PROGRAM, *self._given]
        quoted = map(launch_environment.for_pdsh, self._given)
        return [*words, "--no_ssh_check", "--force_multi", "--launcher", "pdsh", PROGRAM, *quoted]

    def _stop(self, number: int, _: FrameType | None) -> None:
        self._stopped = True
        if self._launcher and self._launcher.poll() is None:
            self._launcher.send_signal(signal.SIGTERM)

    def _sleep(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self._stopped and time.monotonic() < deadline:
            time.sleep(0.1)


def _check_pdsh() -> None:
    """Raise ConfigError where deepspeed could not start anything by it."""
    if not shutil.which("pdsh"):
        raise ConfigError(
            "there is no pdsh here, by which deepspeed starts ranks; install it (apt-get install pdsh), or "
            "give this command on every host, with --no-ssh"
        )
    if shlex.quote(str(ROOT)) != str(ROOT):
        raise ConfigError(
            f"deepspeed does not quote the path of this checkout, {ROOT}; move it to one without blanks and "
            "special characters, or give this command on every host, with --no-ssh"
        )


def _say(text: str) -> None:
    print(f"multinode: {text}", flush=True)
