"""A bucket on real servers, and its shards on the local disk."""

from pathlib import Path

import pytest
from data.servers import http_server, s3_server, use_s3
from make import write_index

from vitscale.data.index import Index
from vitscale.stores import attempts


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


@pytest.fixture
def impatient(monkeypatch) -> None:
    """Shorter waits, so that a test does not wait long for a store that never answers."""
    monkeypatch.setattr(attempts, "FIRST_DELAY_SECONDS", 0.01)
    monkeypatch.setattr(attempts, "LONGEST_DELAY_SECONDS", 0.1)
