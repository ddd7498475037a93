"""A tar walker that never takes damage for the end of the data.

Python's tarfile, and so webdataset, ends an archive silently at a broken header. Here every
header's checksum is verified, every member must be whole, and an archive must end with its end
mark (a range of one, after its last byte).
"""

import re
import shlex
import zlib
from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

BLOCK = 512
MAX_MEMBER_BYTES = 256 << 20  # images are far smaller; a corrupt size must not fill the memory
Bytes = bytes | memoryview
_ZERO = bytes(BLOCK)
# The first bytes of compressed files, and the program that undoes each.
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_REGULAR, _SKIPPED = (b"0", b"\0"), (b"5", b"g")


@runtime_checkable
class Readable(Protocol):
    """A stream of bytes: a file, a BytesIO, or anything that reads like them."""

    def read(self, size: int = -1, /) -> "Bytes": ...


class Slices:
    """Bytes in memory as a stream that copies nothing: what is read is a view of them."""

    def __init__(self, data: bytes) -> None:
        self._view, self._at = memoryview(data), 0

    def read(self, size: int = -1, /) -> memoryview:
        end = len(self._view) if size < 0 else self._at + size
        part = self._view[self._at : end]
        self._at += len(part)
        return part


class TarDamage(ValueError):
    """The archive is damaged at byte `offset`; `what` says how."""

    def __init__(self, offset: int, what: str) -> None:
        super().__init__(f"byte {offset:,}: {what}")
        self.offset = offset
        self.whole_until = offset  # where the last whole sample before the damage ends


class Member(NamedTuple):
    """One regular file. offset: where its first header begins, a long-name header included."""

    name: str
    offset: int
    data: Bytes


def compression(head: bytes) -> str:
    """The program that compressed a file with these first bytes; "" if none did."""
    return next((program for magic, program in _COMPRESSED.items() if head.startswith(magic)), "")


def decompress_hint(path: str, program: str) -> str:
    """Why a compressed shard is refused, and the command that fixes it."""
    plain = re.sub(r"\.tgz$|\.tar\.\w+$|\.tar$", "", path)
    plain = f"{plain}.plain.tar" if path.endswith(".tar") else f"{plain}.tar"
    return (
        f"is compressed with {program}, so that no part of it can be read alone; "
        f"decompress it: {program} -dc {shlex.quote(path)} > {shlex.quote(plain)}"
    )


def walk(stream: Readable, offset: int = 0, *, whole: bool) -> Iterator[Member]:
    """The regular files of a tar stream that begins at byte `offset` of its archive, in order.

    whole: the stream is a whole archive and must end with its end mark; otherwise it is a range
    of members and ends after the last of them. Raises TarDamage where the bytes are not what
    tar prescribes, after all members before that place.
    """
    first, long_name = offset, ""
    while True:
        header = bytes(stream.read(BLOCK))
        if not header and not whole:
            return
        if header == _ZERO and whole:
            return
        name, size, kind = _parse_header(header, offset)
        data = _read_data(stream, size, offset, name)
        end = offset + BLOCK + -(-size // BLOCK) * BLOCK
        if kind in _REGULAR:
            yield Member(long_name or name, first, data)
            first, long_name = end, ""
        elif kind in (b"L", b"x"):
            long_name = _long_name(kind, data) or long_name
        elif kind in _SKIPPED:
            first, long_name = end, ""
        else:
            raise TarDamage(offset, f"{name}: a member of type {kind!r}; a shard holds regular files only")
        offset = end


def _parse_header(header: bytes, offset: int) -> tuple[str, int, bytes]:
    if not header:
        raise TarDamage(offset, "the archive ends without its end mark: it was cut between two files")
    if len(header) < BLOCK:
        raise TarDamage(offset, "the archive ends inside a header: it was cut")
    try:
        expected = _parse_number(header[148:156])
        size = _parse_number(header[124:136])
    except ValueError:
        raise TarDamage(offset, "a header that is not a tar header") from None
    # Adler-32's lower half is 1 + the sum of the bytes, modulo 65,521: 15 times as fast as
    # sum(). The checksum's own field counts as spaces.
    total = (zlib.adler32(header) & 0xFFFF) - 1 - sum(header[148:156]) + 8 * ord(" ")
    if (total - expected) % 65521:
        raise TarDamage(offset, "a header whose checksum is wrong")
    if not 0 <= size <= MAX_MEMBER_BYTES:
        raise TarDamage(offset, f"a member of {size:,} bytes; at most {MAX_MEMBER_BYTES:,} are allowed")
    name = _text(header[:100])
    if header[345] and header[257:263] == b"ustar\0":  # a long path's folders are in a second field
        name = f"{_text(header[345:500])}/{name}"
    return name, size, header[156:157]


def _parse_number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU base-256
        return int.from_bytes(field[1:], "big")
    return int(field.partition(b"\0")[0], 8)


def _read_data(stream: Readable, size: int, offset: int, name: str) -> Bytes:
    padded = -(-size // BLOCK) * BLOCK
    data = stream.read(padded)
    if len(data) < padded:
        raise TarDamage(offset, f"{name}: the archive ends inside this file: it was cut")
    return data[:size]


def _long_name(kind: bytes, data: Bytes) -> str:
    """The name in a GNU long-name (L) or pax (x) header; "" if a pax header has none."""
    if kind == b"L":
        return _text(bytes(data))
    for record in bytes(data).split(b"\n"):  # "LENGTH path=NAME"
        key, _, value = record.partition(b" ")[2].partition(b"=")
        if key == b"path":
            return value.decode("utf-8", "replace")
    return ""


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "replace")
