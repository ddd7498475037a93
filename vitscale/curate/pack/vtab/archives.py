"""The files of a data set as distributed: a folder, a zip, a tar, or a folder of archives.

Members of a zip or an uncompressed tar are read in place, one by one. A compressed tar cannot
be, so a small one is read once and held in memory, and a large one refused.
"""

import dataclasses
import gzip
import io
import lzma
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from vitscale.curate.pack.config import Omission
from vitscale.curate.pack.imagefolder import list_files
from vitscale.curate.pack.listing import FileReference
from vitscale.curate.pack.tar_members import TarPlace, list_members
from vitscale.data.tar import MAX_MEMBER_BYTES, compression, decompress_hint
from vitscale.errors import DataError
from vitscale.stores import storage

MAX_HELD_BYTES = 1 << 30  # of a compressed archive, and of its members, which are held in memory
_MEMBER_BYTES = 2048  # of memory that a member takes besides its content
_ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz")
_ZIP, _EMPTY_ZIP, _LOCAL_HEADER = b"PK\x03\x04", b"PK\x05\x06", struct.Struct("<4s22xHH")


@runtime_checkable
class StoredFile(Protocol):
    """A file on disk, in an archive or in memory; `read` raises Omission if it cannot."""

    @property
    def where(self) -> str: ...
    @property
    def size(self) -> int: ...
    def read(self) -> bytes: ...


@dataclasses.dataclass(frozen=True, slots=True)
class ZipMember:
    """A member of a zip, stored or deflated; its local header is at byte `offset`.

    It is read without the list of members, which takes half a second for 100,000 of them.
    """

    archive: str
    offset: int
    packed_size: int
    size: int
    deflated: bool
    crc: int
    name: str

    @property
    def where(self) -> str:
        return f"{self.name} in {self.archive}"

    def read(self) -> bytes:
        if max(self.size, self.packed_size) > MAX_MEMBER_BYTES:
            raise Omission(f"{self.where}: {self.size:,} bytes; a file may have {MAX_MEMBER_BYTES:,}")
        try:
            header = storage.read_range(self.archive, self.offset, self.offset + _LOCAL_HEADER.size)
            magic, *lengths = _LOCAL_HEADER.unpack(header)
            start = self.offset + _LOCAL_HEADER.size + sum(lengths)
            packed = storage.read_range(self.archive, start, start + self.packed_size)
            data = zlib.decompressobj(-15).decompress(packed, self.size + 1) if self.deflated else packed
        except (OSError, struct.error, zlib.error) as error:
            raise Omission(f"{self.where}: cannot be read ({error})") from None
        if magic != _ZIP or len(data) != self.size or zlib.crc32(data) != self.crc:
            raise Omission(f"{self.where}: is damaged: its bytes do not have the checksum of the archive")
        return data


@dataclasses.dataclass(frozen=True, slots=True)
class HeldFile:
    """A member of a compressed archive, in memory."""

    data: bytes
    where: str

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self) -> bytes:
        return self.data


@dataclasses.dataclass(frozen=True)
class Files:
    """The files of a source by their names, with `/`, relative to it.

    advice: what the task reads, for messages.
    skipped: which archives could not be opened, and why.
    """

    source: str
    advice: str
    by_name: Mapping[str, StoredFile]
    skipped: Sequence[str] = ()

    def prefix(self, name: str) -> str:
        """What precedes `name` (labels/train1.txt) in the source: "dtd/", or "".

        The shortest if there are several. Raises DataError if there is no such file.
        """
        ending = f"/{name}"
        found = [path for path in self.by_name if path == name or path.endswith(ending)]
        if not found:
            reasons = "".join(f"; {reason}" for reason in self.skipped)
            raise DataError(f"{self.source} holds no {name}; {self.advice}{reasons}")
        return min(found, key=lambda path: (len(path), path)).removesuffix(name)

    def read(self, name: str) -> bytes:
        """The file whose path ends in `name`. Raises DataError if it is missing or damaged."""
        try:
            return self.by_name[self.prefix(name) + name].read()
        except Omission as omission:
            raise DataError(f"{omission}; restore it") from None

    def lines(self, name: str) -> list[str]:
        """The lines of a text file, without those that are empty."""
        try:
            text = self.read(name).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{name} in {self.source} is not UTF-8 text ({error}); restore it") from None
        return [line.strip() for line in text.splitlines() if line.strip()]

    def take(self, names: Sequence[str], listed_in: str) -> list[StoredFile]:
        """The files of these names below one folder. Raises DataError if any is missing."""
        prefix = self.prefix(names[0]) if names else ""
        missing = [name for name in names if prefix + name not in self.by_name]
        if missing:
            raise DataError(
                f"{self.source} holds no {prefix}{missing[0]}, which {listed_in} names ({len(missing):,} of "
                f"{len(names):,} are missing); restore them: a published split is whole or nothing"
            )
        return [self.by_name[prefix + name] for name in names]


def open_files(source: str, advice: str, archives: Iterable[str] = ()) -> Files:
    """The files of a folder or archive; of a folder, also those of its `archives`.

    archives: names without their ending: "images" for images.zip, images.tar or images.tar.gz.
    Their members count as if they were unpacked in the folder. Raises DataError for a source
    that cannot be opened.
    """
    if not os.path.isdir(source):
        return Files(source, advice, _open_archive(source, advice))
    paths = {
        os.path.relpath(path, source).replace(os.sep, "/"): (path, size) for path, size in list_files(source)
    }
    files: dict[str, StoredFile] = {}
    skipped = []
    for archive in (f"{stem}{ending}" for stem in archives for ending in _ENDINGS):
        if archive in paths:
            try:
                files.update(_open_archive(paths[archive][0], advice))
            except DataError as error:
                skipped.append(str(error))
    files.update({name: FileReference(path, 0, size, name, ()) for name, (path, size) in paths.items()})
    return Files(source, advice, files, skipped)


def open_held(member: StoredFile, source: str, advice: str) -> Files:
    """The members of a compressed tar that is itself a member of an archive."""
    return Files(source, advice, _hold(io.BytesIO(member.read()), member.where))


def _open_archive(path: str, advice: str) -> dict[str, StoredFile]:
    try:
        head = storage.read_range(path, 0, 8)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or error}); check the path: {advice}"
        ) from None
    if head.startswith((_ZIP, _EMPTY_ZIP)):
        return _zip_members(path)
    if program := compression(head):
        if os.path.getsize(path) > MAX_HELD_BYTES or program == "zstd":
            raise DataError(f"{path} {decompress_hint(path, program)}, or unpack it and name the folder")
        with open(path, "rb") as file:
            return _hold(file, path)
    members = list_members(TarPlace(path, 0, path))
    if members.damage:
        raise DataError(f"{path} {members.damage}; {advice}")
    return {
        name.removeprefix("./"): FileReference(path, offset, size, name, ())
        for name, offset, size in members.files
    }


def _zip_members(path: str) -> dict[str, StoredFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir()]
    except (OSError, zipfile.BadZipFile, ValueError, struct.error) as error:
        raise DataError(f"{path} is no whole zip archive ({error}); download it again") from None
    for info in infos:
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(
                f"{info.filename} in {path} is encrypted or packed by method {info.compress_type}; only "
                "stored and deflated members are read: unpack the archive and name the folder"
            )
    return {
        info.filename: ZipMember(
            path,
            info.header_offset,
            info.compress_size,
            info.file_size,
            info.compress_type == zipfile.ZIP_DEFLATED,
            info.CRC,
            info.filename,
        )
        for info in infos
    }


def _hold(file: io.BufferedIOBase, path: str) -> dict[str, StoredFile]:
    """Read a compressed tar once, whole."""
    held: dict[str, StoredFile] = {}
    num_bytes = 0
    try:
        with tarfile.open(fileobj=file, mode="r|*") as archive:
            for member in archive:
                num_bytes += member.size + _MEMBER_BYTES
                if num_bytes > MAX_HELD_BYTES:
                    raise DataError(
                        f"{path} holds more than {MAX_HELD_BYTES:,} bytes; unpack it and name the folder"
                    )
                content = archive.extractfile(member) if member.isfile() else None
                if content:
                    held[member.name.removeprefix("./")] = HeldFile(
                        content.read(), f"{member.name} in {path}"
                    )
    except (OSError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is cut or damaged ({error}); download it again") from None
    return held
