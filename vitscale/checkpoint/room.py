"""Whether checkpoints can be written where they are to be kept, found before the first step."""

import itertools
import secrets
import shutil
from pathlib import Path

from vitscale import distributed
from vitscale.checkpoint.store import CheckpointConfig, Home
from vitscale.errors import ConfigError, StoreDown, StoreError
from vitscale.quantities import size_text
from vitscale.stores import storage

PROBE = ".probe-"


def check(home: Home, config: CheckpointConfig, save_bytes: int) -> None:
    """Write and read a probe, and compare the free space with what the run will keep.

    Every rank calls it. save_bytes: of one checkpoint. Raises StoreError or ConfigError on all
    ranks.
    """
    token = distributed.on_main(lambda: _write_probe(home))
    try:
        distributed.together(lambda: _look(home, config, save_bytes, token))
    finally:
        distributed.on_main(lambda: (home.directory / token).unlink(missing_ok=True))


def _write_probe(home: Home) -> str:
    token = f"{PROBE}{secrets.token_hex(4)}"
    home.directory.mkdir(parents=True, exist_ok=True)
    (home.directory / token).write_bytes(b"probe")
    if home.store:
        url = storage.child(home.store, token)
        try:
            storage.write_bytes(url, b"probe")
            storage.delete(url)
        except StoreDown:  # which says more, and may pass
            raise
        except (OSError, StoreError) as error:
            raise StoreError(
                f"checkpoint.store {home.store} cannot be written: {error}; check its name and your "
                "credentials"
            ) from None
    return token


def check_space(home: Home, config: CheckpointConfig, save_bytes: int) -> None:
    """Raise ConfigError unless the shared folder has space for keep_last saves and one more.

    With keep_best it is one more again.
    """
    extra = 2 if config.keep_best else 1
    num_kept = len(list(itertools.islice(home.committed(), config.keep_last)))
    saves = config.keep_last + extra - num_kept
    what = f"checkpoint.keep_last = {config.keep_last}, and {'two' if config.keep_best else 'one'} more,"
    _compare(home.directory, saves * save_bytes, what)


def _look(home: Home, config: CheckpointConfig, save_bytes: int, token: str) -> None:
    if distributed.local_rank() != 0:
        return
    if home.store:  # the folder is this node's own, and holds its files until they are uploaded
        home.directory.mkdir(parents=True, exist_ok=True)
        share = save_bytes * distributed.local_world_size() // distributed.world_size()
        _compare(home.directory, share, "this node's part of one checkpoint")
    elif not (home.directory / token).exists():
        raise ConfigError(
            f"{home.directory} on this node is not the folder that rank 0 sees: run_dir must be on a file "
            'system that all nodes share, or set checkpoint.store = "s3://..."'
        )
    else:
        check_space(home, config, save_bytes)


def _compare(folder: Path, needed: int, what: str) -> None:
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ConfigError(
            f"{folder} has {size_text(free)} free, and {what} needs {size_text(needed)}; "
            "free some, lower checkpoint.keep_last, or choose another run_dir"
        )
