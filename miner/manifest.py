"""What a pool's manifest, `pool.json`, says of its shards: checked, for it may have been written anywhere."""

import os
from dataclasses import dataclass
from typing import Any

from miner.buckets import is_url
from miner.errors import MinerError
from miner.files import read_json
from miner.tars import MAX_IMAGE

FORMAT = "outlier-miner/pool"
VERSION = 1


@dataclass(frozen=True)
class Shard:
    """One shard. ``bytes`` and ``sha256`` cover its own range; ``file_bytes`` is the size of the whole file.

    kind "tar": a WebDataset tar. kind "raw": ``count`` records of ``record_shape`` [H, W, 3] uint8 from byte
    ``record_offset``, stored in ``order`` "C" or "F" (Fortran: tiny_images.bin).
    """

    name: str
    kind: str
    path: str
    count: int
    bytes: int
    sha256: str
    file_bytes: int
    record_offset: int = 0
    record_shape: tuple[int, ...] = ()
    order: str = "C"


def read_manifest(path: str) -> dict[str, Any]:
    """The content of a pool's manifest. MinerError when it is missing, no manifest, or of a newer program."""
    where = f"{path}/pool.json"
    try:
        manifest = read_json(where)
    except (FileNotFoundError, NotADirectoryError):
        raise MinerError(f"{where}: missing; to make a pool see python -m pipelines.shard --help") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise MinerError(f"{where}: not a pool manifest (format {FORMAT!r} expected)")
    if manifest.get("version") != VERSION:
        raise MinerError(f"{where}: format version {manifest.get('version')}, this program reads {VERSION}; update it")
    return manifest


def class_list(names: Any) -> tuple[str, ...]:
    """Class names; TypeError for anything but a list."""
    if not isinstance(names, list):
        raise TypeError("classes")
    return tuple(map(str, names))


def checked_shard(pool: str, entry: dict[str, Any]) -> Shard:
    """One entry of the manifest, checked: it may name files beneath the pool and, in a local pool, any local file.

    Whether that file is the one that was adopted, the uids of its images tell when they are read.
    """
    shard = Shard(**{**entry, "record_shape": tuple(entry.get("record_shape", ()))})
    for name, kind in Shard.__annotations__.items():
        if kind in (int, str) and type(getattr(shard, name)) is not kind:
            raise TypeError(f"{name} of shard {shard.name}")
    inside = shard.path.removeprefix(f"{pool}/") if is_url(pool) else shard.path
    if is_url(inside) or ".." in inside.split("/") or (is_url(pool) and os.path.isabs(inside)):
        raise ValueError(f"path of shard {shard.name} refused: {shard.path!r}")
    least = 1024 * shard.count if shard.kind == "tar" else shard.count * _volume(shard.record_shape)
    if shard.kind not in ("tar", "raw") or shard.order not in ("C", "F") or not 0 < shard.count < 2**31:
        raise ValueError(f"shard {shard.name}")
    if shard.bytes < least or (shard.kind == "raw" and shard.bytes != least):  # a tar has a header for each image
        raise ValueError(f"bytes of shard {shard.name}")
    if shard.record_offset < 0 or shard.record_offset + shard.bytes > shard.file_bytes or shard.file_bytes >= 2**63:
        raise ValueError(f"byte range of shard {shard.name}")
    return shard if os.path.isabs(inside) else Shard(**{**shard.__dict__, "path": f"{pool}/{inside}"})


def _volume(shape: tuple[int, ...]) -> int:
    if len(shape) != 3 or any(type(side) is not int or side < 1 for side in shape) or shape[2] != 3:
        raise ValueError(f"record shape {shape}")
    height, width, channels = shape
    if height * width * channels > MAX_IMAGE:
        raise ValueError(f"record shape {shape}: over {MAX_IMAGE} bytes an image")
    return height * width * channels
