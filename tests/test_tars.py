"""Hostile and damaged tars are refused with file, member and offset; our own tars repeat byte for byte."""

import contextlib
import io
import os
import resource
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from miner.errors import MinerError
from miner.tars import MAX_IMAGE, Sample, TarWriter, read_samples, why_no_key


def jpeg(shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 255 - shade, 7)).save(buffer, "JPEG")
    return buffer.getvalue()


def member(name: str, data: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def write(path: Path, *members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w:", format=form) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return path


def good(count: int = 3) -> list[tuple[tarfile.TarInfo, bytes]]:
    pairs = [(member(f"{i:04d}.jpg", jpeg(i)), member(f"{i:04d}.cls", str(i).encode() + b"\n")) for i in range(count)]
    return [each for pair in pairs for each in pair]


def test_samples_point_at_the_image_bytes(tmp_path: Path) -> None:
    extra = [member("0003.JPG", jpeg(9)), member("0003.txt", b"caption"), member("0003.json", b"{}")]
    folder = member("sub", type=tarfile.DIRTYPE)
    nested = [
        member("sub/a-b_c.png", b"not checked here"),
        member("notes.parquet", b"x"),
        member("._0.jpg", b"x"),
    ]
    path = write(tmp_path / "a.tar", *good(), *extra, folder, *nested)
    samples = read_samples(path)
    assert [sample.key for sample in samples] == ["0000", "0001", "0002", "0003", "sub/a-b_c"]
    assert [sample.label for sample in samples] == [0, 1, 2, None, None]
    assert [sample.ext for sample in samples] == ["jpg", "jpg", "jpg", "jpg", "png"]
    raw = path.read_bytes()
    assert [raw[s.offset : s.offset + s.size] for s in samples[:4]] == [jpeg(0), jpeg(1), jpeg(2), jpeg(9)]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_and_non_ascii_names_are_read(tmp_path: Path, form: int) -> None:
    name = "x" * 150 + "/ünï"
    path = write(tmp_path / "a.tar", member(f"{name}.jpg", jpeg(3)), member(f"{name}.cls", b"3"), form=form)
    (sample,) = read_samples(path)
    assert sample.key == name
    assert path.read_bytes()[sample.offset : sample.offset + sample.size] == jpeg(3)


HOSTILE = {
    "climbs": (member("../x.jpg", jpeg()), "leaves the archive's folder"),
    "climbs inside": (member("a/../../x.jpg", jpeg()), "leaves the archive's folder"),
    "absolute": (member("/abs.jpg", jpeg()), "leaves the archive's folder"),
    "newline": (member("a\nb.jpg", jpeg()), "control"),
    "not utf-8": (member("a\udcff.jpg", jpeg()), "control or undecodable"),
    "symlink": (member("x.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "a link"),
    "hard link": (member("x.jpg", type=tarfile.LNKTYPE, linkname="0000.jpg"), "a link"),
    "fifo": (member("x.jpg", type=tarfile.FIFOTYPE), "device"),
    "device": (member("x", type=tarfile.CHRTYPE), "device"),
    "pickle": (member("x.pkl", b"cos\nsystem\n."), "pickle"),
    "torch": (member("x.features.PTH", b"x"), "pickle"),
    "dot in the key": (member("z.v2.jpg", jpeg()), "must not hold a dot"),
    "huge image": (member("x.jpg", bytes(MAX_IMAGE + 1)), "at most"),
    "huge label": (member("x.cls", bytes(65)), "at most 64"),
    "huge json": (member("x.json", bytes((1 << 20) + 1)), "at most"),
    "label alone": (member("x.cls", b"3"), "label without image"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_members_are_refused_with_member_and_offset(tmp_path: Path, case: str) -> None:
    (info, data), why = HOSTILE[case]
    path = write(tmp_path / "bad.tar", *good(1), (info, data))
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[-1].offset
    with pytest.raises(MinerError) as error:
        read_samples(path)
    assert why in str(error.value)
    assert f"{path}: member {info.name!r} at byte {offset}" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("names", "texts"),
    [
        (["a.jpg", "b.jpg", "a.cls", "b.cls"], ["'a.jpg' at byte 0", "'a.cls' at byte", "adjacent"]),
        (["a.jpg", "b.jpg", "a.jpg"], ["'a.jpg' at byte 0", "'a.jpg' at byte 2048", "adjacent"]),
        (["a.jpg", "a.jpg"], ["one image a key"]),
        (["a.jpg", "a.png"], ["'a.jpg' at byte 0", "'a.png'", "one image a key"]),
        (["a.jpg", "a.cls", "a.cls"], ["one cls a key"]),
    ],
)
def test_split_and_repeated_keys_name_both_members(tmp_path: Path, names: list[str], texts: list[str]) -> None:
    path = write(tmp_path / "bad.tar", *[member(name, b"1") for name in names])
    with pytest.raises(MinerError, match="comes twice") as error:
        read_samples(path)
    assert all(text in str(error.value) for text in texts)


@pytest.mark.parametrize("text", [b"cat", b"", b"1.5", b"99999999999", "٣".encode()])
def test_a_label_is_an_integer(tmp_path: Path, text: bytes) -> None:
    path = write(tmp_path / "bad.tar", member("a.jpg", jpeg()), member("a.cls", text))
    with pytest.raises(MinerError, match=r"'a\.cls' at byte"):
        read_samples(path)


def gnu_sparse(path: Path) -> None:
    source = path.with_suffix(".jpg")
    with open(source, "wb") as file:
        file.truncate(1 << 22)
        file.seek(1 << 21)
        file.write(b"data")
    command = ["tar", "--sparse", "--format=gnu", "-cf", str(path), "-C", str(path.parent), source.name]
    subprocess.run(command, check=True)


def pax_sparse(path: Path) -> None:
    headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "x.jpg"}
    headers["GNU.sparse.realsize"] = str(1 << 31)
    data = b"1\n0\n1\n".ljust(512, b"\0") + b"x"
    write(path, member("x.jpg", data, pax_headers=headers))


@pytest.mark.parametrize("make", [gnu_sparse, pax_sparse])
def test_sparse_members_are_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "s.tar"
    make(path)
    with tarfile.open(path) as tar:
        assert tar.getmembers()[0].issparse()
    with pytest.raises(MinerError, match="a link, device or sparse member"):
        read_samples(path)


def headers(path: Path) -> list[int]:
    with tarfile.open(path) as tar:
        return [info.offset for info in tar.getmembers()]


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", *good())
    whole, offsets = path.read_bytes(), headers(path)
    end = offsets[-1] + 1024  # the first block of the end mark
    cuts = [
        0,
        1,
        511,
        512,
        700,
        *offsets[1:],
        *(o + 100 for o in offsets[1:]),
        offsets[-1] + 512,
        end,
        end + 511,
    ]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        with pytest.raises(MinerError, match=r"a\.tar: .*byte \d+"):
            read_samples(path)
    path.write_bytes(whole[: end + 512])
    assert len(read_samples(path)) == 3


def test_a_corrupt_later_header_is_no_silent_end(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", *good())
    raw, offset = bytearray(path.read_bytes()), headers(path)[2]
    raw[offset] ^= 1
    path.write_bytes(raw)
    with tarfile.open(path) as tar:
        assert len(tar.getmembers()) == 2  # what the standard library makes of it
    with pytest.raises(MinerError, match=f"corrupt header at byte {offset}"):
        read_samples(path)


def test_joined_and_compressed_and_empty_tars_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", *good())
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(MinerError, match="data after the end mark"):
        read_samples(path)
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(member("a.jpg", b"1")[0], io.BytesIO(b"1"))
    with pytest.raises(MinerError, match="not a sound uncompressed tar"):
        read_samples(path)
    write(path)
    with pytest.raises(MinerError, match="no images"):
        read_samples(path)


def test_extended_headers_cannot_eat_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", member("a.jpg", b"1", pax_headers={"comment": "x" * (2 << 20)}))
    with pytest.raises(MinerError, match="extended header of"):
        read_samples(path)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its file to the collector
def test_writer_repeats_and_the_others_can_read_it(tmp_path: Path) -> None:
    offsets = []
    for name in ("one.tar", "two.tar"):
        with TarWriter(tmp_path / name) as tar:
            offsets = [tar.write(f"{i:09d}.jpg", jpeg(i)) for i in range(30)]
    one = (tmp_path / "one.tar").read_bytes()
    assert one == (tmp_path / "two.tar").read_bytes()
    expected = [Sample(f"{i:09d}", "jpg", offsets[i], len(jpeg(i)), None) for i in range(30)]
    assert read_samples(tmp_path / "one.tar") == expected
    with tarfile.open(tmp_path / "one.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.mode, m.uname) for m in tar} == {(0, 0, 0, 0o644, "")}
    dataset = webdataset.WebDataset(str(tmp_path / "one.tar"), shardshuffle=False)
    assert [sample["jpg"] for sample in dataset] == [jpeg(i) for i in range(30)]


@pytest.mark.parametrize(
    "key", ["a", "a b/é_1", "a.b/c", "a.b", "", "a/", "/a", "../a", "a\n", "\udce9", "é" * 47, "é" * 48]
)
def test_keys_that_can_be_written_are_told_beforehand(tmp_path: Path, key: str) -> None:
    read: list[str] = []
    with contextlib.suppress(MinerError, UnicodeError):
        with TarWriter(tmp_path / "a.tar") as tar:
            for ext in ("webp", "json"):
                tar.write(f"{key}.{ext}", jpeg())
        read = [sample.key for sample in read_samples(tmp_path / "a.tar")]
    assert (why_no_key(key) is None) == (read == [key])


def test_writer_leaves_nothing_after_an_error(tmp_path: Path) -> None:

    def fail() -> None:
        with TarWriter(tmp_path / "a.tar") as tar:
            tar.write("a.jpg", b"1")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with TarWriter(tmp_path / "b.tar") as tar, pytest.raises(MinerError, match="shorten the name"):
        tar.write("x" * 300 + ".jpg", b"1")
    os.unlink(tmp_path / "b.tar")
    assert os.listdir(tmp_path) == []


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from miner.tars import TarWriter; from pipelines.cli import run\n"
        "def main():\n"
        "    with TarWriter(sys.argv[1]) as tar:\n"
        "        for i in range(64): tar.write(f'{i}.jpg', bytes(4096))\n"
        "run(main)"
    )

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))

    path = tmp_path / "a.tar"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], preexec_fn=limit, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == (f"error: {path}: disk full (File too large); make space, then run the same command again\n")
    assert os.listdir(tmp_path) == []
