"""Write what the documents take from the code anew: every command's --help, and the tables of columns.

    python docs/generate.py

docs/commands.md is written whole, docs/formats.md between its marks. The tests fail while they are out of date, so that
a flag or a column never changes by accident.
"""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa

DOCS = Path(__file__).resolve().parent
PIPELINES = DOCS.parent / "pipelines"
WIDTH = "110"
HEAD = """# Commands

What `--help` says, as written by `python docs/generate.py`. Shown for the demo's defaults: beside a `--method` or
`--preset`, `pipelines.train --help` shows that recipe instead.
"""

# What the columns of all tables mean; where a table means something else by a name, "table.name".
MEANING = {
    "uid": "BLAKE2b-128 of the stored image's bytes (of a raw pool's record), 32 hex characters: the image's name, "
    "wherever it lies",
    "key": "WebDataset key",
    "shard": "number of the shard in the pool's `pool.json`",
    "row": "row within the shard",
    "offset": "first byte of the image in its shard",
    "source_uid": "what the source calls the image: `uid` in the KEY.json of img2dataset and DataComp, the path in an "
    "archive; null: nothing",
    "size": "bytes of the image",
    "ext": "`jpg`, `png`, `webp`; records of pixels are read as `png`",
    "label": "the pool's own class, an index into its `classes`; null: none",
    "width": "pixels; 0 where the image does not decode",
    "height": "pixels; 0 where the image does not decode",
    "excluded_by": "why it is not eligible (`duplicate`, `decode`, `id-duplicate`, `near-id`, ...; of "
    "`excluded.parquet`: `audit:SET`, `class:NAME`, `opt-out` or what `--reason` said); null: it is",
    "excluded.excluded_by": "why it was taken out after mining",
    "index.excluded_by": "why the image is out of every mining from the start; null: it is not",
    "weight": "mean 1 over rows that were eligible when mined; 0 where excluded",
    "manifest.weight": "as in the weights table",
    "loss": "latest KL(U‖p) (paper Eq. 5), over views and smoothed",
    "loss_mean": "mean over all visits",
    "visits": "how often it was scored",
    "rank": "place in the order of the whole pool: a γ-subset is rank < ⌊γN⌋; null where excluded",
    "nn_id_row": "nearest training image of the ID set under the frozen classifier",
    "nn_id_cosine": "its cosine",
    "nn50_id_cosine": "cosine of the 50th nearest: what the leak guard judges by",
    "stratum": "cluster of looks that takes turns in the ranking",
    "pool_shard": "name of the file in the pool",
    "pool_offset": "where the image lay in it",
    "pool_size": "bytes there",
    "sha256": "of the image member as it stands in the subset's tar",
    "tar": "file of the subset that holds it",
    "tar_offset": "first byte of the image in that tar",
    "tar_size": "bytes there",
    "audit.row": "row in the pool, all shards joined, or in the subset's manifest",
    "set": "reference set: `NAME train` and `NAME test` of the ID set, or an OOD test set",
    "set_row": "row there",
    "set_key": "key there",
    "kind": "`exact`, `re-encoded`, `flipped`, `cropped`, `flipped+cropped`",
    "detail": "correlation of edges and texture after alignment; above the threshold it is a copy",
    "correlation": "of all pixels after alignment",
    "scale": "side of the window of the reference that the image shows, in units of its side; 1: all of it",
    "x": "centre of the window, in units of the side, from the left",
    "y": "from the top",
}


def commands() -> list[str]:
    """Names of everything that is run as ``python -m pipelines.NAME``."""
    return sorted(path.stem for path in PIPELINES.glob("*.py") if "cli.run(main)" in path.read_text())


def shown(name: str) -> str:
    """What a command's --help prints."""
    words = [sys.executable, "-m", f"pipelines.{name}", "--help"]
    plain = os.environ | {"COLUMNS": WIDTH, "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(words, cwd=DOCS.parent, env=plain, capture_output=True, text=True, check=True)
    return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())


def tables() -> dict[str, pa.Schema]:
    """The schemas that others may rely on, by the name of their mark in formats.md."""
    from miner.audit import PAIRS
    from miner.exclude import LIST
    from miner.pool import INDEX_SCHEMA
    from miner.source_uids import SCHEMA
    from miner.subset import MANIFEST
    from miner.weights import TABLE

    return {
        "index": INDEX_SCHEMA,
        "sources": SCHEMA,
        "weights": TABLE,
        "manifest": MANIFEST,
        "audit": PAIRS,
        "excluded": LIST,
    }


def table(name: str, schema: pa.Schema) -> str:
    """One schema as Markdown. Raises KeyError for a column without a meaning."""
    rows = ["| column | type | null | meaning |", "|---|---|---|---|"]
    for field in schema:
        meaning = MEANING.get(f"{name}.{field.name}") or MEANING[field.name]
        kind = "string (dictionary)" if pa.types.is_dictionary(field.type) else str(field.type)
        rows.append(f"| `{field.name}` | {kind} | {'yes' if field.nullable else 'no'} | {meaning} |")
    return "\n".join(rows)


def formats(text: str) -> str:
    """``text`` of formats.md with its tables anew."""
    for name, schema in tables().items():
        mark = re.compile(rf"(<!-- columns: {name} -->\n).*?(<!-- end -->)", re.S)
        found = mark.subn(lambda match, name=name, schema=schema: f"{match[1]}{table(name, schema)}\n{match[2]}", text)
        assert found[1] == 1, name
        text = found[0]
    return text


def main() -> None:
    """Write both."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        helps = dict(zip(commands(), threads.map(shown, commands()), strict=True))
    parts = [f"## python -m pipelines.{name}\n\n```text\n{text}\n```\n" for name, text in helps.items()]
    (DOCS / "commands.md").write_text("\n".join([HEAD, *parts]))
    path = DOCS / "formats.md"
    path.write_text(formats(path.read_text()))


if __name__ == "__main__":
    sys.path.insert(0, str(DOCS.parent))
    main()
