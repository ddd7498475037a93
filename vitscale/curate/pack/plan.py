"""The plan of a packing: which samples belong to which shard. A file in OUT keeps it.

A shard appears in OUT only when it is complete, and its omissions are written before it. One
that would hold no sample is not written: the record of its omissions says that it is finished.
So the plan, the names of the shards in OUT and these records are all that a run needs to
continue a killed one.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vitscale.config import differing_keys
from vitscale.curate.pack.config import SHARD_SPLITS, PackConfig
from vitscale.curate.pack.listing import Listing
from vitscale.curate.pack.writer import shard_name
from vitscale.errors import ConfigError, DataError
from vitscale.system import atomic, file_lock

PLAN_FILE, REPORT_FILE, OMISSIONS_FOLDER = "pack-plan.json", "pack-report.json", "pack-left-out"
FORMAT, VERSION = "vitscale-pack-plan", 1
_SHARD = re.compile(rf"({'|'.join(SHARD_SPLITS)})-\d+\.tar")
_LEFTOVER = re.compile(r"\..+\.(tar|json)\.tmp-[0-9a-f]+")


@dataclasses.dataclass(frozen=True)
class PlannedShard:
    """The shard `name` takes the samples [first, first + count) of a split, once shuffled."""

    name: str
    split: str
    first: int
    count: int


@dataclasses.dataclass(frozen=True)
class PackPlan:
    """What decides the bytes of all shards.

    options: those of PackConfig.content.
    digest: of the listing.
    num_samples: the references of each split, before any omission.
    """

    options: dict[str, Any]
    digest: str
    num_samples: dict[str, int]

    def shards(self) -> Iterator[PlannedShard]:
        """All shards in order: each split is cut after every samples_per_shard references."""
        step = self.options["samples_per_shard"]
        for split, total in self.num_samples.items():
            for first in range(0, total, step):
                yield PlannedShard(shard_name(split, first // step), split, first, min(step, total - first))

    def save(self, out: Path) -> None:
        values = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        atomic.write(out / PLAN_FILE, json.dumps(values, indent=1).encode())


def make_plan(listing: Listing, config: PackConfig) -> PackPlan:
    digest = hashlib.sha256(json.dumps(listing.classes).encode())
    for split, references in listing.splits.items():
        digest.update(split.encode() + references.digest())
    num_samples = {split: len(references) for split, references in listing.splits.items()}
    return PackPlan(config.content(), digest.hexdigest(), num_samples)


def refuse_other_options(out: Path, config: PackConfig) -> None:
    """Raise ConfigError if OUT holds a packing with other options, or shards without a plan.

    This needs no listing, which can take long; `prepare` checks the rest.
    """
    plan = _load(out)
    if plan is None:
        _refuse_unplanned(out, set())
    elif keys := differing_keys(plan.options, config.content()):
        raise ConfigError(
            f"{out} holds a packing with other options ({', '.join(keys)}); "
            "choose another folder or --overwrite"
        )


def prepare(out: Path, plan: PackPlan, overwrite: bool) -> set[str]:
    """Prepare OUT for the plan; return the names of the shards that are finished.

    Removes temporary files of a killed run. Raises ConfigError if OUT belongs to another
    packing, unless `overwrite`: then its shards are removed. The caller holds the lock.
    """
    if overwrite:
        _clear(out)
    earlier = _load(out)
    if earlier is not None and earlier != plan:
        raise ConfigError(
            f"{out} holds a packing of another source, or the source has changed since; "
            "choose another folder or --overwrite"
        )
    planned = {shard.name for shard in plan.shards()}
    _refuse_unplanned(out, planned if earlier else set())
    for folder in (out, out / OMISSIONS_FOLDER):
        for path in _matching(folder, _LEFTOVER):
            path.unlink()
    plan.save(out)
    finished = {path.name for path in _matching(out, _SHARD)}
    return finished | {s.name for s in plan.shards() if len(read_omissions(out, s.name)) == s.count}


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep a second packing out of the folder. Raises BusyError if another one holds it."""
    descriptor = os.open(out, os.O_RDONLY)
    try:
        file_lock.hold(descriptor, f"another packing into {out} is running; wait for it, or stop it")
        yield
    finally:
        os.close(descriptor)


def write_omissions(shard: Path, sentences: list[str]) -> None:
    """Record what was left out of a shard, before the shard appears; no file if nothing was."""
    path = _omissions_file(shard.parent, shard.name)
    if sentences:
        path.parent.mkdir(exist_ok=True)
        atomic.write(path, json.dumps(sentences, indent=1).encode())
    else:
        path.unlink(missing_ok=True)


def read_omissions(out: Path, shard: str) -> list[str]:
    path = _omissions_file(out, shard)
    remedy = f"delete it and {out / shard}, and run again"
    return atomic.read_json(path, list, remedy) if path.exists() else []


def _omissions_file(out: Path, shard: str) -> Path:
    return out / OMISSIONS_FOLDER / f"{shard}.json"


def _load(out: Path) -> PackPlan | None:
    path = out / PLAN_FILE
    try:
        values = json.loads(path.read_bytes())
        if (values.pop("format"), values.pop("version")) != (FORMAT, VERSION):
            raise ValueError("of another version")
        return PackPlan(**values)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is not a plan ({error}); remove it, or use --overwrite") from None


def _refuse_unplanned(out: Path, planned: set[str]) -> None:
    unplanned = [path.name for path in _matching(out, _SHARD) if path.name not in planned]
    if unplanned:
        raise ConfigError(
            f"{out} already holds {len(unplanned)} shards of another origin, like {unplanned[0]}; "
            "choose another folder or --overwrite"
        )


def _clear(out: Path) -> None:
    (out / PLAN_FILE).unlink(missing_ok=True)  # first: shards without a plan never count as finished
    for path in _matching(out, _SHARD):
        path.unlink()
    for path in out.glob("*index.partial"):  # they describe the old shards, even if sizes are equal
        path.unlink()
    for name in (REPORT_FILE, "classes.json", "synsets.json"):
        (out / name).unlink(missing_ok=True)
    for path in (out / OMISSIONS_FOLDER).glob("*.json"):
        path.unlink()


def _matching(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    return sorted(path for path in folder.glob("*") if pattern.fullmatch(path.name))
