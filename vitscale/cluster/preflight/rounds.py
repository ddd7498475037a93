"""How the answers of all hosts come together: over ssh, or among the ranks of a launcher.

Over ssh, one program asks every host at the same time. On each, launch/preflight.py --answer
speaks in lines of JSON on its standard input and output:

    asks    {"place": 0, "world_size": 16, "configs": [...], "environment": {...}}
    host    vitscale-preflight "a value"              each round: one line of every host,
    asks    ["a value", null, "another value"]        then all lines to every host

The environment goes this way, since a command line is visible to everybody on the host.
"""

import dataclasses
import json
import os
import queue
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitscale.cluster.preflight.compare import CHECKING, Answer, Facts, facts_of

ROOT = Path(__file__).resolve().parents[3]
MARK = "vitscale-preflight "
ROUND_SECONDS = 60.0
CHECK_SECONDS = 1800.0  # to ask for hundreds of thousands of shards
NO_CHECKOUT, NO_PYTHON, SSH_FAILED = 101, 102, 255
SSH = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", "-o", "ServerAliveInterval=5"]


def ask(slots: Mapping[str, int], words: Sequence[str], environment: Mapping[str, str]) -> list[Answer]:
    """The answers of all hosts, over ssh.

    words: paths and overrides, as for launch/train.py.
    """
    hosts = [_Host(name, count) for name, count in slots.items()]
    try:
        for place, host in enumerate(hosts):
            host.write(
                {
                    "place": place,
                    "world_size": sum(slots.values()),
                    "configs": list(words),
                    "environment": dict(environment),
                }
            )
        values: list[Any] = []
        while any(host.answer is None for host in hosts):
            limit = CHECK_SECONDS if CHECKING in values else ROUND_SECONDS
            values = [host.read(limit) for host in hosts]
            for host in hosts:
                host.write(values)
        return [host.answer for host in hosts if host.answer]
    finally:
        for host in hosts:
            host.close()


class _Host:
    """The program on another host. answer: None while more lines are expected of it."""

    def __init__(self, name: str, slots: int) -> None:
        self.name, self.slots = name, slots
        self.answer: Answer | None = None
        python = shlex.quote(sys.executable)
        command = (
            f"cd {shlex.quote(str(ROOT))} 2>/dev/null && test -f launch/preflight.py || exit {NO_CHECKOUT}; "
            f"test -x {python} || exit {NO_PYTHON}; exec {python} launch/preflight.py --answer"
        )
        self._process = subprocess.Popen(
            [*SSH, name, command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        # Its lines, each with the time at which it came; "" follows the last one.
        self._lines: queue.Queue[tuple[float, str]] = queue.Queue()
        self._errors = ""
        threading.Thread(target=self._read_lines, daemon=True).start()
        self._errors_reader = threading.Thread(target=self._read_errors, daemon=True)
        self._errors_reader.start()

    def write(self, value: Any) -> None:
        if self.answer:
            return
        try:
            assert self._process.stdin
            self._process.stdin.write(json.dumps(value) + "\n")
            self._process.stdin.flush()
        except OSError:  # it is gone: the next read says why
            pass

    def read(self, limit: float) -> Any:
        """Its value of this round; None if it has no more, or none in limit seconds."""
        if self.answer:
            return None
        try:
            came_at, line = self._lines.get(timeout=limit)
        except queue.Empty:
            sentence = f"{self.name} did not answer for {limit:.0f} s; look at what keeps it busy"
            self._fail(sentence, unreachable=True)
            return None
        if not line:
            self._fail_because_it_ended()
            return None
        value = json.loads(line)
        if isinstance(value, dict):  # its facts, after the last round
            facts = facts_of(value)
            facts = dataclasses.replace(facts, clock=facts.clock - came_at)
            self.answer = Answer(name=self.name, slots=self.slots, facts=facts)
        return value

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _fail(self, sentence: str, *, unreachable: bool) -> None:
        self.answer = Answer(name=self.name, slots=self.slots, trouble=sentence, unreachable=unreachable)

    def _fail_because_it_ended(self) -> None:
        status = self._process.wait()
        self._errors_reader.join(1)
        errors = self._errors.strip().splitlines()
        last = errors[-1] if errors else f"status {status}"
        sentences = {
            SSH_FAILED: f"{self.name} cannot be reached by ssh: {last}; `ssh {self.name} hostname` must work "
            "here without a password",
            NO_CHECKOUT: f"{self.name} has no checkout of vitscale at {ROOT}; it must be at the same path on "
            "all hosts",
            NO_PYTHON: f"{self.name} has no {sys.executable}; run bash tools/setup.sh in {ROOT} there",
        }
        otherwise = f"{self.name}: launch/preflight.py ended there with status {status}: {last}"
        self._fail(sentences.get(status, otherwise), unreachable=status == SSH_FAILED)

    def _read_lines(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith(MARK):  # and no login banner
                self._lines.put((time.time(), line.removeprefix(MARK)))
        self._lines.put((time.time(), ""))

    def _read_errors(self) -> None:
        assert self._process.stderr
        for line in self._process.stderr:
            self._errors += line


def answer_asker() -> int:
    """The other end of ask(), on each host. Returns an exit status."""
    question = json.loads(sys.stdin.readline())
    os.environ.update(question["environment"])
    lines, sys.stdout = sys.stdout, sys.stderr  # nothing else that is printed comes between the lines

    def gather(value: Any) -> list[Any]:
        lines.write(f"{MARK}{json.dumps(value)}\n")
        lines.flush()
        heard = sys.stdin.readline()
        if not heard:
            raise SystemExit(1)  # nobody listens any more
        return json.loads(heard)

    from vitscale.cluster.preflight.facts import collect

    collect(question["configs"], question["place"], question["world_size"], gather)
    return 0


def among_ranks(words: Sequence[str]) -> list[Answer]:
    """The answers of all hosts, among the ranks that a launcher has started; each calls it.

    Without a launcher, this host's alone.
    """
    from vitscale import distributed
    from vitscale.cluster.preflight.facts import collect

    distributed.initialize(gpu=False)  # with NCCL, a host without its GPUs would be waited for
    rows = collect(words, distributed.rank(), distributed.world_size(), distributed.gather_json)
    now = time.time()
    firsts = distributed.gather_json(distributed.local_rank() == 0)
    return by_host([facts_of(row) for row in rows], firsts, now)


def by_host(rows: Sequence[Facts], firsts: Sequence[bool], now: float) -> list[Answer]:
    """The answers of hosts, from the facts of ranks in rank order.

    firsts: whether each is the first of its host. now: the time here, in seconds since the
    epoch, from which their clocks are counted.
    """
    answers: list[Answer] = []
    newest: dict[str, int] = {}  # by name, a host's place in answers: its ranks need not be neighbours
    for facts, first in zip(rows, firsts, strict=True):
        if first:
            newest[facts.host] = len(answers)
            facts = dataclasses.replace(facts, clock=facts.clock - now)
            answers.append(Answer(name=facts.host, slots=1, facts=facts))
        else:
            place = newest[facts.host]
            answers[place] = _with_rank(answers[place], facts)
    return answers


def _with_rank(host: Answer, rank: Facts) -> Answer:
    """A host with one more of its ranks."""
    assert host.facts
    gpus = host.facts.gpus
    if len(rank.gpus) == 1 and len(gpus) == host.slots:  # each rank sees its own GPU alone
        gpus += rank.gpus
    return dataclasses.replace(host, slots=host.slots + 1, facts=dataclasses.replace(host.facts, gpus=gpus))
