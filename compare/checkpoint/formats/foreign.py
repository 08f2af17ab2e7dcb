"""Files of other programs, told by how they begin, and how to get at what they hold."""

import shlex
from pathlib import Path
from typing import NamedTuple

from ..errors import CheckpointError

_SAVE = "and save them by name with torch.save or safetensors.torch.save_file"


class _Kind(NamedTuple):
    name: str
    mend: str


_KINDS = {
    b"GGUF": _Kind("a GGUF file of llama.cpp", "take the safetensors that it was made from"),
    b"\x93NUMPY": _Kind("a NumPy array", f"read it with numpy.load {_SAVE}"),
    b"\x89HDF\r\n\x1a\n": _Kind(
        "an HDF5 file, as Keras and h5py write", f"read its arrays {_SAVE}"
    ),
    b"\x1f\x8b": _Kind("a gzip file", "unpack it: gunzip --stdout {path} > NEW"),
    b"\x28\xb5\x2f\xfd": _Kind("a Zstandard file", "unpack it: unzstd --stdout {path} > NEW"),
    b"\xfd7zXZ\0": _Kind("an xz file", "unpack it: unxz --stdout {path} > NEW"),
    b"BZh": _Kind("a bzip2 file", "unpack it: bunzip2 --stdout {path} > NEW"),
    b"7z\xbc\xaf\x27\x1c": _Kind("a 7z file", "unpack it: 7z x {path}"),
    b"version https://git-lfs": _Kind("a pointer of Git LFS", "fetch the file: git lfs pull"),
    b"<!DOCTYPE html": _Kind("a web page", "download the file itself"),
    b"<html": _Kind("a web page", "download the file itself"),
}
_NPZ = _Kind("a NumPy archive", f"read its arrays with numpy.load {_SAVE}")
_TAR = _Kind("a tar file", "unpack it: tar -xf {path}")
_HEAD = 512


def require_own(path: Path) -> None:
    """Raise if the file is of another program.

    Raises:
        CheckpointError: it is, and the error says which, and what to do.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(_HEAD)
    except OSError:
        return  # whoever reads it says so
    kind = _kind_of(head)
    if kind is not None:
        raise CheckpointError(
            path,
            f"is {kind.name}",
            expected="a checkpoint of torch, safetensors or Flax",
            found=kind.name,
            mend=kind.mend.format(path=shlex.quote(str(path))),
            is_usage=True,
        )


def _kind_of(head: bytes) -> _Kind | None:
    # The first eight bytes of safetensors are a length, which may be any; a brace follows.
    if head[8:9] == b"{" and not head.startswith(b"<"):
        return None
    for begin, kind in _KINDS.items():
        if head.lower().startswith(begin.lower()):
            return kind
    name_length = int.from_bytes(head[26:28], "little")
    if head.startswith(b"PK\3\4") and head[30 : 30 + name_length].endswith(b".npy"):
        return _NPZ
    return _TAR if head[257:262] == b"ustar" else None
