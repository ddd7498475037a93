"""Hostfiles: read as deepspeed does, or refused with the line; and which hosts fit a run."""

from pathlib import Path

import pytest

from vitscale.cluster import hostfile
from vitscale.errors import ConfigError


def test_hosts_keep_their_order() -> None:
    text = "# ours\nnode2 slots=8\n\n  node1   slots=4  # half of it\n"
    assert list(hostfile.parse(text, "h").items()) == [("node2", 8), ("node1", 4)]
    assert hostfile.parse(hostfile.text_of({"a": 1, "b": 2}), "h") == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("node1 slots=8\nnode2\n", "hostfile h, line 2: 'node2' is not of the form `NAME slots=NUMBER`"),
        ("node1 slots=0\n", "line 1: 'node1 slots=0' is not of the form"),
        (f"node1 slots={'8' * 5000}\n", "is not of the form"),
        ("node1 slots=8\nnode1 slots=8\n", "line 2: node1 is there twice"),
        ("# nothing\n", "hostfile h names no host"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        hostfile.parse(text, "hostfile h")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"hostfile .*/none cannot be read: No such file"):
        hostfile.load(tmp_path / "none")


@pytest.mark.parametrize(
    ("slots", "worlds", "usable"),
    [
        ({"a": 8, "b": 8, "c": 8, "d": 8}, [8, 16, 32], "abcd"),
        ({"a": 8, "c": 8, "d": 8}, [8, 16, 32], "ac"),
        ({"b": 1}, [1, 2], "b"),
        ({"a": 3, "b": 3}, [1, 2, 4], ""),
    ],
)
def test_the_most_hosts_that_can_share_the_work(
    slots: dict[str, int], worlds: list[int], usable: str
) -> None:
    assert "".join(hostfile.most_usable(slots, worlds)) == usable
