"""Shards on real servers: the same data as on a local disk, however the store behaves, and what
is said when it refuses.
"""

import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from data.epochs import assert_same_epoch, epoch, remote_index
from data.servers import SECRET, faulty_proxy, s3_server, use_s3

from vitscale.data.cache import NodeCache
from vitscale.data.data_config import DataConfig
from vitscale.data.exclusions import load_exclusions
from vitscale.data.index import Index, check_shards
from vitscale.data.indexing import build_index
from vitscale.data.reader import read_chunk
from vitscale.data.samples import BadSample, RawSample
from vitscale.data.sources import open_sources
from vitscale.errors import ConfigError, DataError, StoreDown, StoreError
from vitscale.stores import attempts, clients, storage

pytestmark = pytest.mark.usefixtures("impatient")


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
    monkeypatch.setattr(clients, "READ_TIMEOUT_SECONDS", 0.5)
    index = remote_index(local, "s3://vit")
    with faulty_proxy(server, mode, 0.2) as port:
        use_s3(monkeypatch, port)
        assert_same_epoch(epoch(index), epoch(local))


def test_wrong_bytes_of_a_disk_are_read_once_more(tmp_path: Path) -> None:
    path, judged = tmp_path / "x.tar", []
    path.write_bytes(b"wrong")

    def is_right(data: bytes) -> bool:
        judged.append(data)
        path.write_bytes(b"right")
        return False

    assert storage.read_range(str(path), 0, 5, is_right) == b"right" and judged == [b"wrong"]


def test_wrong_bytes_are_read_again_as_often_as_after_errors(server: int, local: Index, monkeypatch) -> None:
    index = remote_index(local, "s3://vit")
    with faulty_proxy(server, "four", 0) as port:  # three reads would not do
        use_s3(monkeypatch, port)
        assert_same_epoch(epoch(index), epoch(local))


def test_bytes_that_stay_wrong_are_damage(server: int, local: Index, monkeypatch, caplog) -> None:
    caplog.set_level(logging.INFO, attempts.logger.name)
    with faulty_proxy(server, "wrong", 1) as port:
        use_s3(monkeypatch, port)
        samples = read_chunk(remote_index(local, "s3://vit"), 0)
    assert all(isinstance(s, BadSample) and "not those that were indexed" in s.reason for s in samples)
    failed = [record for record in caplog.records if "it delivered wrong bytes" in record.getMessage()]
    assert len(failed) == attempts.ATTEMPTS - 1


class Restart(logging.Handler):
    """Starts a server when storage has logged that the second attempt to read `url` failed."""

    def __init__(self, url: str, start: Callable[[], object]) -> None:
        super().__init__()
        self.url, self.start, self.attempts = url, start, []

    def emit(self, record: logging.LogRecord) -> None:
        _, url, _, next_attempt, _ = record.args
        if url == self.url:
            self.attempts.append(next_attempt)
            if next_attempt == 3:
                self.start()


def test_a_server_that_comes_back_is_waited_for(folder: Path, monkeypatch, caplog) -> None:
    with s3_server(folder) as port:
        pass
    use_s3(monkeypatch, port)
    caplog.set_level(logging.INFO, attempts.logger.name)
    with contextlib.ExitStack() as running:
        restart = Restart("s3://vit/index.json", lambda: running.enter_context(s3_server(folder, port)))
        attempts.logger.addHandler(restart)
        running.callback(attempts.logger.removeHandler, restart)
        assert storage.read_bytes(restart.url) == (folder / "vit" / "index.json").read_bytes()
    assert restart.attempts == [2, 3]


def test_shards_on_a_store_are_indexed_where_they_are(s3: str, local: Index) -> None:
    index = build_index(storage.expand(f"{s3}/train-{{000000..000002}}.tar"), chunk_samples=4, workers=2)
    assert index.fingerprint() == local.fingerprint()
    assert storage.expand(f"{s3}/train-*.tar") == [shard.url for shard in index.shards]
    check_shards(index)


def test_the_version_of_an_object_changes_with_its_content(s3: str, web: str, folder: Path) -> None:
    file = folder / "vit" / "labels.txt"
    urls = [f"{s3}/labels.txt", f"{web}/labels.txt", str(file)]
    assert storage.versions(urls) == ["", "", ""]
    versions = []
    for content in (b"3 17", b"5 17"):
        file.write_bytes(content)
        os.utime(file, (len(versions), len(versions)))
        versions.append(storage.versions(urls))
        assert storage.versions(urls) == versions[-1]
    file.unlink()
    assert all(before != now for before, now in zip(*versions, strict=True))


def test_a_missing_shard_is_named_before_training_and_replaced_in_it(s3: str, local: Index) -> None:
    index = remote_index(local, "s3://vit/elsewhere")
    with pytest.raises(DataError, match=r"train-000000\.tar is in the index but not there"):
        check_shards(index)
    samples = read_chunk(index, 0)
    assert [sample.reason for sample in samples if isinstance(sample, BadSample)] == [
        "the shard is missing"
    ] * 4


def test_a_wrong_key_is_one_sentence(s3: str, server: int, monkeypatch) -> None:
    assert len(storage.read_range(f"{s3}/index.json", 0, 10)) == 10
    use_s3(monkeypatch, server, AWS_SECRET_ACCESS_KEY="wrong" + SECRET)
    with pytest.raises(StoreError, match=r"access is denied .* AWS_SECRET_ACCESS_KEY"):
        storage.read_range(f"{s3}/index.json", 0, 10)


@pytest.mark.parametrize("url", ["s3://vit/nothing.tar", "s3://nothing/index.json", "{web}/nothing.tar"])
def test_an_object_that_is_missing_is_not_found(s3: str, web: str, url: str) -> None:
    url = url.format(web=web)
    assert storage.sizes([f"{web}/index.json", url])[1] is None
    with pytest.raises(FileNotFoundError):
        storage.read_range(url, 0, 10)


def test_a_range_beyond_the_end_is_empty(s3: str, web: str) -> None:
    for place in (s3, web):
        assert storage.read_range(f"{place}/index.json", 10**9, 10**9 + 5) == b""


def test_what_a_server_forbids_is_one_sentence(web: str) -> None:
    assert storage.sizes([f"{web}/index.json"])[0]
    with pytest.raises(StoreError, match="access is denied"):
        storage.read_range(f"{web}/secret/x.tar", 0, 10)
    with pytest.raises(StoreError, match="access is denied"):
        storage.sizes([f"{web}/secret/x.tar"])


def test_a_server_without_ranges_is_one_sentence(web: str) -> None:
    assert len(storage.read_range(f"{web}/index.json", 0, 10)) == 10
    with pytest.raises(StoreError, match="ignores range requests"):
        storage.read_range(f"{web}/norange/index.json", 0, 10)


def test_a_scheme_that_is_not_allowed_is_refused() -> None:
    with pytest.raises(ConfigError, match="pipe: is not allowed"):
        storage.read_range("pipe:cat /etc/passwd", 0, 10)


@pytest.fixture
def silent(monkeypatch) -> str:
    """A store that does not answer."""
    monkeypatch.setattr(attempts, "ATTEMPTS", 2)
    return "http://127.0.0.1:9"


@pytest.mark.parametrize(
    "read",
    [
        lambda local, url: storage.read_range(url, 0, 10),
        lambda local, url: Index.load(url),
        lambda local, url: build_index([url]),
        lambda local, url: check_shards(remote_index(local, url)),
        lambda local, url: load_exclusions(url, local),
        lambda local, url: open_sources(DataConfig(index=local_path(local), label_map=url)),
        lambda local, url: epoch(remote_index(local, url)),
        lambda local, url: epoch(remote_index(local, url), 2),
    ],
    ids=["range", "index", "shard", "sizes", "exclusions", "label map", "stream", "stream of workers"],
)
def test_a_store_that_does_not_answer_is_no_damage(local: Index, silent: str, read) -> None:
    with pytest.raises(StoreDown, match=r"failed 2 times, the last time with: .*onnect.* the same command"):
        read(local, f"{silent}/x.json")


def local_path(index: Index) -> str:
    return str(Path(index.shards[0].url).with_name("index.json"))


def test_missing_credentials_are_one_sentence(s3: str, monkeypatch, tmp_path: Path) -> None:
    assert storage.read_bytes(f"{s3}/index.json")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    clients.client.cache_clear()
    with pytest.raises(StoreError, match=r"there are no credentials .* AWS_ACCESS_KEY_ID"):
        storage.read_bytes(f"{s3}/index.json")


def test_chunks_of_a_store_are_kept_on_the_node(s3: str, local: Index, tmp_path: Path, monkeypatch) -> None:
    cache = NodeCache(str(tmp_path / "cache"), 10**9)
    index = remote_index(local, s3)
    assert_same_epoch(epoch(index, 2, cache), epoch(local))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nothing is read from the store
    clients.client.cache_clear()
    assert_same_epoch(epoch(index, 2, cache), epoch(local))


def test_a_damaged_cache_is_noticed_and_filled_again(s3: str, local: Index, tmp_path: Path) -> None:
    cache = NodeCache(str(tmp_path), 10**9)
    index = remote_index(local, s3)
    read_chunk(index, 0, cache)
    (cached,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    whole = cached.read_bytes()
    for damaged in (whole[:-1], bytes(len(whole)), b""):
        cached.write_bytes(damaged)
        assert all(isinstance(sample, RawSample) for sample in read_chunk(index, 0, cache))
        assert cached.read_bytes() == whole
