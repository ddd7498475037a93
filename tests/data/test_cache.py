"""The node cache: bounded, the least recently used removed first, and unharmed by kills."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vitscale.data.cache import FOLDER_BYTES, NodeCache


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_it_gives_back_what_was_put_until_it_is_full(tmp_path: Path) -> None:
    cache = NodeCache(str(tmp_path), 10_000)
    for number in range(30):
        cache.put(f"key {number}", bytes([number]) * 1000)
        assert size_of(tmp_path) <= 10_000
    kept = [number for number in range(30) if cache.get(f"key {number}") is not None]
    assert kept == list(range(20, 30))
    assert cache.get("key 25") == bytes([25]) * 1000 and cache.get("key 3") is None


def test_what_is_used_stays(tmp_path: Path) -> None:
    cache = NodeCache(str(tmp_path), 10_000)
    for number in range(30):
        cache.put(f"key {number}", bytes(1000))
        assert cache.get("key 0") is not None, number


def test_a_large_cache_is_divided_into_folders(tmp_path: Path) -> None:
    cache = NodeCache(str(tmp_path), 16 * FOLDER_BYTES)
    for number in range(200):
        cache.put(f"key {number}", b"x")
    assert len(list(tmp_path.iterdir())) == 16
    assert all(cache.get(f"key {number}") == b"x" for number in range(200))


def test_a_disk_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = NodeCache(str(tmp_path / "file"), 10_000)
    cache.put("key", b"data")
    assert cache.get("key") is None


def test_writers_with_one_process_id_do_not_disturb_each_other(tmp_path: Path) -> None:
    """As containers that share a node's disk may have; threads of a process always do."""
    data = bytes(1 << 20)

    def fill(_: int) -> bool:
        cache = NodeCache(str(tmp_path), 1 << 30)
        cache.put("key", data)
        return cache.get("key") == data

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(fill, range(100)))


FILLER = """
import itertools, sys
from vitscale.data.cache import NodeCache
cache = NodeCache(sys.argv[1], 400_000)
for number in itertools.count(1):
    key = f"{number % 97}"
    data = cache.get(key)
    assert data is None or data == key.encode() * 5000, "half a file"
    cache.put(key, key.encode() * 5000)
    if number % 50 == 0:
        print(number, flush=True)
"""


def test_processes_that_share_it_may_be_killed_at_any_time(tmp_path: Path) -> None:
    for _ in range(4):
        command = [sys.executable, "-c", FILLER, str(tmp_path)]
        fillers = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3)]
        for _ in range(5):  # when all have begun, each adds 200 more beside the others
            for filler in fillers:
                assert filler.stdout and filler.stdout.readline(), "a process met half a file"
        for filler in fillers:
            assert filler.poll() is None, "a process met half a file"
            os.kill(filler.pid, signal.SIGKILL)
            filler.wait()
            assert filler.stdout
            filler.stdout.close()
    cache = NodeCache(str(tmp_path), 400_000)
    for number in range(97):
        data = cache.get(str(number))
        assert data is None or data == str(number).encode() * 5000
        cache.put(f"new {number}", bytes(10_000))
    assert size_of(tmp_path) <= 400_000


FULL = """
import sys
from vitscale.data.cache import NodeCache
cache = NodeCache(sys.argv[1], 1 << 30)
for number in range(30):
    cache.put(f"{number}", bytes(100_000))
print(*[number for number in range(30) if cache.get(f"{number}")])
"""


def test_a_full_disk_holds_what_fits_with_the_last_and_nothing_half_written(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    small = f'mount -t tmpfs -o size=1m tmpfs {folder} && "$@" && find {folder} -name "*.tmp-*"'
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", small, "sh", sys.executable, "-c", FULL]
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True)
    (kept,) = done.stdout.splitlines()
    assert len(kept.split()) == 10 and kept.endswith(" 29"), (kept, done.stderr)
