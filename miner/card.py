"""README.md of an export: a dataset card as the Hugging Face Hub reads it, YAML between ``---`` and Markdown."""

import json
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from miner.croissant import count
from miner.formats import FEATURES

# What the viewer shows and load_dataset loads; where images are no files of the export, its manifest.
DATA_FILES = {"webdataset": "outliers-*.tar", "imglist": "images/*/*", "parquet": "data/*.parquet"}
LICENCES = ("apache-2.0", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-sa-4.0", "cc0-1.0", "mit", "odc-by")
SIZES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)
NAMES = ("1K", "10K", "100K", "1M", "10M", "100M")
READ = {
    "webdataset": 'webdataset.WebDataset("outliers-000000.tar").decode("pil").to_tuple("{ext}", "json")',
    "manifest": 'pyarrow.parquet.read_table("manifest.parquet")  # python -m pipelines.export --rehydrate brings the '
    "images",
    "imglist": 'pytorch_ood.dataset.img.ImageListDataset(".", "imglist.txt")',
    "npy": 'numpy.load("outliers.npy")  # uint8 [n, size, size, 3]; row i is row i of manifest.parquet',
    "datacomp": 'numpy.load("uids.npy", mmap_mode="r")  # dtype u8,u8, rising; of our tars, by .json["uid"]',
    "parquet": 'datasets.load_dataset("parquet", data_files="data/*.parquet")',
}


def reader(style: str, rows: pa.Table) -> str:
    """The line of Python that reads an export in format ``style``."""
    return READ[style].replace("{ext}", ";".join(sorted(pc.unique(rows["ext"]).to_pylist())))


def card(recipe: dict[str, Any], rows: pa.Table, style: str, title: str) -> str:
    """The card of an export in format ``style``. Names out of the manifest stand in it as JSON strings only."""
    pool, ident, game = (_dict(value) for value in (recipe.get("pool"), recipe.get("id"), recipe.get("settings")))
    game = _dict(game.get("game"))
    licence = str(pool.get("licence") or "")
    facts = {
        "images": recipe["count"],
        "gamma": recipe.get("gamma"),
        "pool": pool.get("name"),
        "pool fingerprint": pool.get("fingerprint"),
        "terms of the pool's images": licence or "not recorded: ask whoever has the pool",
        "mined for the ID set": ident.get("name"),
        "rule": game.get("rule"),
        "drawn by": recipe.get("draw"),
        "run": recipe.get("run_id"),
        "subset fingerprint": recipe["fingerprint"],
        "images taken out later": count(recipe.get("removed")),
    }
    table = [f"| {name} | {_cell(value)} |" for name, value in facts.items() if value is not None]
    lines = [
        "---",
        *_yaml(recipe["count"], style, licence, title),
        "---",
        "",
        f"# {_plain(title)}",
        "",
        "Background images for outlier exposure: none of them is meant to show a class of the ID set, and all of them",
        "have the same target, the uniform distribution (label -1 in OpenOOD and pytorch-ood). Chosen by",
        "outlier-miner as in *Background Data Resampling* (Li & Vasconcelos,",
        "CVPR 2020).",
        "",
        "| | |",
        "|---|---|",
        *table,
        "",
        "```python",
        reader(style, rows),
        "```",
        "",
        "`manifest.parquet` has a row an image, in rank order: uid (BLAKE2b-128 of its bytes in the pool), SHA-256,",
        "the pool's own class (`label`), weight, rank, nearest ID image. `subset.json` has the settings that chose",
        "them and the SHA-256 of the tars; `croissant.json` says the same in Croissant 1.1.",
        "Whoever has the pool makes the tars from these two files, byte for byte:",
        "`python -m pipelines.export --rehydrate FOLDER --pool NAME`.",
    ]
    return "\n".join(lines) + "\n"


def _yaml(count: int, style: str, licence: str, title: str) -> list[str]:
    """The header's lines; strings are quoted as JSON, which is YAML too."""
    known = licence.lower() if licence.lower() in LICENCES else "other" if licence else "unknown"
    upper = next((i for i, size in enumerate(SIZES) if count < size), len(SIZES))
    if upper == 0:
        category = "n<1K"
    elif upper == len(SIZES):
        category = "n>100M"
    else:
        category = f"{NAMES[upper - 1]}<n<{NAMES[upper]}"
    lines = [f"pretty_name: {json.dumps(title)}", f"license: {known}"]
    if known == "other":
        lines += ["license_name: of-the-pool", f"license_details: {json.dumps(licence)}"]
    lines += [
        "size_categories:",
        f"- {category}",
        "tags:",
        "- outlier-exposure",
        "- out-of-distribution-detection",
        "configs:",
        "- config_name: default",
        "  data_files:",
        "  - split: train",
        f"    path: {json.dumps(DATA_FILES.get(style, 'manifest.parquet'))}",
    ]
    if style == "parquet":
        lines += ["dataset_info:", "  features:"]
        for name, kind in FEATURES.items():
            lines += [f"  - name: {name}", f"    dtype: {kind.get('dtype', 'image')}"]
    return lines


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _cell(value: Any) -> str:
    return str(value) if isinstance(value, int) else _plain(str(value))


def _plain(text: str) -> str:
    """Text of others on one line of Markdown, as code: no link, tag, table or heading can come of it."""
    printable = "".join(char if char.isprintable() else " " for char in text)
    return f"`{printable.replace('`', chr(39)).replace('|', '/')[:500]}`"
