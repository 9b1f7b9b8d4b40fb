"""``croissant.json``: what an export holds and where it comes from, in Croissant 1.1 (JSON-LD) with PROV-O terms.

Checked with the mlcroissant package. It has no date, creator or web page: whoever publishes a subset adds them.
"""

import re
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc

from miner.formats import File

CONFORMS = "http://mlcommons.org/croissant/1.1"
# Terms of Croissant, as the specification's own context has them.
TERMS = """annotation arrayShape citeAs column containedIn equivalentProperty excludes extract field fileProperty
fileObject fileSet format includes isArray isLiveDataset jsonPath key md5 parentField path readLines recordSet
references regex repeated replace samplingRate sdVersion separator source subField transform unArchive value"""
CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "prov": "http://www.w3.org/ns/prov#",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "description": {"@container": "@language"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "name": {"@container": "@language"},
    **{term: f"cr:{term}" for term in TERMS.split()},
}
TYPES = {
    ".tar": "application/x-tar",
    ".parquet": "application/x-parquet",
    ".npy": "application/octet-stream",
    ".txt": "text/plain",
}
IMAGE_TYPES = {"jpg": "image/jpeg", "jpeg": "image/jpeg", "png": "image/png", "webp": "image/webp"}
COLUMNS = {
    "uid": ("sc:Text", "BLAKE2b-128 of the image's bytes as the pool stores them, 32 hex characters."),
    "key": ("sc:Text", "WebDataset key."),
    "sha256": ("sc:Text", "SHA-256 of the image file."),
    "label": ("cr:Int32", "The pool's own class, where it has classes."),
    "weight": ("cr:Float32", "Learned weight; the pool's mean is 1."),
    "rank": ("cr:UInt64", "Place in the ranking of the pool; the subset of a smaller gamma is a prefix."),
}


def croissant(recipe: dict[str, Any], rows: pa.Table, style: str, files: list[File], title: str) -> dict[str, Any]:
    """The JSON-LD of an export in format ``style``; ``files`` are its files, manifest.parquet among them."""
    pool = recipe["pool"] if isinstance(recipe.get("pool"), dict) else {}
    about = [f"{key} {recipe[key]}" for key in ("gamma", "n", "draw", "run_id", "removed") if key in recipe]
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "@id": f"urn:outlier-miner:subset:{quote(recipe['fingerprint'])}",
        "name": re.sub("[^A-Za-z0-9._-]+", "-", title),
        "conformsTo": CONFORMS,
        "description": f"{recipe['count']} background (outlier) images chosen from the pool {pool.get('name')}.",
        "license": str(pool.get("licence") or "unknown: ask whoever has the pool"),
        "version": f"{1 + count(recipe.get('removed'))}.0.0",
        "prov:wasDerivedFrom": {
            "@id": f"urn:outlier-miner:pool:{quote(str(pool.get('fingerprint')))}",
            "@type": "prov:Entity",
            "prov:label": str(pool.get("name")),
        },
        "prov:wasGeneratedBy": {
            "@id": f"urn:outlier-miner:run:{quote(str(recipe.get('run_id')))}",
            "@type": "prov:Activity",
            "prov:label": f"Background data resampling by outlier-miner: {', '.join(about)}",
        },
        "distribution": [*map(_file, files), *_file_sets(style, rows, files)],
        "recordSet": [_manifest(), *_images(style)],
    }


def count(value: Any) -> int:
    """A number of images out of subset.json; 0 for what is none."""
    return value if isinstance(value, int) else 0


def _file(file: File) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": file.name,
        "name": file.name,
        "contentUrl": file.name,
        "contentSize": f"{file.bytes} B",
        "encodingFormat": TYPES[file.name[file.name.rindex(".") :]],
        "sha256": file.sha256,
    }


def _file_sets(style: str, rows: pa.Table, files: list[File]) -> list[dict[str, Any]]:
    """The images, where they are files of their own, in tars or folders."""
    kinds = sorted(pc.unique(rows["ext"]).to_pylist())
    one = {"@type": "cr:FileSet", "@id": "image-files", "name": "image-files"}
    formats = {"encodingFormat": sorted({IMAGE_TYPES[kind] for kind in kinds})}
    if style == "webdataset":
        tars = [{"@id": file.name} for file in files if file.name.endswith(".tar")]
        return [one | {"containedIn": tars, "includes": [f"*.{kind}" for kind in kinds]} | formats]
    if style == "imglist":
        return [one | {"includes": [f"images/*/*.{kind}" for kind in kinds]} | formats]
    if style == "parquet":
        return [one | {"includes": ["data/*.parquet"], "encodingFormat": TYPES[".parquet"]}]
    return []


def _manifest() -> dict[str, Any]:
    source = {"fileObject": {"@id": "manifest.parquet"}}
    fields = [
        {
            "@type": "cr:Field",
            "@id": f"manifest/{name}",
            "name": name,
            "description": told,
            "dataType": kind,
            "source": source | {"extract": {"column": name}},
        }
        for name, (kind, told) in COLUMNS.items()
    ]
    key = {"key": {"@id": "manifest/uid"}}
    return {"@type": "cr:RecordSet", "@id": "manifest", "name": "manifest", **key, "field": fields}


def _images(style: str) -> list[dict[str, Any]]:
    """Records of image and what names it, key or uid; none where images are not files."""
    if style == "webdataset":
        name, content = "key", {"extract": {"fileProperty": "content"}}
        named = {"extract": {"fileProperty": "fullpath"}, "transform": {"regex": r"^(.*)\.[a-z]+$"}}
    elif style == "imglist":
        name, content = "uid", {"extract": {"fileProperty": "content"}}
        named = {"extract": {"fileProperty": "filename"}, "transform": {"regex": r"^([0-9a-f]{32})\.[a-z]+$"}}
    elif style == "parquet":
        name, content = "uid", {"extract": {"column": "image"}, "transform": {"jsonPath": "bytes"}}
        named = {"extract": {"column": "uid"}}
    else:
        return []
    files = {"fileSet": {"@id": "image-files"}}
    image = {"@type": "cr:Field", "@id": "images/image", "name": "image", "dataType": "sc:ImageObject"}
    which = {"@type": "cr:Field", "@id": f"images/{name}", "name": name, "dataType": "sc:Text"}
    fields = [image | {"source": files | content}, which | {"source": files | named}]
    key = {"key": {"@id": f"images/{name}"}}
    return [{"@type": "cr:RecordSet", "@id": "images", "name": "images", **key, "field": fields}]
