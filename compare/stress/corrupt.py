"""Valid checkpoints, and random changes of them: bytes, and structure where the format checks its bytes itself."""

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import save_checkpoint
from ..checkpoint.convert import convert_checkpoint

FORMATS = ("safetensors", "msgpack", "torch", "sharded", "orbax")
_NAMES = ("mask", "W_query.weight", "W_key.weight", "W_value.weight")
_INTERESTING = (
    0,
    1,
    7,
    8,
    127,
    128,
    255,
    256,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**62,
    2**63,
    2**64 - 1,
)
_WORDS: tuple[Any, ...] = (
    *(
        None,
        True,
        -1,
        0,
        1,
        2**31,
        2**62,
        2**70,
        1e308,
        "",
        "F32",
        "F64",
        "BOOL",
        "float32",
        "int4",
        "../x",
        "\0",
    ),
    *(
        [],
        [0],
        [2**62, 0],
        [-1],
        [7, 7],
        {},
        {"a": 1},
        [[]],
        "mask",
        "W_key.weight",
        "torch",
        "linen",
    ),
)


def state() -> dict[str, torch.Tensor]:
    """Return what the valid checkpoints hold."""
    torch.manual_seed(0)
    return {name: torch.randn(3, 3) for name in _NAMES}


def seeds(folder: Path, kind: str) -> list[Path]:
    """Write the valid checkpoints of a format: with our manifest, and as the plain library has them."""
    if kind == "sharded":
        source = save_checkpoint(folder / "state.safetensors", state())
        convert_checkpoint(source, folder / "shards", shard_bytes=80)
        source.unlink()
        return [folder / "shards"]
    suffix = {
        "safetensors": ".safetensors",
        "msgpack": ".msgpack",
        "torch": ".pth",
        "orbax": ".orbax",
    }[kind]
    written = [save_checkpoint(folder / f"state{suffix}", state())]
    if kind == "torch":
        torch.save(state(), folder / "plain.pth")
        torch.save(state(), folder / "old.pth", _use_new_zipfile_serialization=False)
        written += [folder / "plain.pth", folder / "old.pth"]
    if kind == "safetensors":
        from safetensors.torch import save_file

        save_file(state(), folder / "plain.safetensors")
        written.append(folder / "plain.safetensors")
    return written


def mutated(kind: str, data: bytes, draw: random.Random) -> bytes:
    """Return the file's bytes, changed."""
    if draw.random() < 0.5:
        try:
            return {"safetensors": _header, "torch": _record, "sharded": _json, "orbax": _json}[
                kind
            ](data, draw)
        except (KeyError, ValueError, zipfile.BadZipFile, struct.error, IndexError):
            pass  # it has no such structure, or none left
    for _ in range(draw.choice((1, 1, 1, 2, 4, 16))):
        data = draw.choice(_CHANGES)(data, draw)
    return data


def _flip(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data) or 1)
    return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :] if data else data


def _cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data) + 1)]


def _insert(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data) + 1)
    return data[:at] + draw.randbytes(draw.choice((1, 2, 8, 64))) + data[at:]


def _remove(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data) + 1)
    return data[:at] + data[at + draw.choice((1, 2, 8, 64)) :]


def _copy(data: bytes, draw: random.Random) -> bytes:
    begin, at = draw.randrange(len(data) + 1), draw.randrange(len(data) + 1)
    return data[:at] + data[begin : begin + draw.choice((4, 16, 128))] + data[at:]


def _number(data: bytes, draw: random.Random) -> bytes:
    width, order = draw.choice((1, 2, 4, 8)), draw.choice(("little", "big"))
    value = (draw.choice(_INTERESTING) % 256**width).to_bytes(width, order)
    at = draw.randrange(len(data) + 1)
    return data[:at] + value + data[at + width :]


_CHANGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _flip,
    _flip,
    _cut,
    _insert,
    _remove,
    _copy,
    _number,
)


def _header(data: bytes, draw: random.Random) -> bytes:
    """Change the JSON of a safetensors header, and say its length rightly."""
    length = int.from_bytes(data[:8], "little")
    raw = _json(data[8 : 8 + length], draw)
    return len(raw).to_bytes(8, "little") + raw + data[8 + length :]


def _record(data: bytes, draw: random.Random) -> bytes:
    """Change a record of a zip, and pack it anew, so that its checksum is right."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w") as new:
        chosen = draw.choice(old.namelist())
        for name in old.namelist():
            content = old.read(name)
            if name == chosen:
                content = (
                    _json(content, draw)
                    if name.endswith(".json")
                    else draw.choice(_CHANGES)(content, draw)
                )
            new.writestr(zipfile.ZipInfo(name), content)
    return stream.getvalue()


def _json(data: bytes, draw: random.Random) -> bytes:
    """Change one place in JSON, or in JSON within it."""
    root: Any = {"": json.loads(data)}
    holder: Any = root
    key: Any = ""
    while isinstance(holder[key], dict | list) and holder[key] and draw.random() < 0.85:
        holder = holder[key]
        key = draw.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    found = holder[key]
    if isinstance(found, str) and found[:1] == "{" and draw.random() < 0.9:
        holder[key] = _json(found.encode(), draw).decode()
    elif draw.random() < 0.2:
        del holder[key]
    elif isinstance(holder, dict) and draw.random() < 0.2:
        holder[draw.choice(("mask", "x", "W_key.weight", "__metadata__"))] = holder.pop(key)
    else:
        holder[key] = draw.choice(_WORDS)
    return json.dumps(next(iter(root.values()), None)).encode()
