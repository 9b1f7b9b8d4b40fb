"""Spoiling files, by their structure where they have one, else by their bytes.

Every function draws from a seeded ``random.Random``.
"""

import struct
import tarfile
import zlib
from random import Random

import pyarrow as pa

from benchmarks.fuzz.structures import HUGE, NUMBERS, STRUCTURES, as_json


def spoil(random: Random, name: str, data: bytes, others: list[bytes]) -> bytes:
    """``data`` of the file ``name`` changed one to three times, mostly by its structure."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        structure = STRUCTURES.get(name.rpartition(".")[2], as_json if data[:1] in (b"{", b"[") else None)
        if structure is None or random.random() < 0.4:
            data = _as_bytes(random, data, others)
            continue
        try:
            data = structure(random, data)
        except (
            ValueError,
            KeyError,
            IndexError,
            OverflowError,
            struct.error,
            pa.ArrowException,
            tarfile.TarError,
            OSError,
            zlib.error,
            EOFError,
            RecursionError,
            AttributeError,
            TypeError,
        ):
            data = _as_bytes(random, data, others)  # spoiled before: its structure is gone
    return data


def _as_bytes(random: Random, data: bytes, others: list[bytes]) -> bytes:
    if not data:
        return random.randbytes(8)
    at = random.randrange(len(data))
    span = min(random.choice((1, 2, 4, 8, 64, 512, 1024)), len(data))
    way = random.randrange(9)
    if way == 0:
        return data[:at] + bytes([data[at] ^ (1 << random.randrange(8))]) + data[at + 1 :]
    if way == 1:
        return data[:at]
    if way == 2:
        return data[:at] + random.randbytes(span) + data[at + span :]
    if way == 3:
        return data[: at + span] + data[at:]
    if way == 4:
        return data[:at] + data[at + span :]
    if way == 5:
        other = random.choice(others)
        start = random.randrange(len(other) + 1)
        return data[:at] + other[start : start + random.choice((8, 512, len(other)))] + data[at + span :]
    if way == 6:
        size = random.choice((1, 2, 4, 8))
        number = (random.choice(NUMBERS + HUGE) % (1 << 8 * size)).to_bytes(size, random.choice(("little", "big")))
        return data[:at] + number + data[at + size :]
    if way == 7:
        return data + random.choice((b"\0" * 1024, data, random.randbytes(16)))
    return data[:at] + bytes(span) + data[at + span :]
