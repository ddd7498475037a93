"""What launch/preflight.py does."""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence

from vitscale import config as configs
from vitscale import distributed
from vitscale.cluster import hostfile
from vitscale.cluster.launch_environment import forwarded
from vitscale.cluster.preflight import rounds
from vitscale.cluster.preflight.compare import Answer, problems, table
from vitscale.errors import FAILED, MISTAKE
from vitscale.redaction import redact


def over_ssh(path: str, words: Sequence[str]) -> int:
    paths, overrides = configs.divided(words)
    given = [*(os.path.abspath(path) for path in paths), *overrides]
    return told(rounds.ask(hostfile.load(path), given, forwarded(os.environ)))


def among_ranks(words: Sequence[str]) -> int:
    answers = rounds.among_ranks(words)
    return told(answers) if distributed.is_main() else status_of(answers)


def own_facts(words: Sequence[str]) -> str:
    """This host's facts, as JSON."""
    (answer,) = rounds.among_ranks(words)
    assert answer.facts
    return json.dumps(dataclasses.asdict(answer.facts), indent=1)


def told(answers: Sequence[Answer]) -> int:
    """Print the table and what is wrong. Returns the exit status."""
    found = problems(answers)
    print(table(answers), flush=True)
    for sentence in found:
        print(f"error: {redact(sentence)}", file=sys.stderr, flush=True)
    if not found:
        ranks, hosts = sum(answer.slots for answer in answers), len(answers)
        processes = "1 process" if ranks == 1 else f"{ranks:,} processes"
        print(f"ok: {processes} on {'1 host' if hosts == 1 else f'{hosts:,} hosts'}")
    return status_of(answers)


def status_of(answers: Sequence[Answer]) -> int:
    """The exit status: 1 if a store does not answer now, 2 for what must be fixed, else 0."""
    if any(answer.facts and answer.facts.store_is_down for answer in answers):
        return FAILED
    return MISTAKE * bool(problems(answers))
