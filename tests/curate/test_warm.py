"""A node's cache is filled before a run starts, as far as it holds."""

from pathlib import Path

import pytest
from data.servers import s3_server, use_s3
from make import write_index

from tools import data
from vitscale import storage
from vitscale.curate.warm import warm_cache
from vitscale.data.cache import NodeCache
from vitscale.data.data_config import DataConfig
from vitscale.data.index import Index
from vitscale.data.reader import read_chunk
from vitscale.data.samples import RawSample
from vitscale.data.sources import open_sources

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


def test_after_it_the_store_is_not_asked(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    index = Index.load("s3://vit/index.json")
    for _ in range(2):  # again, as after a kill
        assert data.main(["warm", str(config)]) == 0
        assert f"{tmp_path}/cache: 100.0% of the run's remote shards" in capsys.readouterr().out
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    storage.client.cache_clear()
    cache = NodeCache(str(tmp_path / "cache"), 10**9)
    samples = [sample for chunk in range(len(index.chunks)) for sample in read_chunk(index, chunk, cache)]
    assert len(samples) == 97 and all(isinstance(sample, RawSample) for sample in samples)


def test_a_small_cache_is_filled_as_far_as_it_holds(config: Path, tmp_path: Path) -> None:
    sources = open_sources(DataConfig(index="s3://vit/index.json"))
    first, *others = (shard.data_bytes for shard in sources[0].index.shards)
    warmed = warm_cache(sources, str(tmp_path / "small"), first)
    assert warmed == (first, first + sum(others), 0)
    files = [path for path in (tmp_path / "small").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) == first
    assert warm_cache(sources, str(tmp_path / "tiny"), first - 1).num_bytes == 0


def test_what_cannot_be_warmed_is_refused(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert data.main(["warm", str(config), "engine.cache_dir="]) == 2
    assert 'engine.cache_dir is ""' in capsys.readouterr().err
    assert data.main(["warm", str(config), f"data.index={tmp_path}/buckets/vit/index.json"]) == 2
    assert "all shards are on local disks" in capsys.readouterr().err
