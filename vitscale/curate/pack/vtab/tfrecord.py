"""Reads TFRecord files of tf.train.Example without TensorFlow.

A record is its length (8 bytes), the masked CRC32C of these, the data, and the masked CRC32C of
the data (tensorflow/core/lib/io/record_writer.h). The data are a protocol buffer.
"""

import functools
import io
import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt32

from vitscale.errors import DataError

MAX_RECORD_BYTES = 64 << 20
_HEADER, _CRC = struct.Struct("<QI"), struct.Struct("<I")
_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5  # wire types of protocol buffers
_BLOCK = 4096  # bytes of a CRC that are looked up at once


class Record(NamedTuple):
    """The data of a record, and where they begin in the file."""

    offset: int
    data: bytes


def read_records(file: io.BufferedIOBase, size: int, where: str) -> Iterator[Record]:
    """Every record in the next `size` bytes of a file. Raises DataError for a damaged one."""
    at = 0
    while at < size:
        head = file.read(_HEADER.size)
        if len(head) < _HEADER.size or at + _HEADER.size > size:
            raise DataError(f"{where} is cut at byte {at:,}; download it again")
        length, crc = _HEADER.unpack(head)
        if masked_crc32c(head[:8]) != crc or length > MAX_RECORD_BYTES:
            raise DataError(
                f"{where} is damaged or no TFRecord file: the length at byte {at:,} does not have its "
                "checksum; download it again"
            )
        data, end = file.read(length), file.read(_CRC.size)
        first, at = at + _HEADER.size, at + _HEADER.size + length + _CRC.size
        if len(end) < _CRC.size or at > size:
            raise DataError(f"{where} is cut in the record at byte {first:,}; download it again")
        if masked_crc32c(data) != _CRC.unpack(end)[0]:
            raise DataError(
                f"{where} is damaged: the record at byte {first:,} does not have its checksum; "
                "download it again"
            )
        yield Record(first, data)


def parse_example(data: bytes) -> dict[str, list[bytes] | list[int]]:
    """The features of a tf.train.Example that are bytes or integers.

    Raises ValueError for what is no such message.
    """
    features = {}
    for outer in _messages(data, 1):
        for entry in _messages(outer, 1):
            names, values = list(_messages(entry, 1)), list(_messages(entry, 2))
            if len(names) != 1 or len(values) != 1:
                raise ValueError("a feature without one name and one value")
            name = names[0].decode()
            for kind, value in _fields(values[0]):
                if kind == 1 and isinstance(value, bytes):
                    features[name] = list(_messages(value, 1))
                elif kind == 3 and isinstance(value, bytes):
                    features[name] = list(_integers(value))
    return features


def masked_crc32c(data: bytes) -> int:
    """The CRC32C, rotated and offset, because it is stored beside what it was computed of."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(data: bytes) -> int:
    """Castagnoli's CRC (RFC 3720), by what each byte adds at each distance to the end.

    A block of n bytes maps the state s to the XOR of table[n - 1 - i, byte i], once the bytes
    of s are XORed with the first four. That is one lookup of numpy per block.
    """
    table, state = _table(), 0xFFFFFFFF
    for first in range(0, len(data), _BLOCK):
        block = np.frombuffer(data, np.uint8, min(_BLOCK, len(data) - first), first).copy()
        count = min(4, len(block))
        block[:count] ^= np.frombuffer(struct.pack("<I", state), np.uint8)[:count]
        added = table[np.arange(len(block) - 1, -1, -1), block]
        state = int(np.bitwise_xor.reduce(added)) ^ state >> 8 * count
    return state ^ 0xFFFFFFFF


@functools.cache
def _table() -> UInt32[np.ndarray, "4096 256"]:
    """Row d: the CRC state that a byte leaves after d more zero bytes."""
    row = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        row = row >> 1 ^ (row & 1) * np.uint32(0x82F63B78)
    rows, by_byte = [row], row
    while len(rows) < _BLOCK:
        row = row >> 8 ^ by_byte[row & 0xFF]
        rows.append(row)
    return np.stack(rows)


def _messages(data: bytes, number: int) -> Iterator[bytes]:
    """The fields of that number, which are bytes: messages, texts or byte strings."""
    return (value for found, value in _fields(data) if found == number and isinstance(value, bytes))


def _integers(data: bytes) -> Iterator[int]:
    """An Int64List, packed or not."""
    for number, value in _fields(data):
        if number == 1 and isinstance(value, int):
            yield _signed(value)
        elif number == 1 and isinstance(value, bytes):
            at = 0
            while at < len(value):
                integer, at = _varint(value, at)
                yield _signed(integer)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a message. Raises ValueError if it is malformed."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == _DELIMITED:
            length, at = _varint(data, at)
        elif wire in (_FIXED64, _FIXED32):
            length = 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"a field of the wire type {wire}")
        if length > len(data) - at:
            raise ValueError("a field that is longer than its message")
        yield number, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """An integer of 7 bits a byte, and where the next field begins."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("a message that is cut")
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return value, at
    raise ValueError("an integer of over 10 bytes")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
