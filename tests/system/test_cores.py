"""Limits of CPU time, as the kernel's files say them."""

from pathlib import Path

import pytest

from vitscale.system.cores import quotas


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, []),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, [2]),
        ("0::/pod/a\n", {"pod/a/cpu.max": "max 100000\n", "pod/cpu.max": "400000 100000\n"}, [4]),
        ("0::/of/the/host\n", {"cpu.max": "50000 100000\n"}, [1]),
        (
            "4:cpu,cpuacct:/a\n3:cpuset:/b\n0::/\n",
            {"cpu/a/cpu.cfs_quota_us": "300000\n", "cpu/a/cpu.cfs_period_us": "100000\n"},
            [3],
        ),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, []),
        ("", {}, []),
    ],
)
def test_quotas_are_those_of_all_groups_that_this_process_is_in(
    tmp_path: Path, membership: str, files: dict[str, str], expected: list[int]
) -> None:
    (tmp_path / "cgroup").write_text(membership)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert list(quotas(tmp_path / "cgroup", tmp_path)) == expected
    assert list(quotas(tmp_path / "none", tmp_path)) == []
