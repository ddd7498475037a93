"""Writes pictures, archives and records in the formats in which data sets are distributed."""

import gzip
import io
import struct
import tarfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from PIL import Image
from scipy.io import savemat
from tensorboard.summary.writer.record_writer import RecordWriter


def picture(label: int, number: int, height: int = 24, width: int = 24) -> np.ndarray:
    """uint8 [height width 3]: the colour of the label with noise."""
    colour = np.random.default_rng(label).integers(0, 256, 3)
    noise = np.random.default_rng(1000 + number).integers(-20, 21, (height, width, 3))
    return (colour + noise).clip(0, 255).astype(np.uint8)


def encoded(pixels: np.ndarray, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def tar_bytes(files: Mapping[str, bytes], mode: str = "w:gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def write_zip(path: Path, files: Mapping[str, bytes]) -> Path:
    """Images are stored and texts deflated, as in most published archives."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            method = zipfile.ZIP_STORED if name.endswith((".jpg", ".png")) else zipfile.ZIP_DEFLATED
            archive.writestr(name, content, method)
    return path


def write_mat(path: Path, **variables: np.ndarray) -> None:
    savemat(path, variables, do_compression=True)  # as most published files are


def write_norb(path: Path, values: np.ndarray) -> None:
    magic = {np.dtype(np.uint8): 507333717, np.dtype("<i4"): 507333716}[values.dtype]
    sizes = [*values.shape, 1, 1][: max(3, values.ndim)]
    head = struct.pack(f"<{2 + len(sizes)}i", magic, values.ndim, *sizes)
    path.write_bytes(gzip.compress(head + values.tobytes()))


def write_records(path: Path, records: Iterable[bytes]) -> None:
    with open(path, "wb") as file:
        writer = RecordWriter(file)
        for record in records:
            writer.write(record)


def example_bytes(features: Mapping[str, bytes | int]) -> bytes:
    """A tf.train.Example as protobuf writes it."""
    example = _example_class()()
    for name, value in features.items():
        feature = example.features.feature[name]
        (feature.bytes_list if isinstance(value, bytes) else feature.int64_list).value.append(value)
    return example.SerializeToString()


def _example_class() -> type:
    """tf.train.Example, from its definition in tensorflow/core/example."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")

    def message(name: str, *fields: tuple[str, int, int, int, str]) -> descriptor_pb2.DescriptorProto:
        added = file.message_type.add(name=name)
        for label, number, repeated, kind, type_name in fields:
            added.field.add(name=label, number=number, label=repeated, type=kind, type_name=type_name or None)
        return added

    one, many = field.LABEL_OPTIONAL, field.LABEL_REPEATED
    message("BytesList", ("value", 1, many, field.TYPE_BYTES, ""))
    message("FloatList", ("value", 1, many, field.TYPE_FLOAT, ""))
    message("Int64List", ("value", 1, many, field.TYPE_INT64, ""))
    kinds = [
        (f"{kind.lower()}_list", number, f".t.{kind}List")
        for number, kind in enumerate(("Bytes", "Float", "Int64"), 1)
    ]
    message("Feature", *((label, number, one, field.TYPE_MESSAGE, name) for label, number, name in kinds))
    features = message("Features", ("feature", 1, many, field.TYPE_MESSAGE, ".t.Features.FeatureEntry"))
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, label=one, type=field.TYPE_STRING)
    entry.field.add(name="value", number=2, label=one, type=field.TYPE_MESSAGE, type_name=".t.Feature")
    message("Example", ("features", 1, one, field.TYPE_MESSAGE, ".t.Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))
