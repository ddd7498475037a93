"""Shards on real servers: the same data as on a local disk, however the store behaves; and what is said when
it refuses.
"""

import dataclasses
import functools
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from data.servers import SECRET, faulty_proxy, http_server, s3_server, use_s3
from shard_files import write_index

from vitscale import storage
from vitscale.config import ConfigError
from vitscale.data.cache import NodeCache
from vitscale.data.index import Index, build_index, check_shards
from vitscale.data.lane import Recipe
from vitscale.data.loader import Batch, Stream, batches
from vitscale.data.order import digest
from vitscale.data.reader import read_chunk
from vitscale.data.samples import BadSample, RawSample
from vitscale.data.sources import DataConfig, Source, make_mixture
from vitscale.data.transforms import AugmentConfig
from vitscale.storage import StoreError

CONFIG = DataConfig(index="index.json", lanes=4, window_chunks=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bucket, vit, with 97 samples of 64 x 64 in three shards."""
    root = tmp_path_factory.mktemp("buckets")
    write_index(root / "vit", [40, 37, 20], size=64)
    return root


@pytest.fixture(scope="module")
def local(folder: Path) -> Index:
    return Index.load(str(folder / "vit" / "index.json"))


@pytest.fixture(scope="module")
def server(folder: Path):
    with s3_server(folder) as port:
        yield port


@pytest.fixture
def s3(server: int, monkeypatch) -> str:
    use_s3(monkeypatch, server)
    return "s3://vit"


@pytest.fixture(scope="module")
def web(folder: Path, tmp_path_factory: pytest.TempPathFactory):
    with http_server(folder / "vit", tmp_path_factory.mktemp("nginx")) as url:
        yield url


@pytest.fixture(autouse=True)
def impatient(monkeypatch) -> None:
    """Shorter waits, so that a store that never answers is given up in a test's time."""
    monkeypatch.setattr(storage, "FIRST_DELAY_SECONDS", 0.01)
    monkeypatch.setattr(storage, "LONGEST_DELAY_SECONDS", 0.1)


def epoch(index: Index, num_workers: int = 0, cache: NodeCache | None = None) -> list[Batch]:
    sources = (Source(name="0", index=index, label_map={}, excluded=np.empty(0, dtype=np.int64)),)
    mixture = make_mixture(sources, CONFIG, seed=1, global_batch=8)
    stream = Stream(
        sources=sources,
        mixture=mixture,
        recipe=Recipe(AugmentConfig(), "simplejpeg", 16, 5),
        lanes=mixture.rank_lanes(0, 1),
        first_step=0,
        last_step=mixture.steps_per_epoch,
        cache=cache,
    )
    return list(batches(stream, num_workers))


def assert_same_epoch(remote: list[Batch], local: list[Batch]) -> None:
    assert len(remote) == len(local) == 12
    for ours, theirs in zip(remote, local, strict=True):
        assert digest(ours.ids, 0) == digest(theirs.ids, 0)
        assert torch.equal(ours.images, theirs.images) and torch.equal(ours.labels, theirs.labels)
        assert not ours.bad


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_from_s3_equals_the_local_one(s3: str, local: Index, num_workers: int) -> None:
    assert_same_epoch(epoch(Index.load(f"{s3}/index.json"), num_workers), epoch(local))


def test_an_epoch_over_http_equals_the_local_one(web: str, local: Index) -> None:
    assert_same_epoch(epoch(Index.load(f"{web}/index.json"), 2), epoch(local))


@pytest.mark.parametrize("place", ["flaky503", "flaky444"])
def test_an_http_server_that_fails_a_fifth_of_the_requests_delivers_the_same(
    web: str, local: Index, place: str
) -> None:
    assert_same_epoch(epoch(Index.load(f"{web}/{place}/index.json"), 2), epoch(local))


@pytest.mark.parametrize("mode", ["reset", "cut", "stall", "wrong"])
def test_a_store_that_spoils_a_fifth_of_the_requests_delivers_the_same(
    server: int, local: Index, monkeypatch, mode: str
) -> None:
    monkeypatch.setattr(storage, "READ_TIMEOUT_SECONDS", 0.5)
    index = remote_index(local, "s3://vit")
    with faulty_proxy(server, mode, 0.2) as port:
        use_s3(monkeypatch, port)
        assert_same_epoch(epoch(index), epoch(local))


def test_a_server_that_comes_back_is_waited_for(folder: Path, local: Index, monkeypatch) -> None:
    monkeypatch.setattr(storage, "LONGEST_DELAY_SECONDS", 1.0)
    with s3_server(folder) as port:
        pass
    use_s3(monkeypatch, port)

    def come_back() -> None:
        with s3_server(folder, port):
            done.wait(30)

    done = threading.Event()
    helper = threading.Timer(0.5, come_back)
    helper.start()
    try:
        assert len(storage.read_bytes("s3://vit/index.json")) == (folder / "vit/index.json").stat().st_size
    finally:
        done.set()
        helper.join()


def remote_index(local: Index, base: str) -> Index:
    shards = tuple(dataclasses.replace(s, url=f"{base}/{Path(s.url).name}") for s in local.shards)
    return dataclasses.replace(local, shards=shards)


def test_shards_on_a_store_are_indexed_where_they_lie(s3: str, local: Index) -> None:
    index = build_index(storage.expand(f"{s3}/train-{{000000..000002}}.tar"), chunk_samples=4, workers=2)
    assert index.fingerprint() == local.fingerprint()
    assert storage.expand(f"{s3}/train-*.tar") == [shard.url for shard in index.shards]
    check_shards(index)


def test_a_missing_shard_is_named_before_training_and_replaced_in_it(s3: str, local: Index) -> None:
    index = remote_index(local, "s3://vit/elsewhere")
    with pytest.raises(ValueError, match=r"train-000000\.tar is in the index but not there"):
        check_shards(index)
    samples = read_chunk(index, 0)
    assert [sample.reason for sample in samples if isinstance(sample, BadSample)] == [
        "the shard is missing"
    ] * 4


def test_what_a_user_must_mend_is_one_sentence(server: int, web: str, monkeypatch) -> None:
    read = functools.partial(storage.read_range, start=0, end=10)
    use_s3(monkeypatch, server, AWS_SECRET_ACCESS_KEY="wrong" + SECRET)
    with pytest.raises(StoreError, match=r"access is denied .* AWS_SECRET_ACCESS_KEY"):
        read("s3://vit/index.json")
    use_s3(monkeypatch, server)
    with pytest.raises(FileNotFoundError):
        read("s3://vit/nothing.tar")
    with pytest.raises(FileNotFoundError):
        read("s3://nothing/index.json")
    with pytest.raises(FileNotFoundError):
        read(f"{web}/nothing.tar")
    with pytest.raises(StoreError, match="access is denied"):
        read(f"{web}/secret/x.tar")
    assert storage.sizes([f"{web}/index.json", f"{web}/nothing.tar"])[1] is None
    with pytest.raises(StoreError, match="access is denied"):
        storage.sizes([f"{web}/secret/x.tar"])
    with pytest.raises(StoreError, match="ignores range requests"):
        read(f"{web}/norange/index.json")
    assert storage.read_range(f"{web}/index.json", 10**9, 10**9 + 5) == b""
    monkeypatch.setattr(storage, "ATTEMPTS", 2)
    with pytest.raises(StoreError, match=r"failed 2 times, the last time with: .*onnect.* the same command"):
        read("http://127.0.0.1:9/x.tar")
    with pytest.raises(ConfigError, match="pipe: is not allowed"):
        read("pipe:cat /etc/passwd")


def test_missing_credentials_are_one_sentence(server: int, monkeypatch, tmp_path: Path) -> None:
    use_s3(monkeypatch, server)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(StoreError, match=r"there are no credentials .* AWS_ACCESS_KEY_ID"):
        storage.read_bytes("s3://vit/index.json")


def test_chunks_of_a_store_are_kept_on_the_node(s3: str, local: Index, tmp_path: Path, monkeypatch) -> None:
    cache = NodeCache(str(tmp_path / "cache"), 10**9)
    index = remote_index(local, s3)
    assert_same_epoch(epoch(index, 2, cache), epoch(local))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # the store is gone: nothing is asked of it
    storage.client.cache_clear()
    assert_same_epoch(epoch(index, 2, cache), epoch(local))


def test_a_damaged_cache_is_noticed_and_filled_again(s3: str, local: Index, tmp_path: Path) -> None:
    cache = NodeCache(str(tmp_path), 10**9)
    index = remote_index(local, s3)
    read_chunk(index, 0, cache)
    (kept,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    for damage in (lambda data: data[:-1], lambda data: bytes(len(data)), lambda data: b""):
        kept.write_bytes(damage(kept.read_bytes()))
        assert all(isinstance(sample, RawSample) for sample in read_chunk(index, 0, cache))
    assert kept.read_bytes()[:4] == b"s000"
