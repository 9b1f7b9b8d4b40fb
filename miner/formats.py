"""What other people's loaders read: one function a format, each fed with blocks of images in rank order.

No name of a file comes out of the manifest but a uid, which is 32 hex characters, and the number of a tar.
"""

import io
import json
import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from miner.blocks import Block
from miner.errors import MinerError, disk_full
from miner.files import Place, atomic, file_size, sha256
from miner.images import decode
from miner.rehydrate import raw_uids
from miner.run_dir import write_file
from miner.subset import OUTLIER, write_sample
from miner.tars import TarWriter

ROW_GROUP = 500  # images; the Hugging Face viewer reads whole row groups
FEATURES = {
    "image": {"_type": "Image"},
    "uid": {"dtype": "string", "_type": "Value"},
    "key": {"dtype": "string", "_type": "Value"},
    "label": {"dtype": "int32", "_type": "Value"},
    "weight": {"dtype": "float32", "_type": "Value"},
    "rank": {"dtype": "uint64", "_type": "Value"},
}
PARQUET = pa.schema(
    [
        pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        pa.field("uid", pa.string()),
        pa.field("key", pa.string()),
        pa.field("label", pa.int32()),  # the pool's own class
        pa.field("weight", pa.float32()),
        pa.field("rank", pa.uint64()),
    ],
    {"huggingface": json.dumps({"info": {"features": FEATURES}})},
)


@dataclass(frozen=True)
class File:
    """A file of an export: its name below the export's folder, its size, its SHA-256 (hex)."""

    name: str
    bytes: int
    sha256: str


def recorded(folder: Place, name: str) -> File:
    """The entry of a file that lies in ``folder``; it is read for its hash."""
    path = folder / name
    return File(name, file_size(str(path)), sha256(path))


def image_name(row: dict[str, str]) -> str:
    """File name of an image outside tars: its uid."""
    return f"{row['uid']}.{row['ext']}"


def write_tars(folder: Place, blocks: Iterable[Block]) -> list[File]:
    """WebDataset tars: image, class and uid of each image, as a mined subset has them, byte for byte."""
    files = []
    for name, parts in groupby(blocks, key=lambda block: block.tar):
        count = 0
        with TarWriter(folder / name) as tar:
            for block in parts:
                for row, data in zip(block.rows.to_pylist(), block.images, strict=True):
                    write_sample(tar, row, data)
                    count += 1
        if count:
            files.append(File(name, tar.size, tar.sha256))
        else:
            (folder / name).unlink()
    return files


def write_imglist(folder: Place, blocks: Iterable[Block]) -> list[File]:
    """``imglist.txt``, a line ``images/000000/UID.png -1`` an image, and the images as files."""
    lines = io.StringIO()
    for block in blocks:
        under = f"images/{block.tar.removeprefix('outliers-').removesuffix('.tar')}"
        (folder / under).mkdir(parents=True, exist_ok=True)
        for row, data in zip(block.rows.to_pylist(), block.images, strict=True):
            _write(folder / under / image_name(row), data)
            lines.write(f"{under}/{image_name(row)} {OUTLIER}\n")
    os.sync()  # once for all images: to wait for the disk after each takes ten times as long
    with atomic(folder / "imglist.txt") as sink:
        sink.write(lines.getvalue().encode())
    return [recorded(folder, "imglist.txt")]


def _write(path: Place, data: bytes) -> None:
    """Write a file of which nobody knows before imglist.txt is there. Raises MinerError when the disk is full."""
    if not isinstance(path, Path):
        write_file(path, data)
        return
    try:
        path.write_bytes(data)
    except OSError as error:
        raise disk_full(error, path) or error from error


def write_npy(folder: Place, blocks: Iterable[Block], size: int, count: int) -> list[File]:
    """``outliers.npy``, uint8 ``[n, size, size, 3]``: the centre square of each image, as mining looks at it.

    ``count`` is the number of images that are expected; what comes stands in the header. Raises MinerError for an
    image that does not decode.
    """
    written = 0
    with atomic(folder / "outliers.npy") as sink:
        _header(sink, (count, size, size, 3))
        for block in blocks:
            for row, data in zip(block.rows.to_pylist(), block.images, strict=True):
                try:
                    sink.write(decode(data, size).tobytes())
                except ValueError as error:
                    raise MinerError(f"{block.tar}: {row['key']}: does not decode ({error}); --remove it") from None
                written += 1
        sink.seek(0)
        _header(sink, (written, size, size, 3))  # numpy leaves room in the header for another length
        sink.seek(0, io.SEEK_END)
    return [recorded(folder, "outliers.npy")]


def _header(sink: BinaryIO, shape: tuple[int, ...]) -> None:
    facts = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(sink, facts)


def write_datacomp(folder: Place, uids: pa.ChunkedArray) -> list[File]:
    """``uids.npy``, dtype ``u8,u8`` ``[n]``: upper and lower half of each uid, rising, as DataComp's resharder asks.

    Raises MinerError for a uid that is not 32 hex characters.
    """
    strange = uids.filter(pc.invert(pc.match_substring_regex(uids, "^[0-9a-f]{32}$")))
    if len(strange):
        raise MinerError(f"{strange[0].as_py()!r} is no uid of DataComp's: 32 hex characters")
    halves = np.sort(raw_uids(uids)).view(">u8").reshape(-1, 2)
    pairs = np.empty(len(halves), "<u8,<u8")
    pairs["f0"], pairs["f1"] = halves.T
    with atomic(folder / "uids.npy") as sink:
        np.lib.format.write_array(sink, pairs, allow_pickle=False)
    return [recorded(folder, "uids.npy")]


def write_parquet(folder: Place, blocks: Iterable[Block], tars: int) -> list[File]:
    """``data/train-00000-of-00001.parquet``, one a tar: encoded images as ``struct<bytes, path>``, and their facts."""
    names = []
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for number, (_, parts) in enumerate(groupby(blocks, key=lambda block: block.tar)):
        names.append(f"data/train-{number:05d}-of-{tars:05d}.parquet")
        with ExitStack() as stack:
            sink = stack.enter_context(atomic(folder / names[-1]))
            writer = stack.enter_context(pq.ParquetWriter(sink, PARQUET, write_page_index=True))
            for block in parts:
                rows = block.rows.to_pylist()
                images = [
                    {"bytes": data, "path": image_name(row)} for row, data in zip(rows, block.images, strict=True)
                ]
                columns = {name: block.rows[name] for name in PARQUET.names[1:]}
                writer.write_table(pa.table({"image": images} | columns, schema=PARQUET), row_group_size=ROW_GROUP)
    return [recorded(folder, name) for name in names]
