"""Hostile and broken checkpoints: how each is made, and what its error must say."""

import argparse
import json
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch
from flax import serialization
from flax.traverse_util import flatten_dict, unflatten_dict

import compare
from compare.checkpoint.convert import convert_checkpoint
from compare.checkpoint.manifest import KEY, sealed
from compare.proof.cases import PRIME

from ..support import linen_variables, state_of, torch_module


@dataclass(frozen=True)
class Fault:
    """`make` gets a folder and returns the path to load; the error must match `says`."""

    name: str
    make: Callable[[Path], Path]
    says: str


def state() -> dict[str, torch.Tensor]:
    return state_of(PRIME, "float32")


def saved(folder: Path, suffix: str) -> Path:
    return compare.save_checkpoint(folder / f"state{suffix}", torch_module(PRIME))


def plain_safetensors(folder: Path, **changes: Any) -> tuple[Path, dict[str, Any], bytes]:
    """The path, header and data of a file without a manifest."""
    arrays = {key: tensor.numpy() for key, tensor in state().items()}
    header, data = {}, b""
    for key, array in arrays.items():
        header[key] = {
            "dtype": "F32",
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + array.nbytes],
        }
        data += array.tobytes()
    header.update(changes)
    return folder / "state.safetensors", header, data


def put(path: Path, header: dict[str, Any] | bytes, data: bytes, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def header_with(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path, header, data = plain_safetensors(folder)
        change(header)
        return put(path, header, data)

    return make


def replaced(suffix: str, change: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = saved(folder, suffix)
        path.write_bytes(change(path.read_bytes()))
        return path

    return make


def cut(suffix: str, percent: int) -> Callable[[Path], Path]:
    return replaced(suffix, lambda data: data[: len(data) * percent // 100])


def flipped(suffix: str, at: Callable[[bytes], int]) -> Callable[[Path], Path]:
    def change(data: bytes) -> bytes:
        place = at(data)
        return data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]

    return replaced(suffix, change)


def weight_in(data: bytes) -> int:
    """The position of a weight's bytes in a file."""
    return data.index(state()["W_key.weight"].numpy().tobytes()[:16]) + 5


def length_of_header(length: int) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path, header, data = plain_safetensors(folder)
        return put(path, header, data, length)

    return make


def twice(same_offsets: bool) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path, header, data = plain_safetensors(folder)
        raw = json.dumps(header)
        entry = {"dtype": "I32", "shape": [7, 7], "data_offsets": header["mask"]["data_offsets"]}
        entry |= {} if same_offsets else {"data_offsets": [0, 4], "shape": [1]}
        return put(path, (raw[:-1] + f', "mask": {json.dumps(entry)}}}').encode(), data)

    return make


def torch_saved(content: Callable[[], Any]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        torch.save(content(), folder / "state.pth")
        return folder / "state.pth"

    return make


class Planted:
    """Pickled code that makes a file if it runs."""

    def __reduce__(self) -> Any:
        return (exec, ("import pathlib; pathlib.Path('planted').touch()",))


def rezipped(change: Callable[[zipfile.ZipFile, zipfile.ZipFile], None]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        torch.save(state(), folder / "whole.pth")
        with (
            zipfile.ZipFile(folder / "whole.pth") as old,
            zipfile.ZipFile(folder / "state.pth", "w") as new,
        ):
            change(old, new)
        (folder / "whole.pth").unlink()
        return folder / "state.pth"

    return make


def _deflated(old: zipfile.ZipFile, new: zipfile.ZipFile) -> None:
    for name in old.namelist():
        new.writestr(
            name,
            b"\0" * (64 << 20) if name.endswith("/0") else old.read(name),
            zipfile.ZIP_DEFLATED,
        )


def _doubled(old: zipfile.ZipFile, new: zipfile.ZipFile) -> None:
    for name in (*old.namelist(), old.namelist()[-1]):
        new.writestr(name, old.read(name))


def _lying(folder: Path) -> Path:
    """The central directory of the zip says that a record is larger than the file."""
    path = saved(folder, ".pth")
    data = bytearray(path.read_bytes())
    place = data.index(b"PK\x01\x02")
    data[place + 20 : place + 28] = struct.pack("<II", 2**31 - 1, 2**31 - 1)
    path.write_bytes(bytes(data))
    return path


def _byteorder(folder: Path) -> Path:
    """The byte order record says `big`, so torch would swap the bytes of every number."""
    path = saved(folder, ".pth")
    path.write_bytes(path.read_bytes().replace(b"little", b"big\0\0\0"))
    return path


def _quoted(folder: Path) -> Path:
    """A pickle that declares a string of 2 GB."""
    (folder / "state.pth").write_bytes(b"\x80\x02X" + struct.pack("<I", 2**31 - 1) + b"abc.")
    return folder / "state.pth"


def _nested(old: zipfile.ZipFile, new: zipfile.ZipFile) -> None:
    for name in old.namelist():
        deep = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
        new.writestr(name, deep if name.endswith("data.pkl") else old.read(name))


def msgpacked(change: Callable[[Any], Any]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        tree = {name: {**part} for name, part in _tree().items()}
        (folder / "state.msgpack").write_bytes(serialization.msgpack_serialize(change(tree)))
        return folder / "state.msgpack"

    return make


def _tree() -> dict[str, Any]:
    return unflatten_dict(
        {path: np.asarray(leaf) for path, leaf in flatten_dict(linen_variables(PRIME)).items()}
    )


def packed(shape: list[int], dtype: str, values: bytes, kind: int = 1) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        array = msgpack.ExtType(kind, msgpack.packb((shape, dtype, values), use_bin_type=True))
        (folder / "state.msgpack").write_bytes(msgpack.packb({"buffers": {"mask": array}}))
        return folder / "state.msgpack"

    return make


def raw_msgpack(data: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "state.msgpack").write_bytes(data)
        return folder / "state.msgpack"

    return make


def sharded(change: Callable[[Path, dict[str, Any]], None]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / "shards"
        convert_checkpoint(saved(folder, ".safetensors"), path, shard_bytes=700)
        index = path / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        change(path, content)
        index.write_text(json.dumps(content))
        return path

    return make


def _outside(path: Path, content: dict[str, Any]) -> None:
    first = next(iter(content["weight_map"].values()))
    (path / first).rename(path.parent / "outside.safetensors")
    content["weight_map"] = {
        key: "../outside.safetensors" if name == first else name
        for key, name in content["weight_map"].items()
    }


def _absolute(path: Path, content: dict[str, Any]) -> None:
    content["weight_map"] = dict.fromkeys(content["weight_map"], "/etc/passwd")


def _linked(path: Path, content: dict[str, Any]) -> None:
    first = path / next(iter(content["weight_map"].values()))
    first.rename(path.parent / "outside.safetensors")
    first.symlink_to(path.parent / "outside.safetensors")


def _shard_missing(path: Path, content: dict[str, Any]) -> None:
    (path / next(iter(content["weight_map"].values()))).unlink()


def _exchanged(path: Path, content: dict[str, Any]) -> None:
    names = list(content["weight_map"].values())
    content["weight_map"] = dict(
        zip(content["weight_map"], [names[-1], *names[1:-1], names[0]], strict=True)
    )


def orbaxed(change: Callable[[Path], Any]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = saved(folder, ".orbax")
        change(path)
        return path

    return make


def _empty_orbax(folder: Path) -> Path:
    (folder / "state.orbax").mkdir()
    return folder / "state.orbax"


def _file_as_orbax(folder: Path) -> Path:
    (folder / "state.orbax").write_bytes(b"1")
    return folder / "state.orbax"


def _link_in_orbax(path: Path) -> None:
    (path / "_sharding").unlink(missing_ok=True)
    (path / "_sharding").symlink_to("/etc/passwd")


def _flip_in_orbax(path: Path) -> None:
    """Flip a bit in every data file, because only some of them are read."""
    for file in [file for file in path.rglob("*") if file.is_file() and file.parent.name == "d"]:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0x10
        file.write_bytes(bytes(content))


def _cut_in_orbax(path: Path) -> None:
    for file in [file for file in path.rglob("*") if file.is_file() and file.parent.name == "d"]:
        file.write_bytes(file.read_bytes()[:-40])


def _manifest_of_orbax(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Path]:
    def make(path: Path) -> None:
        file = path / "_CHECKPOINT_METADATA"
        content = json.loads(file.read_text())
        manifest = json.loads(content["custom_metadata"][KEY])
        change(manifest)
        content["custom_metadata"][KEY] = sealed(without_seal(manifest))
        file.write_text(json.dumps(content))

    return orbaxed(make)


def without_seal(manifest: dict[str, Any]) -> dict[str, Any]:
    """The content of a manifest without its checksum, so that a lie in it can be sealed."""
    return {name: value for name, value in manifest.items() if name != "crc32"}


def manifest_of_safetensors(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Path]:
    return lambda folder: change_manifest(saved(folder, ".safetensors"), change)


def change_manifest(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Change the manifest of a safetensors file and keep its data."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    manifest = json.loads(header["__metadata__"][KEY])
    change(manifest)
    header["__metadata__"][KEY] = sealed(without_seal(manifest))
    return put(path, header, raw[8 + length :])


def changed_state(suffix: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Path]:
    """A valid file whose state does not fit the module."""

    def make(folder: Path) -> Path:
        tensors = state()
        change(tensors)
        if suffix == ".safetensors":
            return compare.save_checkpoint(folder / "state.safetensors", tensors)
        torch.save(tensors, folder / f"state{suffix}")
        return folder / f"state{suffix}"

    return make


def _fifo(folder: Path) -> Path:
    os.mkfifo(folder / "state.safetensors")
    return folder / "state.safetensors"


def _folder(folder: Path) -> Path:
    (folder / "state.safetensors").mkdir()
    return folder / "state.safetensors"


def _bool(folder: Path) -> Path:
    path, header, data = plain_safetensors(folder)
    blocked = state()["mask"].bool().numpy().view(np.uint8).copy()
    blocked[0, 1], blocked[0, 2] = 2, 255
    begin, end = header["mask"]["data_offsets"]
    rest = {
        key: {**entry, "data_offsets": [at - end + 49 for at in entry["data_offsets"]]}
        for key, entry in header.items()
        if key != "mask"
    }
    mask = {"dtype": "BOOL", "shape": [7, 7], "data_offsets": [0, 49]}
    assert begin == 0
    return put(path, {"mask": mask, **rest}, blocked.tobytes() + data[end:])


def _old_pickle(folder: Path) -> Path:
    with (folder / "state.pth").open("wb") as stream:
        pickle.dump({"mask": Planted()}, stream, protocol=2)
    return folder / "state.pth"


def _script(folder: Path) -> Path:
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), folder / "state.pth")
    return folder / "state.pth"


def _tar(folder: Path) -> Path:
    (folder / "pickle").write_bytes(b"x" * 99)
    with tarfile.open(folder / "state.pth", "w") as archive:
        archive.add(folder / "pickle", "pickle")
    (folder / "pickle").unlink()
    return folder / "state.pth"


def _sparse() -> Any:
    return {**state(), "mask": torch.zeros(7, 7).to_sparse()}


def _many(folder: Path) -> Path:
    header = {
        f"x{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_001)
    }
    return put(folder / "state.safetensors", header, b"")


SAFETENSORS = [
    Fault("empty file", replaced(".safetensors", lambda _: b""), r"is empty.*take another copy"),
    Fault(
        "seven bytes",
        replaced(".safetensors", lambda data: data[:7]),
        r"its length; expected at least 10 bytes; found 7",
    ),
    Fault(
        "cut in the header",
        replaced(".safetensors", lambda data: data[:99]),
        r"its header's length",
    ),
    Fault(
        "cut before the data",
        replaced(".safetensors", lambda data: data[: 8 + int.from_bytes(data[:8], "little")]),
        r"its data; expected tensors end to end|its length",
    ),
    Fault(
        "last byte missing",
        replaced(".safetensors", lambda data: data[:-1]),
        r"tensors end to end|its length",
    ),
    Fault(
        "trailing bytes",
        replaced(".safetensors", lambda data: data + b"PK"),
        r"end before the file does",
    ),
    Fault(
        "header of 2**64 - 1 bytes",
        length_of_header(2**64 - 1),
        r"its header's length; .*18,446,744,073,709,551,615",
    ),
    Fault("header of 100,000,001 bytes", length_of_header(100_000_001), r"its header's length"),
    Fault("header of 99,999,999 bytes", length_of_header(99_999_999), r"its header's length"),
    Fault("header of no bytes", length_of_header(0), r"its header's length"),
    Fault(
        "header in another encoding",
        lambda folder: put(folder / "state.safetensors", b'{"\xff\xfe":1}  ', b""),
        r"its header; .*codec can't decode",
    ),
    Fault(
        "header that is no JSON",
        lambda folder: put(folder / "state.safetensors", b'{"mask":', b""),
        r"its header;",
    ),
    Fault(
        "header that is a list",
        lambda folder: put(folder / "state.safetensors", b"[1,2,3]", b""),
        r"the start of its header; expected a JSON object",
    ),
    Fault(
        "space before the header",
        lambda folder: put(folder / "state.safetensors", b' {"a":1}', b""),
        r"the start of its header",
    ),
    Fault("name twice, other offsets", twice(False), r"the name mask occurs twice"),
    Fault("name twice, same offsets", twice(True), r"the name mask occurs twice"),
    Fault(
        "overlapping offsets",
        header_with(
            lambda h: h["W_key.weight"].update(data_offsets=h["mask"]["data_offsets"], shape=[7, 7])
        ),
        r"overlap|hole",
    ),
    Fault(
        "reversed offsets",
        header_with(lambda h: h["mask"].update(data_offsets=[196, 0])),
        r"mask has the offsets 196",
    ),
    Fault(
        "offsets beyond the file",
        header_with(lambda h: h["W_value.weight"].update(data_offsets=[10**9, 10**9 + 572])),
        r"hole|its length",
    ),
    Fault(
        "negative offset",
        header_with(lambda h: h["mask"].update(data_offsets=[-196, 0])),
        r"mask has the offsets -196",
    ),
    Fault(
        "offset that is a fraction",
        header_with(lambda h: h["mask"].update(data_offsets=[0.0, 196.0])),
        r"mask has the offsets 0.0",
    ),
    Fault(
        "shape that is not the bytes",
        header_with(lambda h: h["mask"].update(shape=[7, 8])),
        r"mask takes 224 bytes and has the offsets 0 and 196",
    ),
    Fault(
        "shape that overflows",
        header_with(lambda h: h["mask"].update(shape=[2**33, 2**33])),
        r"larger than any array can be",
    ),
    Fault(
        "negative size",
        header_with(lambda h: h["mask"].update(shape=[-7, -7])),
        r"is not a list of sizes",
    ),
    Fault(
        "size that is true",
        header_with(lambda h: h["mask"].update(shape=[True, 49])),
        r"is not a list of sizes",
    ),
    Fault(
        "empty, 2**62 wide",
        header_with(
            lambda h: h.update(x={"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]})
        ),
        r"larger than any array can be",
    ),
    Fault(
        "33 axes",
        header_with(lambda h: h["mask"].update(shape=[49] + [1] * 32)),
        r"larger than any array can be",
    ),
    Fault(
        "unknown dtype",
        header_with(lambda h: h["mask"].update(dtype="F4")),
        r"mask has the dtype F4",
    ),
    Fault(
        "a field of its own",
        header_with(lambda h: h["mask"].update(code="x")),
        r"mask has the fields",
    ),
    Fault("entry that is a list", header_with(lambda h: h.update(mask=[1, 2])), r"its header;"),
    Fault(
        "100,001 empty tensors",
        _many,
        r"the number of its tensors; expected at most 100,000; found 100,001",
    ),
    Fault(
        "metadata of numbers",
        header_with(lambda h: h.update(__metadata__={"x": 1})),
        r"a metadata value that is not a string",
    ),
    Fault(
        "nesting of 100,000",
        lambda folder: put(folder / "state.safetensors", b'{"a":' + b"[" * 100_000, b""),
        r"its header; expected at most 1 '\[' for 0 tensors; found 100,000",
    ),
    Fault(
        "bool bytes 2 and 255",
        _bool,
        r"mask: is torch.bool|mask is bool and contains bytes other than 0 and 1",
    ),
    Fault(
        "flipped byte in the data",
        flipped(".safetensors", weight_in),
        r"the values of W_key.weight are not those that were saved; expected crc32",
    ),
    Fault(
        "flipped byte in the header",
        flipped(".safetensors", lambda data: data.index(b"W_key.weight") + 2),
        r"W_|its manifest is damaged",
    ),
    Fault(
        "names with control characters",
        header_with(lambda h: h.update({"../../etc/x\0\n": h.pop("mask")})),
        r"unexpected ../../etc/x\\x00\\n",
    ),
    Fault("pipe", _fifo, r"is not a regular file"),
    Fault("folder", _folder, r"is not a regular file"),
    Fault("no such file", lambda folder: folder / "none.safetensors", r"no such file or folder"),
]

TORCH = [
    Fault("empty file", replaced(".pth", lambda _: b""), r"is empty"),
    Fault(
        "neither zip nor pickle",
        replaced(".pth", lambda _: b"neither" * 9),
        r"it begins with b'neit'",
    ),
    *(
        Fault(
            f"cut after {share} %",
            cut(".pth", share),
            r"not a whole torch file",
        )
        for share in (1, 10, 30, 50, 70, 90, 99)
    ),
    Fault("last byte missing", replaced(".pth", lambda data: data[:-1]), r"not a whole torch file"),
    Fault(
        "flipped byte in the data",
        flipped(".pth", weight_in),
        r"the values of W_key.weight are not those",
    ),
    Fault(
        "pickled code in a zip",
        torch_saved(lambda: {"mask": Planted()}),
        r"more than a state dict .* was not run",
    ),
    Fault("pickled code", _old_pickle, r"more than a state dict .* was not run"),
    Fault(
        "whole module",
        torch_saved(lambda: torch.nn.Linear(2, 2)),
        r"more than a state dict .* was not run",
    ),
    Fault(
        "a namespace in the state",
        torch_saved(lambda: {**state(), "options": argparse.Namespace(a=1)}),
        r"more than a state dict .* was not run",
    ),
    Fault("tar", _tar, r"is a tar file"),
    Fault("TorchScript", _script, r"is a TorchScript archive: a program with its state"),
    Fault("a list", torch_saved(lambda: [torch.zeros(2)]), r"holds a list; expected a state dict"),
    Fault(
        "numbers as keys",
        torch_saved(lambda: {1: torch.zeros(2)}),
        r"holds a dict; expected a state dict",
    ),
    Fault(
        "a word for the mask",
        torch_saved(lambda: {**state(), "mask": "causal"}),
        r"mask is a str; expected a tensor",
    ),
    Fault(
        "100,000 lists within lists",
        rezipped(_nested),
        r"holds a list|more than a state dict|not a whole",
    ),
    Fault("deflated record", rezipped(_deflated), r"is compressed; torch never compresses"),
    Fault("record twice", rezipped(_doubled), r"the record .* twice"),
    Fault("record larger than the file", _lying, r"not a whole torch file"),
    Fault(
        "expanded to 4 TiB",
        torch_saved(lambda: {**state(), "mask": torch.zeros(1, 1).expand(2**20, 2**20)}),
        r"mask is an expanded view: .* stored bytes appear as ",
    ),
    Fault("string of 2 GB", _quoted, r"not a whole torch file|more than a state dict"),
    Fault(
        "byte order said to be big",
        _byteorder,
        r"are not those that were saved|not a whole torch file",
    ),
    Fault(
        "meta tensor",
        torch_saved(lambda: {**state(), "mask": torch.zeros(7, 7, device="meta")}),
        r"mask: a meta tensor",
    ),
    Fault("sparse tensor", torch_saved(_sparse), r"mask: a sparse or quantized tensor"),
]

MSGPACK = [
    Fault("empty file", replaced(".msgpack", lambda _: b""), r"is empty"),
    *(
        Fault(
            f"cut after {share} %",
            cut(".msgpack", share),
            r"not a whole Flax msgpack file",
        )
        for share in (1, 25, 50, 75, 99)
    ),
    Fault(
        "trailing bytes",
        replaced(".msgpack", lambda data: data + b"\0"),
        r"not a whole Flax msgpack file",
    ),
    Fault(
        "flipped byte in the data",
        flipped(
            ".msgpack",
            lambda data: data.index(state()["W_key.weight"].numpy().T.tobytes()[:16]) + 5,
        ),
        r"the values of params/W_key/kernel are not those",
    ),
    Fault("a list", msgpacked(lambda _: [1, 2]), r"holds a list; expected Linen variables"),
    Fault(
        "a word for the mask",
        msgpacked(lambda tree: {**tree, "buffers": {"mask": "causal"}}),
        r"mask: is a str",
    ),
    Fault(
        "a dict for the mask",
        msgpacked(lambda tree: {**tree, "buffers": {"mask": {"a": np.zeros(2)}}}),
        r"(unexpected|missing) .*mask[./]a",
    ),
    Fault(
        "extra collection",
        msgpacked(lambda tree: {**tree, "cache": {"index": np.zeros(2)}}),
        r"(unexpected|missing) .*index",
    ),
    Fault(
        "a list within a list",
        raw_msgpack(b"\x91" * 100_000),
        r"holds a list; expected Linen variables",
    ),
    Fault(
        "an array of 2**32 - 1",
        raw_msgpack(b"\xdd\xff\xff\xff\xff"),
        r"not a whole Flax msgpack file",
    ),
    Fault(
        "bytes of 2**32 - 1", raw_msgpack(b"\xc6\xff\xff\xff\xff"), r"not a whole Flax msgpack file"
    ),
    Fault("name twice", raw_msgpack(b"\x82\xa1a\x01\xa1a\x02"), r"the name a occurs twice"),
    Fault(
        "a number and its word",
        raw_msgpack(
            msgpack.packb(
                {
                    name: msgpack.ExtType(1, msgpack.packb(([1], "int8", bytes(1))))
                    for name in (0, "0")
                }
            )
        ),
        r"a name occurs twice, as a number and as a string",
    ),
    Fault("inferred size", packed([-1, 7], "float32", b"\0" * 196), r"is not a list of sizes"),
    Fault(
        "size that is not the bytes",
        packed([7, 8], "float32", b"\0" * 196),
        r"an array float32 \(7, 8\) in 196 bytes",
    ),
    Fault(
        "bytes beyond the size",
        packed([7, 8], "float32", b"\0" * 70_000),
        r"an array float32 \(7, 8\) in 70000 bytes",
    ),
    Fault(
        "an array of four parts",
        raw_msgpack(
            msgpack.packb(
                {
                    "mask": msgpack.ExtType(
                        1,
                        b"\x94"
                        + msgpack.packb([150, 150])
                        + msgpack.packb("float32")
                        + msgpack.packb(b"\0" * 90_000),
                    )
                }
            )
        ),
        r"not a whole Flax msgpack file",
    ),
    Fault(
        "an array of no parts",
        raw_msgpack(msgpack.packb({"mask": msgpack.ExtType(1, b"")})),
        r"not a whole Flax msgpack file",
    ),
    Fault("dtype object", packed([7, 7], "object", b"\0" * 196), r"dtype object is not one of"),
    Fault(
        "unknown extension",
        packed([7, 7], "float32", b"\0" * 196, kind=42),
        r"an entry of the extension type 42",
    ),
]

SHARDED = [
    Fault(
        "index leads out of the folder",
        sharded(_outside),
        r"its index names ../outside.safetensors",
    ),
    Fault("index leads to an absolute path", sharded(_absolute), r"its index names /etc/passwd"),
    Fault("shard is a link", sharded(_linked), r"its index names model-00001.*copy the shards"),
    Fault("shard is missing", sharded(_shard_missing), r"the shard model-00001-of-.* is missing"),
    Fault(
        "tensor in another shard",
        sharded(_exchanged),
        r"is in model-000.*; expected .*, as the index says",
    ),
    Fault(
        "tensor in no shard",
        sharded(
            lambda _, index: index["weight_map"].update(extra="model-00001-of-00003.safetensors")
        ),
        r"extra is not in model-00001|is missing",
    ),
    Fault(
        "index without a map",
        sharded(lambda _, index: index.pop("weight_map")),
        r"not a whole index of shards",
    ),
    Fault(
        "index of numbers",
        sharded(lambda _, index: index.update(weight_map={"mask": 3})),
        r"a file name that is not a string",
    ),
]

ORBAX = [
    Fault("link in the folder", orbaxed(_link_in_orbax), r"holds a link, _sharding"),
    Fault(
        "empty folder",
        _empty_orbax,
        r"is not a finished Orbax checkpoint",
    ),
    Fault(
        "a file",
        _file_as_orbax,
        r"is a file; an Orbax checkpoint is a folder",
    ),
    Fault(
        "metadata cut",
        orbaxed(lambda path: (path / "_METADATA").write_text('{"tree')),
        r"not a whole Orbax checkpoint",
    ),
    Fault(
        "our metadata cut",
        orbaxed(lambda path: (path / "_CHECKPOINT_METADATA").write_text('{"cus')),
        r"not a whole Orbax checkpoint \(_CHECKPOINT_METADATA",
    ),
    Fault(
        "another tensor in the manifest",
        _manifest_of_orbax(lambda manifest: manifest["tensors"].pop()),
        r"the manifest does not know",
    ),
    Fault(
        "another checksum in the manifest",
        _manifest_of_orbax(lambda manifest: manifest["tensors"][0].update(crc32="f" * 8)),
        r"are not those that were saved",
    ),
]

# A process of its own tests these: TensorStore's callbacks complain after Orbax's error.
ORBAX_DATA = [
    Fault(
        "flipped byte in the data",
        orbaxed(_flip_in_orbax),
        r"not a whole Orbax checkpoint|are not those that were",
    ),
    Fault(
        "data cut", orbaxed(_cut_in_orbax), r"not a whole Orbax checkpoint|are not those that were"
    ),
    Fault(
        "no data", orbaxed(lambda path: shutil.rmtree(path / "d")), r"not a whole Orbax checkpoint"
    ),
    Fault(
        "no manifest of the database",
        orbaxed(lambda path: (path / "manifest.ocdbt").unlink()),
        r"not a whole Orbax checkpoint",
    ),
]

MANIFEST = [
    Fault(
        "unknown version",
        manifest_of_safetensors(lambda manifest: manifest.update(version=9)),
        r"has version 9",
    ),
    Fault(
        "unknown layout",
        manifest_of_safetensors(lambda manifest: manifest.update(layout="keras")),
        r"layout 'keras'",
    ),
    Fault(
        "tensor it lacks",
        manifest_of_safetensors(lambda manifest: manifest["tensors"].pop()),
        r"does not know W_value.weight",
    ),
    Fault(
        "tensor the file lacks",
        manifest_of_safetensors(
            lambda manifest: manifest["tensors"].append(
                {**manifest["tensors"][0], "path": ["more"]}
            )
        ),
        r"the manifest declares more",
    ),
    Fault(
        "other dtype",
        manifest_of_safetensors(lambda manifest: manifest["tensors"][0].update(dtype="int32")),
        r"mask is not as its manifest declares; expected int32",
    ),
    Fault(
        "other polarity",
        manifest_of_safetensors(
            lambda manifest: manifest["tensors"][0].update(polarity="nonzero keeps")
        ),
        r"its manifest declares 'nonzero keeps' for mask; in these modules nonzero blocks",
    ),
    Fault(
        "no checksum",
        manifest_of_safetensors(lambda manifest: manifest["tensors"][0].update(crc32=None)),
        r"its manifest is invalid",
    ),
    Fault(
        "alias of nothing",
        manifest_of_safetensors(lambda manifest: manifest.update(aliases=[[["x"], ["y"]]])),
        r"alias \['x'\] refers to a tensor that is not in the file",
    ),
    Fault(
        "mapping of nothing",
        manifest_of_safetensors(lambda manifest: manifest.update(mapping={"rows": 3})),
        r"not a valid mapping",
    ),
]

STATE = [
    Fault(
        "missing mask", changed_state(".pth", lambda tensors: tensors.pop("mask")), r"missing mask"
    ),
    Fault(
        "extra entry",
        changed_state(".pth", lambda tensors: tensors.update(head=torch.zeros(2))),
        r"unexpected head \(2,\)",
    ),
    Fault(
        "prefix",
        changed_state(
            ".pth",
            lambda tensors: [
                tensors.update({f"module.{key}": tensors.pop(key)}) for key in list(tensors)
            ],
        ),
        r"unexpected module\.\*: 4 names begin so.*pass prefix='module\.'",
    ),
    Fault(
        "case",
        changed_state(
            ".pth", lambda tensors: tensors.update({"w_key.weight": tensors.pop("W_key.weight")})
        ),
        r"unexpected w_key.weight .*did you mean W_key.weight",
    ),
    Fault(
        "wrong context length",
        changed_state(".safetensors", lambda tensors: tensors.update(mask=torch.zeros(8, 8))),
        r"mask has shape \(8, 8\).*context_length=8",
    ),
    Fault(
        "1x1 mask",
        changed_state(".safetensors", lambda tensors: tensors.update(mask=torch.zeros(1, 1))),
        r"mask has shape \(1, 1\)",
    ),
    Fault(
        "numbers into a mask of bool",
        changed_state(".pth", lambda tensors: tensors.update(mask=tensors["mask"].double())),
        r"mask: is torch.float64; the module has torch.float32|JAX would narrow torch.float64",
    ),
    Fault(
        "weight not transposed",
        changed_state(
            ".safetensors",
            lambda tensors: tensors.update(
                {"W_key.weight": tensors["W_key.weight"].T.contiguous()}
            ),
        ),
        r"W_key.weight has shape \(13, 11\)",
    ),
]

DATA_FAULTS = {f"orbax: {fault.name}": fault for fault in ORBAX_DATA}
FAULTS = {
    f"{kind}: {fault.name}": fault
    for kind, table in (
        *(
            ("safetensors", SAFETENSORS),
            ("torch", TORCH),
            ("msgpack", MSGPACK),
            ("sharded", SHARDED),
        ),
        *(("orbax", ORBAX), ("manifest", MANIFEST), ("state", STATE)),
    )
    for fault in table
}
