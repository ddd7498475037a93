"""RUN/history.jsonl: a row for each start of a run, with its layout and what was changed.

    {"time": "2026-03-01T04:12:33+0000", "step": 12000, "data_step": 12000, "rollbacks": 0,
     "world_size": 64, "zero_stage": 1, "micro_batch": 32, "grad_accum_steps": 2, "host": "c7",
     "command": "launch/train.py ...", "changed": {"engine.micro_batch": [64, 32]},
     "versions": {"torch": "2.11.0", ...}}

`changed` names the keys of the config that differ from those of the start before. A run that is
rolled back starts again.
"""

import json
import shlex
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitscale import config as configs
from vitscale.guard.ending import TIME_FORMAT
from vitscale.job import Job
from vitscale.progress import Progress
from vitscale.quantities import counted
from vitscale.redaction import redact
from vitscale.train_config import TrainConfig

FILE_NAME = "history.jsonl"


def add_start(
    job: Job, progress: Progress, before: TrainConfig | None, versions: Mapping[str, str]
) -> dict[str, Any]:
    """Append the row of a start, and return it.

    before: the config of the last one; None = there was none.
    """
    config, plan = job.config, job.plan
    row = {
        "time": time.strftime(TIME_FORMAT),
        "step": progress.step,
        "data_step": progress.data_step,
        "rollbacks": progress.rollbacks,
        "world_size": plan.world_size,
        "zero_stage": config.engine.zero_stage,
        "micro_batch": plan.micro_batch,
        "grad_accum_steps": plan.grad_accum_steps,
        "host": socket.gethostname(),
        "command": redact(shlex.join(sys.argv)),
        "changed": _changed(before, config) if before else {},
        "versions": dict(versions),
    }
    path = Path(config.run_dir) / FILE_NAME
    torn = path.exists() and not path.read_bytes().endswith(b"\n")  # by a kill
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n" * torn + json.dumps(row) + "\n")
    return row


def card(row: Mapping[str, Any]) -> str:
    """The row of a start as a few lines, for people."""
    lines = [
        f"started at {row['time']} by {row['host']}",
        f"from step {row['step']:,}",
        f"{counted(row['world_size'], 'rank')} at ZeRO {row['zero_stage']}, "
        f"{row['grad_accum_steps']} micro batches of {row['micro_batch']} each",
    ]
    if row["rollbacks"]:
        times = "once" if row["rollbacks"] == 1 else f"{row['rollbacks']} times"
        passed_over = row["data_step"] - row["step"]
        lines.append(f"rolled back {times}, {passed_over:,} batches passed over in all")
    lines += [f"{key} = {new!r}, before {old!r}" for key, (old, new) in row["changed"].items()]
    return "\n".join(lines)


def _changed(before: TrainConfig, now: TrainConfig) -> dict[str, list[Any]]:
    changes = configs.differences(configs.to_dict(before), configs.to_dict(now))
    return {key: [old, new] for key, old, new in changes}
