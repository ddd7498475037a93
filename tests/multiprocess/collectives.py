"""What the ranks of test_collectives.py do."""

import datetime
import json
import math
import os
import sys
import threading
import time
from pathlib import Path

import torch
from multiprocess.hooks import at_frames
from torch import Tensor
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from vitscale import command, distributed, errors
from vitscale.checkpoint import load
from vitscale.checkpoint.manifest import MANIFEST
from vitscale.checkpoint.store import Home
from vitscale.data.reader import read_chunk
from vitscale.errors import NotFinite, UserError
from vitscale.evals import ClassifyConfig, FewShotConfig, KnnConfig, open_task
from vitscale.evals.adapters import LiveModel
from vitscale.evals.fewshot import FewShotTask
from vitscale.guard import hang, watchdog
from vitscale.guard.watch import Watch


def fail(folder: Path, way: str, kind: str, failing: int) -> None:
    """Rank `failing` raises an error of `kind`; RANK.json gets what reaches each rank."""
    distributed.initialize()

    def action() -> list[int]:
        if distributed.rank() == failing:
            if kind == "OSError":
                raise OSError(28, "No space left on device", "/full")
            raise getattr(errors, kind)("what is wrong")
        return [distributed.rank(), 7]

    try:
        result = getattr(distributed, way)(action)
    except UserError as error:
        result = {"kind": type(error).__name__, "message": str(error), "shared": error.shared}
    (folder / f"{distributed.rank()}.json").write_text(json.dumps(result))


def join_alone(world_size: int) -> int:
    """Join a job of that many ranks whose others do not come."""
    os.environ["WORLD_SIZE"] = str(world_size)
    distributed.JOIN_TIMEOUT = datetime.timedelta(seconds=0.5)
    return command.run(lambda: distributed.initialize() or 0)


def lose_the_last() -> int:
    """The last rank ends before a collective, in which the others wait for it."""
    distributed.initialize()
    distributed.barrier()
    if distributed.rank() == distributed.world_size() - 1:
        os._exit(0)
    return command.run(lambda: distributed.barrier() or 0)


def agree(folder: Path) -> None:
    """Rank 1 raises the first flag in its third call; RANK.json gets every answer."""
    distributed.initialize()
    agreed = distributed.Agreement(2)
    answers = [agreed(call == 2 and distributed.rank() == 1, False) for call in range(5)]
    (folder / f"{distributed.rank()}.json").write_text(json.dumps(answers))


def gather(folder: Path, with_value: int) -> None:
    """Each rank gives `rank` rows and a text; RANK.json gets what it got from the others.

    with_value: this rank has a value for first_of, and so have all after it.
    """
    distributed.initialize()
    rank = distributed.rank()
    for channel in (None, distributed.new_channel()):
        rows = distributed.gather_rows_to_main(torch.full((rank, 2), rank), channel)
        texts = distributed.gather_json_to_main({"rank": "é" * rank}, channel)
        sent = distributed.broadcast_json([rank, "x" * 1000], channel, source=distributed.world_size() - 1)
        first = distributed.first_of(f"rank {rank}" if rank >= with_value else None, channel)
        results = {"rows": [part.tolist() for part in rows], "texts": texts, "sent": sent, "first": first}
        (folder / f"{rank}.json").write_text(json.dumps(results))


def label_pool(index: Path, folder: Path) -> None:
    """RANK.json gets the labels of a few-shot pool, and how many chunks a rank read."""
    distributed.initialize()
    chunks: list[int] = []
    at_frames(read_chunk, lambda frame: chunks.append(frame.f_locals["chunk"]))
    task = open_task("few", FewShotConfig(train=str(index), test=str(index)), 16)
    assert isinstance(task, FewShotTask)
    said = [task.train_labels.tolist(), len(chunks)]
    (folder / f"{distributed.rank()}.json").write_text(json.dumps(said))


def overflow(index: Path, folder: Path) -> None:
    """RANK.json gets what a rank is told of a model that overflows on one image of rank 1."""
    distributed.initialize()

    def forward(pixels: Tensor, *, features_only: bool) -> Tensor:
        rows = pixels.flatten(1)[:, :5].clone()
        if distributed.rank() == 1:
            rows[0, 0] = math.inf
        return rows

    sets, said = {"test": str(index), "batch_size": 100}, []
    for config in (ClassifyConfig(**sets), KnnConfig(train=str(index), k=(1,), **sets)):
        try:
            open_task("a", config, 16).run(LiveModel(forward, num_classes=5))
        except NotFinite as error:
            said.append([str(error), error.shared])
    (folder / f"{distributed.rank()}.json").write_text(json.dumps(said))


def find(runs: Path, nodes: list[int], result: Path) -> None:
    """Each rank finds the checkpoint of the run RUNS-NODE, under the same relative path.

    nodes: for each rank, on which node it is. RESULT-RANK gets what was found, or the error,
    and how often the rank opened a manifest.
    """
    distributed.initialize()
    node = nodes[distributed.rank()]
    os.environ["LOCAL_RANK"] = str(nodes[: distributed.rank()].count(node))
    os.chdir(f"{runs}-{node}")
    opened: list[str] = []
    sys.addaudithook(lambda event, values: opened.append(str(values[0])) if event == "open" else None)
    try:
        checkpoint = load.find(Home(Path("checkpoints")))
        said = checkpoint.folder if checkpoint else ""
    except UserError as error:
        said = str(error)
    reads = sum(path.endswith(MANIFEST) for path in opened)
    Path(f"{result}-{distributed.rank()}").write_text(json.dumps([said, reads]))


def intrude(folder: Path, log: Path) -> None:
    """A stranger writes into the watchdog's store until the log says something of it.

    RANK.json gets what becomes of the watchdog.
    """
    distributed.initialize()
    stores: list[TCPStore] = []
    watchdog.TCPStore = lambda *at, **how: stores.append(TCPStore(*at, **how)) or stores[0]
    watchdog.BEAT_SECONDS = 0.02
    limits = dict.fromkeys(hang.ORDER, math.inf)
    with Watch(lambda _: 1) as watch, watchdog.Watchdog(limits, watch, lambda *_: 1):
        if distributed.is_main():
            stranger = TCPStore("localhost", stores[0].port, is_master=False)
            deadline = time.monotonic() + 10
            while not log.read_text() and time.monotonic() < deadline:
                for key in ("place/1", "stop", "alarm", *stranger.list_keys()):
                    stranger.set(key, "x")
        distributed.barrier()
        threads = [thread.name for thread in threading.enumerate()]
        said = {"asked": watch.asked, "alive": "watchdog store" in threads}
        (folder / f"{distributed.rank()}.json").write_text(json.dumps(said))
        distributed.barrier()
