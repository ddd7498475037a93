"""Lists the members of a tar archive by its headers alone: the data between them is not read.

A tar inside a tar is listed at its offset in the outer file, so nothing needs unpacking. Damage
is reported, never taken for the end.
"""

import dataclasses
import os
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from vitscale.curate.pack.listing import WHOLE
from vitscale.data.tar import BLOCK


@dataclasses.dataclass(frozen=True, slots=True)
class TarPlace:
    """A tar archive: it begins at byte `offset` of the file `path`, and has `size` bytes.

    size: WHOLE for all that the file has from there on.
    """

    path: str
    offset: int
    name: str
    size: int = WHOLE


@dataclasses.dataclass(frozen=True, slots=True)
class TarMembers:
    """The regular files of an archive as (name, offset, size).

    The offset is that of the data in the outermost file.
    damage: what is wrong with the archive; "" if nothing is.
    others: a sentence for what is not read: each member that is neither a regular file nor a
    folder, like a link, and data after the end of the archive.
    """

    files: list[tuple[str, int, int]]
    damage: str = ""
    others: list[str] = dataclasses.field(default_factory=list)


def list_members(place: TarPlace) -> TarMembers:
    """Read the headers of an uncompressed archive; damage ends the list and is reported."""
    members = TarMembers([])
    try:
        # The buffer takes a header, and the byte before it that tarfile reads.
        with open(place.path, "rb", buffering=2 * BLOCK) as file:
            if hasattr(os, "posix_fadvise"):  # or readahead would fetch the data between headers
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            damage = _list(file, place, members)
    except (tarfile.TarError, ValueError, OverflowError) as error:  # the last two: absurd sizes
        damage = f"is damaged or not an uncompressed tar archive ({error})"
    except OSError as error:
        damage = f"cannot be read ({error.strerror or error})"
    return dataclasses.replace(members, damage=damage)


def _list(file: BinaryIO, place: TarPlace, members: TarMembers) -> str:
    """Add the members of an archive up to its damage, which is returned; "" for none."""
    length = os.fstat(file.fileno()).st_size
    end = length if place.size == WHOLE else place.offset + place.size
    file.seek(place.offset)
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in _headers(archive):
            if not 0 <= member.size <= length - member.offset_data <= length:
                return f"is damaged at byte {member.offset:,}; what follows is lost"
            if member.isfile() and not member.issparse():
                members.files.append((member.name, member.offset_data, member.size))
            elif not member.isdir():
                kind = f"a link to {member.linkname}" if member.linkname else "a special file"
                members.others.append(f"{member.name} in {place.path}: {kind}; only regular files are read")
    # tarfile stops without an error at any broken header; only the end mark is an end.
    file.seek(archive.offset)
    if file.read(BLOCK) != bytes(BLOCK):
        return f"is damaged at byte {archive.offset:,}; what follows is lost"
    while rest := file.read(max(0, min(1 << 20, end - file.tell()))):
        if any(rest):  # another archive that was appended, for example
            where = f"{place.name} in {place.path}" if place.name != place.path else place.path
            members.others.append(f"{where}: data after the end at byte {archive.offset:,} are not read")
            break
    return ""


def _headers(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := archive.next()) is not None:
        # tarfile keeps every member: gigabytes for millions of them.
        archive.members = []  # pyright: ignore[reportAttributeAccessIssue] (not in the stubs)
        yield member
