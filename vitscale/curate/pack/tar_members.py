"""Lists the members of a tar archive by its headers alone: the data between them is not read.

A tar inside a tar is listed at its offset in the outer file, so nothing needs unpacking. Damage
is reported, never taken for the end.
"""

import dataclasses
import os
import tarfile
from collections.abc import Iterator

from vitscale.data.tar import BLOCK


@dataclasses.dataclass(frozen=True, slots=True)
class TarPlace:
    """A tar archive: it begins at byte `offset` of the file `path`."""

    path: str
    offset: int
    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class TarMembers:
    """The regular files of an archive as (name, offset, size).

    The offset is that of the data in the outermost file.
    damage: what is wrong with the archive; "" if nothing is.
    """

    files: list[tuple[str, int, int]]
    damage: str


def list_members(place: TarPlace) -> TarMembers:
    """Read the headers of an uncompressed archive; damage ends the list and is reported."""
    files: list[tuple[str, int, int]] = []
    try:
        # The buffer takes a header, and the byte before it that tarfile reads.
        with open(place.path, "rb", buffering=2 * BLOCK) as file:
            if hasattr(os, "posix_fadvise"):  # or readahead would fetch the data between headers
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            file.seek(place.offset)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                length = os.fstat(file.fileno()).st_size
                for member in _headers(archive):
                    if not 0 <= member.size <= length - member.offset_data <= length:
                        return TarMembers(
                            files, f"is damaged at byte {member.offset:,}; what follows is lost"
                        )
                    if member.isfile():
                        files.append((member.name, member.offset_data, member.size))
            # tarfile stops without an error at any broken header; only the end mark is an end.
            file.seek(archive.offset)
            if file.read(BLOCK) != bytes(BLOCK):
                return TarMembers(files, f"is damaged at byte {archive.offset:,}; what follows is lost")
    except (tarfile.TarError, ValueError, OverflowError) as error:  # the last two: absurd sizes
        return TarMembers(files, f"is damaged or not an uncompressed tar archive ({error})")
    except OSError as error:
        return TarMembers(files, f"cannot be read ({error.strerror or error})")
    return TarMembers(files, "")


def _headers(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := archive.next()) is not None:
        # tarfile keeps every member: gigabytes for millions of them.
        archive.members = []  # pyright: ignore[reportAttributeAccessIssue] (not in the stubs)
        yield member
