"""Hostfiles, as deepspeed and MPI read them: `node1 slots=8`, a line for each host."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from vitscale.errors import ConfigError

_LINE = re.compile(r"(\S+)\s+slots=([1-9]\d{0,5})\s*(#.*)?")


def parse(text: str, where: str) -> dict[str, int]:
    """The processes of each host, in the order of the lines.

    Raises ConfigError naming `where`.
    """
    slots: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if not match:
            raise ConfigError(
                f"{where}, line {number}: {line!r} is not of the form `NAME slots=NUMBER`, like "
                "`node1 slots=8`; write one line for each host"
            )
        if match[1] in slots:
            raise ConfigError(
                f"{where}, line {number}: {match[1]} is there twice; keep one line, with all slots"
            )
        slots[match[1]] = int(match[2])
    if not slots:
        raise ConfigError(f"{where} names no host; write a line for each, like `node1 slots=8`")
    return slots


def load(path: str | Path) -> dict[str, int]:
    """The processes of each host of a file. Raises ConfigError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(
            f"hostfile {path} cannot be read: {why}; name a file with lines like `node1 slots=8`"
        ) from None
    return parse(text, f"hostfile {path}")


def text_of(slots: Mapping[str, int]) -> str:
    return "".join(f"{host} slots={number}\n" for host, number in slots.items())


def most_usable(slots: Mapping[str, int], worlds: Sequence[int]) -> dict[str, int]:
    """The most hosts, in order from the first, whose processes can share the run's work.

    worlds: the numbers of processes that can. For example, of four hosts with 8 slots each:

        worlds 1, 2, 4, 8, 16, 32    all four
        three of them alive          the first two: 24 is no divisor
    """
    hosts = list(slots)
    for count in range(len(hosts), 0, -1):
        if sum(slots[host] for host in hosts[:count]) in worlds:
            return {host: slots[host] for host in hosts[:count]}
    return {}
