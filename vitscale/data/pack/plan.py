"""The plan of a packing: which samples go to which shard, and the file in OUT that lets a killed one go
on.

A shard's name is in OUT only when it is whole, and what was left out of it is written before, so the names
that are there are all that a second run needs to know.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vitscale import storage
from vitscale.config import ConfigError, differing_keys
from vitscale.data.pack.config import PackConfig
from vitscale.data.pack.listing import Listing
from vitscale.data.pack.writer import shard_name

PLAN, REPORT, LEFT_OUT = "pack-plan.json", "pack-report.json", "pack-left-out"
FORMAT, VERSION = "vitscale-pack-plan", 1
_SHARD = re.compile(r"(train|val|test)-\d+\.tar")
_LEFTOVER = re.compile(r"\..+\.(tar|json)\.tmp-\d+")
_LOCK_SECONDS = 5  # a killed run's last process may hold the lock a moment longer


@dataclasses.dataclass(frozen=True)
class PlannedShard:
    """The shard `name` takes `count` samples of a split from position `first` of its order on."""

    name: str
    split: str
    first: int
    count: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What decides the bytes of all shards: options, the digest of the listing, and samples by split."""

    options: dict[str, Any]
    digest: str
    num_samples: dict[str, int]

    def shards(self) -> Iterator[PlannedShard]:
        """All shards in order: each split is cut every samples_per_shard references."""
        step = self.options["samples_per_shard"]
        for split, total in self.num_samples.items():
            for first in range(0, total, step):
                yield PlannedShard(shard_name(split, first // step), split, first, min(step, total - first))

    def save(self, out: Path) -> None:
        values = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        storage.write_atomic(out / PLAN, json.dumps(values, indent=1).encode())


def make_plan(listing: Listing, config: PackConfig) -> Plan:
    digest = hashlib.sha256(json.dumps(listing.classes).encode())
    for split, references in listing.splits.items():
        digest.update(split.encode() + references.digest())
    num_samples = {split: len(references) for split, references in listing.splits.items()}
    return Plan(config.content(), digest.hexdigest(), num_samples)


def refuse_other_options(out: Path, config: PackConfig) -> None:
    """Raise ConfigError if OUT holds shards of another packing, as far as that shows without the listing."""
    plan = _load(out)
    if plan is None:
        _refuse_strangers(out, set())
    elif keys := list(differing_keys(plan.options, config.content())):
        raise ConfigError(
            f"{out} holds a packing with other options ({', '.join(keys)}); choose another folder "
            "or --overwrite"
        )


def enter(out: Path, plan: Plan, overwrite: bool) -> set[str]:
    """Make OUT ready for the plan, and return the names of the shards that are finished.

    Leftovers of a killed run are removed. Raises ConfigError if OUT belongs to another packing, unless
    `overwrite`: then its shards are removed. The caller holds the lock.
    """
    if overwrite:
        _clear(out)
    earlier = _load(out)
    if earlier is not None and earlier != plan:
        raise ConfigError(
            f"{out} holds a packing of another source, or the source has changed since; choose another "
            "folder or --overwrite"
        )
    planned = {shard.name for shard in plan.shards()}
    _refuse_strangers(out, planned if earlier else set())
    for folder in (out, out / LEFT_OUT):
        for path in _matching(folder, _LEFTOVER):
            path.unlink()
    plan.save(out)
    return {path.name for path in _matching(out, _SHARD)}


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep a second packing out of the same folder. The kernel unlocks it when the last process has ended."""
    descriptor = os.open(out, os.O_RDONLY)
    deadline = time.monotonic() + _LOCK_SECONDS
    try:
        while not _try_lock(descriptor):
            if time.monotonic() > deadline:
                raise ConfigError(f"another packing into {out} is running; wait for it, or stop it")
            time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


def write_left_out(shard: Path, sentences: list[str]) -> None:
    """Keep what was left out of a shard, before it appears; nothing is written for none."""
    path = _left_out_file(shard.parent, shard.name)
    if sentences:
        path.parent.mkdir(exist_ok=True)
        storage.write_atomic(path, json.dumps(sentences, indent=1).encode())
    else:
        path.unlink(missing_ok=True)


def read_left_out(out: Path, shard: str) -> list[str]:
    path = _left_out_file(out, shard)
    return json.loads(path.read_bytes()) if path.exists() else []


def _left_out_file(out: Path, shard: str) -> Path:
    return out / LEFT_OUT / f"{shard}.json"


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks; the packing goes on without one
    return True


def _load(out: Path) -> Plan | None:
    path = out / PLAN
    try:
        values = json.loads(path.read_bytes())
        if (values.pop("format"), values.pop("version")) != (FORMAT, VERSION):
            raise ValueError("of another version")
        return Plan(**values)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path} is not a plan ({error}); remove it, or --overwrite") from None


def _refuse_strangers(out: Path, planned: set[str]) -> None:
    strangers = [path.name for path in _matching(out, _SHARD) if path.name not in planned]
    if strangers:
        raise ConfigError(
            f"{out} already holds {len(strangers)} shards of another origin, like {strangers[0]}; choose "
            "another folder or --overwrite"
        )


def _clear(out: Path) -> None:
    (out / PLAN).unlink(missing_ok=True)  # first: shards without a plan are never taken for finished
    for path in _matching(out, _SHARD):
        path.unlink()
    for path in out.glob("*index.partial"):  # of other shards, which may have the same sizes
        path.unlink()
    for name in (REPORT, "classes.json", "synsets.json"):
        (out / name).unlink(missing_ok=True)
    for path in (out / LEFT_OUT).glob("*.json"):
        path.unlink()


def _matching(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    return sorted(path for path in folder.glob("*") if pattern.fullmatch(path.name))
