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
from vitscale.run_dir.directory import check_run_dir
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
    reading = _read(words, world_size)
    facts = _own_facts(reading)
    gather("ready")
    with _probed(reading.config) as probe:
        facts = _with_run_dir(facts, probe, gather)
        facts = speed.with_speed(facts, place, gather)
    gather(CHECKING)
    if place == 0 and reading.job and not facts.errors:
        try:
            _check_start(reading.job)
        except UserError as error:
            facts = _with_error(facts, error)
    gather("checked")  # so that all look at their clocks at the same time
    return gather(dataclasses.asdict(dataclasses.replace(facts, clock=time.time())))


@dataclasses.dataclass(kw_only=True)
class _Reading:
    """What the config gives on this host, up to the error that ended the reading, if any.

    config_digest, index_digest: xxh3, in hex. shm_needed: bytes of /dev/shm per process.
    """

    config: TrainConfig | None = None
    config_digest: str = ""
    index_digest: str = ""
    job: Job | None = None
    shm_needed: int = 0
    error: UserError | None = None


def _read(words: Sequence[str], world_size: int) -> _Reading:
    reading = _Reading()
    try:
        reading.config = config = configs.load(TrainConfig, *configs.divided(words))
        reading.config_digest = _digest(configs.to_toml(config))
        sources = open_sources(config.data)
        reading.index_digest = _digest(" ".join(source.fingerprint() for source in sources))
        reading.job = derive(config, world_size, sources)
        reading.shm_needed = shared_memory.needed(config, world_size, open_tasks(reading.job))
        if reading.shm_needed:
            check_sockets()
    except UserError as error:
        reading.error = error
    return reading


def _digest(text: str) -> str:
    return xxhash.xxh3_64(text.encode()).hexdigest()


def _own_facts(reading: _Reading) -> Facts:
    """What needs no other host."""
    errors: list[str] = []
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
        config=reading.config_digest,
        index=reading.index_digest,
        errors=tuple(errors),
        cores=num_cores(),
        shm_free=shared_memory.free(),
        shm_needed=reading.shm_needed,
        open_files=hard if hard != resource.RLIM_INFINITY else -1,
        gpus=_gpus(),
    )
    return _with_error(facts, reading.error) if reading.error else facts


def _with_error(facts: Facts, error: UserError) -> Facts:
    is_down = facts.store_is_down or isinstance(error, StoreDown)
    return dataclasses.replace(facts, errors=(*facts.errors, str(error)), store_is_down=is_down)


def _with_run_dir(facts: Facts, probe: "_Probe", gather: Gather) -> Facts:
    """The facts with what this host sees in the run directory."""
    tokens = gather(probe.token)
    seen = sum(bool(token) and (probe.folder / token).exists() for token in tokens)
    gather("looked")  # no probe is removed before all have looked
    if not probe.token:
        return dataclasses.replace(facts, errors=facts.errors + probe.errors)
    # Before the next round: the host that made the folder can remove it only if it is empty.
    (probe.folder / probe.token).unlink(missing_ok=True)
    free = shutil.disk_usage(probe.folder).free
    return dataclasses.replace(facts, run_dir=str(probe.folder), shared=probe.shared, saw=seen, free=free)


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
    made = [path for path in (folder, *folder.parents) if not path.exists()]
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
        for path in made:
            with suppress(OSError):  # another host has removed it
                path.rmdir()


def _check_start(job: Job) -> None:
    """Raise what the first rank would raise at the start."""
    config = job.config
    check_sources(job.sources)
    check_run_dir(job)
    home = Home.of(config.run_dir, config.checkpoint)
    if not home.store:
        room.check_space(home, config.checkpoint, memory.checkpoint_bytes(config.model, config.optim))
