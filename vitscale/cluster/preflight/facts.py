"""What this host says of itself, for a config and a number of processes."""

import dataclasses
import importlib.metadata
import os
import platform
import resource
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import xxhash

from vitscale import __version__, memory, shared_memory
from vitscale import config as configs
from vitscale.checkpoint import room
from vitscale.checkpoint.store import Home
from vitscale.cluster.preflight import speed
from vitscale.cluster.preflight.compare import CHECKING, Facts
from vitscale.data.sources import check_sources, open_sources
from vitscale.data.workers import check_sockets
from vitscale.errors import StoreDown, UserError
from vitscale.job import Job, derive, open_tasks
from vitscale.run_dir import check_run_dir
from vitscale.system import hardware
from vitscale.system.cores import num_cores
from vitscale.train_config import TrainConfig

ROOT = Path(__file__).resolve().parents[3]
PROBE = ".preflight-"
# Every host calls it with a value, and gets those of all hosts; None for one that is gone.
Gather = Callable[[Any], list[Any]]


def collect(words: Sequence[str], place: int, world_size: int, gather: Gather) -> list[Any]:
    """The facts of all hosts, as JSON values in their order; every host calls it.

    words: paths and overrides, as for launch/train.py. place: of this host among them. The
    first one also looks for what a rank would find at the start: shards, batch plan, what is in
    the run directory.
    """
    facts, config, job = _own(words, world_size)
    gather("ready")
    with _probed(config) as probe:
        facts = _looked(facts, probe, gather)
        facts = speed.with_speed(facts, place, gather)
    gather(CHECKING)
    if place == 0 and job and not facts.errors:
        try:
            _at_start(job)
        except UserError as error:
            facts = _failing(facts, error)
    gather("checked")  # so that all look at their clocks at the same time
    return gather(dataclasses.asdict(dataclasses.replace(facts, clock=time.time())))


def _looked(facts: Facts, probe: "_Probe", gather: Gather) -> Facts:
    """The facts with what this host sees in the run directory."""
    tokens = gather(probe.token)
    seen = sum(bool(token) and (probe.folder / token).exists() for token in tokens)
    gather("looked")
    if not probe.token:
        return dataclasses.replace(facts, errors=facts.errors + probe.errors)
    (probe.folder / probe.token).unlink(missing_ok=True)
    free = shutil.disk_usage(probe.folder).free
    return dataclasses.replace(facts, run_dir=str(probe.folder), shared=probe.shared, saw=seen, free=free)


def _failing(facts: Facts, error: UserError) -> Facts:
    is_down = facts.store_is_down or isinstance(error, StoreDown)
    return dataclasses.replace(facts, errors=(*facts.errors, str(error)), store_is_down=is_down)


def _own(words: Sequence[str], world_size: int) -> tuple[Facts, TrainConfig | None, Job | None]:
    """What needs no other host; the config, if it can be read, and the job, if that fits."""
    errors, failure, config, job, digest, index, shm_needed = [], None, None, None, "", "", 0
    try:
        config = configs.load(TrainConfig, *configs.divided(words))
        digest = xxhash.xxh3_64(configs.to_toml(config).encode()).hexdigest()
        sources = open_sources(config.data)
        fingerprints = " ".join(source.fingerprint() for source in sources)
        index = xxhash.xxh3_64(fingerprints.encode()).hexdigest()
        job = derive(config, world_size, sources)
        shm_needed = shared_memory.needed(config, world_size, open_tasks(job))
        if shm_needed:
            check_sockets()
    except UserError as error:
        failure = error
    if interface := speed.missing_interface():
        errors.append(
            f"GLOO_SOCKET_IFNAME names {interface}, and this host has no such network interface; set it to "
            "one that `ip link` lists"
        )
    if sentence := hardware.unused_gpus():
        errors.append(sentence)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    name = socket.gethostname()
    facts = Facts(
        host=name,
        address=speed.address_here(),
        loopback=not os.environ.get("GLOO_SOCKET_IFNAME") and speed.leads_to_loopback(name),
        checkout=str(ROOT),
        python=platform.python_version(),
        versions=_versions(),
        code=_code_digest(),
        config=digest,
        index=index,
        errors=tuple(errors),
        cores=num_cores(),
        shm_free=shared_memory.free(),
        shm_needed=shm_needed,
        open_files=hard if hard != resource.RLIM_INFINITY else -1,
        gpus=_gpus(),
    )
    return _failing(facts, failure) if failure else facts, config, job


def _versions() -> dict[str, str]:
    found = {"vitscale": __version__}
    for name in ("torch", "deepspeed"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def _code_digest() -> str:
    digest = xxhash.xxh3_64()
    for path in sorted((ROOT / "vitscale").rglob("*.py")):
        digest.update(f"{path.relative_to(ROOT)}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _gpus() -> tuple[str, ...]:
    import torch

    return tuple(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))


@dataclasses.dataclass(frozen=True)
class _Probe:
    """token: a file in the run directory; "" = there is none, and errors may say why."""

    folder: Path
    token: str = ""
    shared: bool = True
    errors: tuple[str, ...] = ()


@contextmanager
def _probed(config: TrainConfig | None) -> Iterator[_Probe]:
    """A file in the run directory; after the block, the folders made for it are gone."""
    if not config:
        yield _Probe(Path())
        return
    folder = Path(config.run_dir).absolute()
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    token = f"{PROBE}{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / token).write_bytes(b"probe")
    except OSError as error:
        sentence = f"run_dir {folder} cannot be written: {error.strerror}; choose another"
        yield _Probe(folder, errors=(sentence,))
        return
    try:
        yield _Probe(folder, token, shared=not config.checkpoint.store)
    finally:
        (folder / token).unlink(missing_ok=True)
        for place in made:
            with suppress(OSError):  # another host has removed it
                place.rmdir()


def _at_start(job: Job) -> None:
    """Raise what the first rank would."""
    config = job.config
    check_sources(job.sources)
    check_run_dir(job)
    home = Home.of(config.run_dir, config.checkpoint)
    if not home.store:
        room.check_space(home, config.checkpoint, memory.checkpoint_bytes(config.model, config.optim))
