"""The directory of a zip is read in one way only, with short numbers and with long ones."""

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import compare

LOCATOR, END_64, END, ENTRY = b"PK\6\7", b"PK\6\6", b"PK\5\6", b"PK\1\2"
VALUES = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([True, False])}


def long_zip(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a torch file again, with the eight-byte numbers of large files in every record."""
    torch.save(VALUES, path.with_suffix(".old"))
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    with zipfile.ZipFile(path.with_suffix(".old")) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(zipfile.ZipInfo(name), old.read(name))
    monkeypatch.undo()
    raw = path.read_bytes()
    end = raw.rindex(END) + 8  # the short numbers may all say "see the long ones"
    path.write_bytes(raw[:end] + b"\xff" * 12 + raw[end + 12 :])
    return path


def assert_values(path: Path) -> None:
    found = compare.read_checkpoint(path)
    assert found.keys() == VALUES.keys()
    assert all(torch.equal(found[key], VALUES[key]) for key in VALUES)


@pytest.mark.filterwarnings("ignore::compare.UnverifiedCheckpoint")
def test_long_numbers_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = long_zip(tmp_path / "long.pth", monkeypatch)
    raw = path.read_bytes()
    assert raw.count(END_64) == raw.count(LOCATOR) == 1
    assert struct.pack("<2I", 2**32 - 1, 2**32 - 1) in raw[raw.index(ENTRY) :]
    assert_values(path)


def changed(signature: bytes, offset: int, layout: str, change: Callable[[int], int]) -> Callable:
    """Return a function that changes one number of the last record with this signature."""

    def damage(raw: bytes) -> bytes:
        at = raw.rindex(signature) + offset
        (value,) = struct.unpack_from(layout, raw, at)
        size = struct.calcsize(layout)
        return raw[:at] + struct.pack(layout, change(value)) + raw[at + size :]

    return damage


def more(value: int) -> int:
    return value + 1


DAMAGES = {
    "another disk": (changed(LOCATOR, 4, "<I", more), "end record is not where it says"),
    "another place": (changed(LOCATOR, 8, "<Q", more), "end record is not where it says"),
    "more disks": (changed(LOCATOR, 16, "<I", more), "end record is not where it says"),
    "another size": (changed(END_64, 4, "<Q", more), "long end record is invalid"),
    "a disk": (changed(END_64, 16, "<I", more), "long end record is invalid"),
    "another first disk": (changed(END_64, 20, "<I", more), "long end record is invalid"),
    "more records here": (changed(END_64, 24, "<Q", more), "two end records differ"),
    "another short count": (changed(END, 10, "<H", lambda _: 1), "comment or several disks"),
    "another short size": (changed(END, 12, "<I", lambda _: 7), "two end records differ"),
    "another short begin": (changed(END, 16, "<I", lambda _: 7), "two end records differ"),
    "a larger directory": (changed(END_64, 40, "<Q", more), "not right before its end record"),
    "another signature": (changed(ENTRY, 0, "<I", more), "directory is cut"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_two_readings_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, message = DAMAGES[name]
    path = long_zip(tmp_path / "long.pth", monkeypatch)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(compare.CheckpointError, match=message):
        compare.read_checkpoint(path)


def test_records_that_the_end_record_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = long_zip(tmp_path / "long.pth", monkeypatch)
    raw = path.read_bytes()
    for offset in (24, 32):
        raw = changed(END_64, offset, "<Q", lambda count: count - 1)(raw)
    path.write_bytes(raw)
    with pytest.raises(compare.CheckpointError, match="more records than its end record says"):
        compare.read_checkpoint(path)
