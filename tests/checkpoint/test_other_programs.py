"""Files of other programs are named for what they are, with a way to what they hold."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

import compare


def numpy_archive() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, weight=np.ones((2, 3), np.float32))
    return stream.getvalue()


def tar_file() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.pth"))
    return stream.getvalue()


FOREIGN = {
    "a GGUF file": (b"GGUF\3\0\0\0" + bytes(16), "take the safetensors"),
    "a NumPy archive": (numpy_archive(), r"numpy\.load and save them by name with torch\.save"),
    "a NumPy array": (b"\x93NUMPY\1\0" + bytes(80), r"numpy\.load"),
    "an HDF5 file": (b"\x89HDF\r\n\x1a\n" + bytes(80), "read its arrays"),
    "a gzip file": (gzip.compress(bytes(80)), "gunzip --stdout"),
    "a Zstandard file": (b"\x28\xb5\x2f\xfd" + bytes(80), "unzstd --stdout"),
    "an xz file": (lzma.compress(bytes(80)), "unxz --stdout"),
    "a bzip2 file": (bz2.compress(bytes(80)), "bunzip2 --stdout"),
    "a 7z file": (b"7z\xbc\xaf\x27\x1c" + bytes(80), "7z x"),
    "a tar file": (tar_file(), "tar -xf"),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "a web page": (b"<!doctype HTML><html>", "download the file itself"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_of_another_program_is_named(name: str, tmp_path: Path) -> None:
    content, mend = FOREIGN[name]
    for file in ("a b.pth", "a.bin", "a.safetensors", "a.msgpack", "a.gguf", "a.safetensors.gz"):
        (tmp_path / file).write_bytes(content)
        with pytest.raises(compare.CheckpointError, match=mend) as caught:
            compare.read_checkpoint(tmp_path / file)
        assert f"is {name}" in str(caught.value)
        assert caught.value.is_usage


def test_what_the_advice_for_an_archive_of_numpy_makes_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(numpy_archive())
    arrays = np.load(tmp_path / "a.npz")
    torch.save({name: torch.from_numpy(arrays[name]) for name in arrays}, tmp_path / "a.pth")
    with pytest.warns(compare.UnverifiedCheckpoint):
        assert compare.read_checkpoint(tmp_path / "a.pth")["weight"].tolist() == [[1.0] * 3] * 2


def test_a_length_that_begins_as_another_program_does(tmp_path: Path) -> None:
    """The header of safetensors may have a length that gzip's files begin with."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})
    size = int.from_bytes(b"\x1f\x8b", "little")
    content = size.to_bytes(8, "little") + header.ljust(size).encode() + bytes(4)
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.warns(compare.UnverifiedCheckpoint):
        assert compare.read_checkpoint(tmp_path / "a.safetensors")["a"].tolist() == [0.0]
