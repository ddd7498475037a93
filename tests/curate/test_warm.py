"""A node's cache is filled before a run starts, as far as it holds."""

from pathlib import Path

import pytest
from data.servers import s3_server, use_s3
from make import write_index

from tools import data
from vitscale.curate.warm import warm_cache
from vitscale.data import cache
from vitscale.data.cache import NodeCache
from vitscale.data.data_config import DataConfig
from vitscale.data.index import Index
from vitscale.data.reader import read_chunk
from vitscale.data.samples import RawSample
from vitscale.data.sources import open_sources
from vitscale.stores import clients

CONFIG = """
run_dir = "run"
global_batch = 8
total_steps = 3
[model]
variant = "Ti/8"
image_size = 16
num_classes = 5
[data]
index = "s3://vit/index.json"
[engine]
cache_dir = "{cache}"
cache_gb = 1.0
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A run's config whose shards are on an S3 server."""
    write_index(tmp_path / "buckets" / "vit", [40, 37, 20])
    path = tmp_path / "run.toml"
    path.write_text(CONFIG.format(cache=tmp_path / "cache"))
    with s3_server(tmp_path / "buckets") as port:
        use_s3(monkeypatch, port)
        yield path


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_after_it_the_store_is_not_asked(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    index = Index.load("s3://vit/index.json")
    for _ in range(2):  # again, as after a kill
        assert data.main(["warm", str(config)]) == 0
        assert f"{tmp_path}/cache: 100.0% of the run's remote shards" in capsys.readouterr().out
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    clients.client.cache_clear()
    filled = NodeCache(str(tmp_path / "cache"), 10**9)
    samples = [sample for chunk in range(len(index.chunks)) for sample in read_chunk(index, chunk, filled)]
    assert len(samples) == 97 and all(isinstance(sample, RawSample) for sample in samples)


def test_a_small_cache_is_filled_as_far_as_it_holds(config: Path, tmp_path: Path) -> None:
    sources = open_sources(DataConfig(index="s3://vit/index.json"))
    first, *others = (shard.data_bytes for shard in sources[0].index.shards)
    warmed = warm_cache(sources, str(tmp_path / "small"), first)
    assert warmed == (first, first, first + sum(others), 0)
    assert size_of(tmp_path / "small") == first
    assert warm_cache(sources, str(tmp_path / "tiny"), first - 1).num_bytes == 0


def test_only_what_is_in_the_cache_afterwards_is_reported(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The limit is divided among folders, and their shares of the chunks differ."""
    num_bytes = sum(shard.data_bytes for shard in Index.load("s3://vit/index.json").shards)
    monkeypatch.setattr(cache, "FOLDER_BYTES", num_bytes // 4)
    assert data.main(["warm", str(config), f"engine.cache_gb={num_bytes / 1e9}"]) == 0
    held, printed = size_of(tmp_path / "cache"), capsys.readouterr()
    assert 0 < held < num_bytes
    assert f"{held / num_bytes:.1%} of the run's remote shards, {held:,} of {num_bytes:,}" in printed.out
    assert f"{num_bytes - held:,} bytes that should be there are not" in printed.err


def test_what_cannot_be_warmed_is_refused(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert data.main(["warm", str(config), "engine.cache_dir="]) == 2
    assert 'engine.cache_dir is ""' in capsys.readouterr().err
    assert data.main(["warm", str(config), f"data.index={tmp_path}/buckets/vit/index.json"]) == 2
    assert "all shards are on local disks" in capsys.readouterr().err
    (tmp_path / "file").write_text("in the way")
    assert data.main(["warm", str(config), f"engine.cache_dir={tmp_path}/file"]) == 2
    assert f"{tmp_path}/file cannot be written (File exists)" in capsys.readouterr().err
