"""DMLab: frames of a game in TFRecord files."""

import dataclasses
import re

from vitscale.curate.pack.config import Omission, PackConfig
from vitscale.curate.pack.listing import FileReference, Listing
from vitscale.curate.pack.vtab.archives import open_files
from vitscale.curate.pack.vtab.examples import Examples, held, make_listing
from vitscale.curate.pack.vtab.tfrecord import parse_example, read_records
from vitscale.errors import DataError
from vitscale.stores import storage
from vitscale.vtab.tasks import TASKS

_ADVICE = (
    "vtab/dmlab reads the folder that dmlab.tar.gz unpacks to, or that archive as a .tar: "
    "dmlab-train.tfrecord and so on"
)


@dataclasses.dataclass(frozen=True, slots=True)
class RecordImage:
    """The image of the record whose data are the bytes [offset, offset + size) of a file."""

    path: str
    offset: int
    size: int
    key: bytes

    @property
    def where(self) -> str:
        return f"{self.key.decode(errors='replace')} in {self.path}"

    def read(self) -> bytes:
        try:
            data = storage.read_range(self.path, self.offset, self.offset + self.size)
            return parse_record(data)[2]
        except (OSError, ValueError) as error:
            raise Omission(f"{self.where}: cannot be read ({error})") from None


def list_dmlab(source: str, config: PackConfig) -> Listing:
    """dmlab-{train,validation,test}.tfrecord*; the key is the record's own file name, in bytes.

    Every record is read once, for its key and label; the images are read when they are packed.
    """
    files = open_files(source, _ADVICE, ("dmlab",))
    splits = {}
    for split in TASKS["dmlab"].sizes:
        pattern = re.compile(rf"(?:.*/)?dmlab-{split}\.tfrecord[^/]*")
        names = sorted(name for name in files.by_name if pattern.fullmatch(name))
        if not names:
            files.prefix(f"dmlab-{split}.tfrecord")
        images, labels = list[RecordImage](), list[int]()
        for name in names:
            file = files.by_name[name]
            if not isinstance(file, FileReference):
                raise DataError(f"{file.where} is in a compressed archive; {_ADVICE}")
            for image, label in _list_file(file):
                images.append(image)
                labels.append(label)
        keys = [image.key for image in images]
        splits[split] = Examples(keys=keys, labels=labels, images=held(images))
    return make_listing(TASKS["dmlab"], source, splits)


def parse_record(data: bytes) -> tuple[bytes, int, bytes]:
    """Key, label and image of a record. Raises ValueError for a record of something else."""
    features = parse_example(data)
    match [features.get(name) for name in ("filename", "label", "image")]:
        case [[bytes(key)], [int(label)], [bytes(image)]]:
            return key, label, image
    raise ValueError("it has not one filename, label and image")


def _list_file(file: FileReference) -> list[tuple[RecordImage, int]]:
    listed = []
    with open(file.path, "rb") as stream:
        stream.seek(file.offset)
        for offset, data in read_records(stream, file.size, file.where):
            try:
                key, label, _ = parse_record(data)
            except ValueError as error:
                raise DataError(
                    f"{file.where}: the record at byte {offset:,} is none of DMLab's ({error}); "
                    "download it again"
                ) from None
            listed.append((RecordImage(file.path, file.offset + offset, len(data), key), label))
    return listed
