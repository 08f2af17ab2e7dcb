"""Read the directory of a zip file that allows only one reading.

Programs disagree on odd zip files: on which of two directories counts, where it begins, which of
two records of one name is meant. So whatever could be read in two ways is refused: the directory
lies right before the end record, which ends the file; it names each record once, in any case of its
letters; the records are stored uncompressed and do not overlap; and each begins with a header that
repeats its name.

Source: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, sections 4.3.7 to 4.3.16.
"""

import struct
from collections import Counter
from itertools import pairwise
from typing import NamedTuple

from ...files.memory import Budget
from ...files.printable import shown
from ...files.reading import InputFile

_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_BYTES_PER_RECORD = 1000
_ENCRYPTED = 0x2041  # the flags of encryption


class CompressedError(ValueError):
    """A record is compressed.

    Attributes:
        record: its name.
    """

    def __init__(self, record: str) -> None:
        super().__init__(f"{record} is compressed; torch never compresses")
        self.record = record


class Record(NamedTuple):
    """A stored record: the offset of its first byte in the file, and its size."""

    begin: int
    nbytes: int


class _Entry(NamedTuple):
    name: bytes
    header: int  # the offset of the local header
    nbytes: int


def read_directory(file: InputFile, budget: Budget) -> list[tuple[str, Record]]:
    """Return the name and the place of each record.

    Raises:
        ValueError: the file is not a zip, or allows more than one reading.
        FileError: the directory does not fit the budget.
    """
    begin, end, count = _directory_range(file)
    budget.require(end - begin + count * _BYTES_PER_RECORD, file.path, "its directory")
    entries = _entries(file.read(end - begin, begin), count)
    records = [
        (entry.name.decode("utf-8", "surrogateescape"), _record(file, entry)) for entry in entries
    ]
    names = [name.casefold() for name, _ in records]
    if len(set(names)) != len(names):
        repeated = Counter(names).most_common(1)[0][0]
        raise ValueError(f"the record {shown(repeated)} occurs twice")
    ordered = sorted(
        (entry.header, record.begin + record.nbytes)
        for entry, (_, record) in zip(entries, records, strict=True)
    )
    for (_, before), (header, _) in pairwise([*ordered, (begin, end)]):
        if before > header:
            raise ValueError("its records overlap")
    return records


def _directory_range(file: InputFile) -> tuple[int, int, int]:
    """Return where the directory begins and ends, and how many records it names."""
    tail = file.read(_END.size, max(0, file.size - _END.size))
    if len(tail) < _END.size or tail[:4] != b"PK\5\6":
        raise ValueError("it does not end with the end record of a zip")
    _, disk, first_disk, here, count, nbytes, begin, comment = _END.unpack(tail)
    if disk or first_disk or here != count or comment:
        raise ValueError("its end record has a comment or several disks")
    end = file.size - _END.size
    locator = file.read(_LOCATOR.size, max(0, end - _LOCATOR.size))
    if locator[:4] == b"PK\6\7":
        end -= _LOCATOR.size + _END_64.size
        _, disk, offset, disks = _LOCATOR.unpack(locator)
        if disk or disks != 1 or offset != end or end < 0:
            raise ValueError("its end record is not where it says")
        values = _END_64.unpack(file.read(_END_64.size, end))
        signature, size, _, _, disk, first_disk, here, count_64, nbytes_64, begin_64 = values
        if signature != b"PK\6\6" or size != _END_64.size - 12 or disk or first_disk:
            raise ValueError("its long end record is invalid")
        short = (
            (count, count_64, 0xFFFF),
            (nbytes, nbytes_64, 2**32 - 1),
            (begin, begin_64, 2**32 - 1),
        )
        if here != count_64 or any(value not in (long, unset) for value, long, unset in short):
            raise ValueError("its two end records differ")
        count, nbytes, begin = count_64, nbytes_64, begin_64
    elif count == 0xFFFF:
        raise ValueError("its end record needs a longer one")
    if begin + nbytes != end:
        raise ValueError("its directory is not right before its end record")
    return begin, end, count


def _entries(raw: bytes, count: int) -> list[_Entry]:
    entries, position = [], 0
    for _ in range(count):
        if position + _ENTRY.size > len(raw):
            raise ValueError("its directory is cut")
        values = _ENTRY.unpack_from(raw, position)
        signature, _, _, flags, method, _, _, _, packed, nbytes = values[:10]
        name_size, extra_size, comment_size, disk, _, _, header = values[10:]
        position += _ENTRY.size
        name = raw[position : position + name_size]
        extra = raw[position + name_size : position + name_size + extra_size]
        position += name_size + extra_size + comment_size
        if signature != b"PK\1\2" or position > len(raw):
            raise ValueError("its directory is cut")
        if b"\0" in name:
            raise ValueError("a record has a NUL in its name")
        if method:
            raise CompressedError(_text(name))
        if flags & _ENCRYPTED or comment_size:
            raise ValueError(f"{_text(name)} is encrypted or has a comment")
        nbytes, packed, header = _long(extra, nbytes, packed, header)
        if nbytes != packed or disk:
            raise ValueError(f"{_text(name)} has two sizes")
        entries.append(_Entry(name, header, nbytes))
    if position != len(raw):
        raise ValueError("its directory has more records than its end record says")
    return entries


def _text(name: bytes) -> str:
    return shown(name.decode("utf-8", "surrogateescape"))


def _long(extra: bytes, *numbers: int) -> tuple[int, ...]:
    """Return the numbers, those that do not fit 32 bits from the extra field of eight-byte ones."""
    unset = 2**32 - 1
    values: list[int] = []
    position = fields = 0
    while position + 4 <= len(extra):
        tag, size = struct.unpack_from("<2H", extra, position)
        field = extra[position + 4 : position + 4 + size]
        position += 4 + size
        if tag == 1:
            fields += 1
            values = [
                int.from_bytes(field[begin : begin + 8], "little")
                for begin in range(0, len(field) - 7, 8)
            ]
    if fields > 1 or len(values) < sum(number == unset for number in numbers):
        raise ValueError("a record has an invalid extra field")
    return tuple(values.pop(0) if number == unset else number for number in numbers)


def _record(file: InputFile, entry: _Entry) -> Record:
    """Return where the bytes of the record are: right after its own header.

    Raises:
        ValueError: there is no header of that name, or the record reaches beyond the file.
    """
    raw = file.read(_LOCAL.size + len(entry.name), entry.header)
    name = _text(entry.name)
    if len(raw) < _LOCAL.size or raw[:4] != b"PK\3\4":
        raise ValueError(f"{name} is not where the directory says")
    _, _, flags, method, *_, name_size, extra_size = _LOCAL.unpack_from(raw)
    if raw[_LOCAL.size :] != entry.name or name_size != len(entry.name) or method:
        raise ValueError(f"{name} is called otherwise in its own header")
    begin = entry.header + _LOCAL.size + name_size + extra_size
    if flags & _ENCRYPTED or begin + entry.nbytes > file.size:
        raise ValueError(f"{name} declares more than the file's {file.size:,} bytes")
    return Record(begin, entry.nbytes)
