#!/usr/bin/env python3
"""Record what small runs of a checkout compute, and compare two recordings bit for bit.

    python tests/reference.py record CHECKOUT OUT.json    all runs: five minutes on two cores
    python tests/reference.py compare A.json B.json       status 1 and a line per difference
    --only "fp32-*"                                       with either: runs whose names match

Use it for a change that should alter no result. Record before and after on the same machine,
since other processors round differently. Only the command line of the checkout is used, so that
modules may move.
"""

import argparse
import fnmatch
import hashlib
import io
import itertools
import json
import os
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

TIMEOUT_SECONDS = 300
TIMED = ("perf/", "time/", "checkpoint/")  # columns that differ from run to run
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
Start = tuple[int, str]  # number of ranks, overrides
Rows = dict[str, dict[str, str]]  # step to column to exact value

CONFIG = """
run_dir = "{folder}/run"
seed = 7
global_batch = 8
total_steps = 8
data = {{index = "{data}/one/index.json", lanes = 4, decoder = "simplejpeg"}}
optim = {{lr = 5e-3, weight_decay = 0.1}}
schedule = {{warmup_steps = 3}}
engine = {{num_workers = 0}}
checkpoint = {{every_steps = 5, keep_last = 1}}
log = {{every_steps = 1, tensorboard = false}}
[model]
variant = "Ti/4"
width = 16
depth = 2
num_heads = 2
mlp_dim = 32
image_size = 8
num_classes = 5
representation_size = 8
"""
SOURCES = (
    '[{{index="{data}/one/index.json",weight=7,name="one"}},'
    '{{index="{data}/two/index.json",weight=3,label_map="{data}/map.json"}}]'
)
VARIANTS = {
    "mixture": f"""data.index= data.sources={SOURCES} data.labels=multi loss.name=sigmoid model.head_bias=-2.0
        global_batch=16 augment.repeats=2 augment.mixup=0.2 augment.cutmix=1.0 augment.randaugment=deit
        augment.randaugment_magnitude_std=0.5 augment.color_jitter=0.3 augment.random_erasing=0.25""",
    "dropout": "model.dropout=0.1 engine.micro_batch=2",
    "average": """optim.ema_decay=0.9 model.pool=map evals.top.every_steps=3 evals.few.every_steps=4
        evals.top.test={data}/test/index.json evals.few.kind=fewshot evals.few.shots=[1,2]
        evals.few.train={data}/one/train-*.tar evals.few.test={data}/test/train-*.tar""",
}
SINGLES: dict[str, list[Start]] = {
    "sgd": [(2, "optim.name=sgd optim.weight_decay=0.0 optim.lr=0.1 engine.zero_stage=2")],
    "recompute": [(2, "engine.activation_checkpointing=full engine.zero_stage=3 precision=bf16")],
    "offload": [(2, "engine.offload_optimizer=true engine.zero_stage=2 precision=bf16")],
    "freeze": [(2, "optim.freeze=['patch_embed.*','blocks.0.*'] engine.zero_stage=3 precision=bf16")],
    "augreg": [(1, "augment.crop=pad augment.randaugment=augreg model.pool=mean model.posemb=sincos2d")],
    "split": [
        (2, "total_steps=4 schedule.decay=constant optim.ema_decay=0.9 engine.zero_stage=2"),
        (1, "total_steps=8 schedule.decay=constant optim.ema_decay=0.9 engine.zero_stage=3"),
    ],
    "finetune": [
        (1, "run_dir={folder}/pretrain total_steps=4"),
        (2, "init.checkpoint={folder}/pretrain model.image_size=16 model.num_classes=7 engine.num_workers=1"),
    ],
}


def runs() -> dict[str, list[Start]]:
    """Every run by name. At ZeRO 3, ranks have a data worker."""
    matrix = {}
    for precision, stage, world, variant in itertools.product(("fp32", "bf16"), (1, 2, 3), (1, 2), VARIANTS):
        engine = f"precision={precision} engine.zero_stage={stage} engine.num_workers={stage // 3}"
        matrix[f"{precision}-zero{stage}-{world}-{variant}"] = [(world, f"{VARIANTS[variant]} {engine}")]
    return {**matrix, **SINGLES}


def record(checkout: Path, only: str) -> dict[str, Rows]:
    """Make the data, start every run in turn, and collect what they computed."""
    recorded = {}
    with tempfile.TemporaryDirectory(prefix="reference-") as temporary:
        data = Path(temporary) / "data"
        make_data(checkout, data)
        for name, starts in runs().items():
            if fnmatch.fnmatch(name, only):
                began, folder = time.monotonic(), Path(temporary) / name
                folder.mkdir()
                (folder / "config.toml").write_text(CONFIG.format(folder=folder, data=data))
                for world_size, overrides in starts:
                    train(checkout, folder, world_size, overrides.format(folder=folder, data=data).split())
                recorded[name] = collect(folder / "run")
                print(f"{name:<26}{time.monotonic() - began:6.1f} s", file=sys.stderr)
    return recorded


def make_data(checkout: Path, folder: Path) -> None:
    """Three small data sets: "two" has several labels per image, and damaged images."""
    seeds = itertools.count()
    for name, shards in {"one": (30, 33, 20), "two": (21, 16), "test": (23,)}.items():
        (folder / name).mkdir(parents=True)
        for shard, count in enumerate(shards):
            with tarfile.open(folder / name / f"train-{shard:06d}.tar", "w") as archive:
                for seed in itertools.islice(seeds, count):
                    labels = f"{seed % 3} 3" if name == "two" and seed % 2 else str(seed % 3)
                    image = b"not an image" if name == "two" and seed % 9 == 0 else jpeg(seed)
                    for ending, content in (("jpg", image), ("cls", labels.encode())):
                        info = tarfile.TarInfo(f"s{seed:05d}.{ending}")
                        info.size = len(content)
                        archive.addfile(info, io.BytesIO(content))
        tool = [sys.executable, checkout / "tools" / "data.py", "index", folder / name / "train-*.tar"]
        command = [*map(str, tool), "--chunk-samples", "4", "--workers", "0"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (folder / "map.json").write_text("[4, 3, 2, 1]")


def jpeg(seed: int) -> bytes:
    """A JPEG of 12 to 24 pixels a side, different for every seed."""
    generator, buffer = np.random.default_rng(seed), io.BytesIO()
    image = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    width, height = generator.integers(12, 25, 2).tolist()
    image.resize((width, height), Image.Resampling.BILINEAR).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def train(checkout: Path, folder: Path, world_size: int, overrides: Sequence[str]) -> None:
    """Run launch/train.py on world_size ranks. If one fails, RuntimeError has its output."""
    common = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    common["OMP_NUM_THREADS"] = "1"
    if world_size > 1:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(sock.getsockname()[1])}
        common |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    command = [sys.executable, str(checkout / "launch" / "train.py"), str(folder / "config.toml"), *overrides]
    with open(folder / "log", "ab") as log:
        ranks = []
        for rank in range(world_size):
            env = common | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if world_size > 1 else {})
            ranks.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while any(process.poll() is None for process in ranks):
            if any(process.poll() for process in ranks) or time.monotonic() > deadline:
                for process in ranks:
                    process.kill()
            time.sleep(0.02)
    if any(process.returncode for process in ranks):
        raise RuntimeError(f"{' '.join(command)}\n{(folder / 'log').read_text()}")


def collect(run_dir: Path) -> Rows:
    """The rows of metrics.jsonl without times, by step, and hashes of the last checkpoint."""
    rows: Rows = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        row = rows.setdefault(str(values.pop("step")), {})
        row |= {name: repr(value) for name, value in values.items() if not name.startswith(TIMED)}
    rows["end"] = {}
    for path in sorted(max((run_dir / "checkpoints").glob("step-*")).glob("*.safetensors")):
        content = path.read_bytes()
        rows["end"][path.name] = hashlib.sha256(content).hexdigest()
        rows["end"][f"{path.name} tensors"] = hash_tensors(content)
    return rows


def hash_tensors(content: bytes) -> str:
    """A hash of names, types, shapes and values in a safetensors file, whatever their order."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), memoryview(content)[8 + length :]
    digest = hashlib.sha256()
    for name in sorted(header.keys() - {"__metadata__"}):
        start, end = header[name]["data_offsets"]
        digest.update(f"{name} {header[name]['dtype']} {header[name]['shape']}".encode() + data[start:end])
    return digest.hexdigest()


def compare(a: dict[str, Rows], b: dict[str, Rows], only: str) -> int:
    """Print every difference, or that there is none. Returns the exit status."""
    before, after = ({name: recorded[name] for name in fnmatch.filter(recorded, only)} for recorded in (a, b))
    was, now = flat(before), flat(after)
    different = [key for key in dict.fromkeys([*was, *now]) if was.get(key) != now.get(key)]
    for key in different:
        print(f"{' '.join(key)}: {was.get(key, 'absent')} | {now.get(key, 'absent')}")
    if was and not different:
        print(f"{len(before)} runs, {sum(map(len, before.values())):,} rows: equal bit for bit")
    return 0 if was and not different else 1


def flat(recorded: dict[str, Rows]) -> dict[tuple[str, str, str], str]:
    """Every value by run, step and column."""
    rows = ((name, step, row) for name, steps in recorded.items() for step, row in steps.items())
    return {(name, step, column): value for name, step, row in rows for column, value in row.items()}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["record", "compare"])
    parser.add_argument("a", type=Path, metavar="CHECKOUT|A.json")
    parser.add_argument("b", type=Path, metavar="OUT.json|B.json")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="of the runs' names")
    arguments = parser.parse_args()
    if arguments.command == "compare":
        a, b = (json.loads(path.read_text()) for path in (arguments.a, arguments.b))
        return compare(a, b, arguments.only)
    recorded = record(arguments.a.resolve(), arguments.only)
    arguments.b.write_text(json.dumps(recorded, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
