"""Files that can be read in two ways, that lead outside, or that take far more than they are."""

import io
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from flax.serialization import msgpack_serialize

import compare
from compare.checkpoint.convert import convert_checkpoint
from compare.checkpoint.formats import open_checkpoint

from .conftest import Command

pytestmark = pytest.mark.filterwarnings("ignore::compare.checkpoint.errors.UnverifiedCheckpoint")
MB = 1_000_000


def zipped(pickled: bytes, **records: bytes) -> None:
    with zipfile.ZipFile("z.pth", "w") as archive:
        for name, data in {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n"}.items():
            archive.writestr(f"a/{name}", data)
        for name, data in records.items():
            archive.writestr(f"a/data/{name.removeprefix('r')}", data)


def declared(opcode: bytes) -> bytes:
    return b"\x80\x02" + opcode


PICKLES = {
    "bytearray of 2 GB": b"\x80\x02}X\x01\0\0\0wcbuiltins\nbytearray\nJ"
    + struct.pack("<i", 2 * 10**9)
    + b"\x85Rs.",
    "bytearray opcode": declared(b"\x96" + struct.pack("<Q", 2 * 10**9) + b"."),
    "text of 2 GB": declared(b"X" + struct.pack("<I", 2 * 10**9) + b"a."),
    "text of 2**60": declared(b"\x8d" + struct.pack("<Q", 2**60) + b"a."),
    "memo of 2**31": declared(b"N" + b"r" + struct.pack("<I", 2**31) + b"."),
    "frame": declared(b"\x95" + struct.pack("<Q", 2**60) + b"N."),
    "sets": declared(b"]" + b"\x8f" * 200_000 + b"."),
    "global os.system": declared(b"cos\nsystem\nX\x04\0\0\0true\x85R."),
    "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93." + b"",
    "inst": b"(S'true'\nios\nsystem\n.",
    "reduce of a dtype": declared(b"ctorch\nfloat32\n)R."),
    "build on a function": declared(b"ctorch._utils\n_rebuild_tensor_v2\n}X\x01\0\0\0xK\x01sb."),
    "two pickles": declared(b"N.") + declared(b"N."),
    "no end": declared(b"]" * 100),
    "hash that takes for ever": declared(b"}N\x85" + b"q\x01h\x01h\x01\x86" * 60 + b"Ns."),
    "hashes that collide": declared(
        b"}("
        + b"".join(
            b"\x8a\x0c" + ((2**61 - 1) * i).to_bytes(12, "little") + b"N" for i in range(1, 50_000)
        )
        + b"u."
    ),
    "sizes again and again": declared(
        b"(" + b"N" * 100_000 + b"tq\x01" + b"ctorch\nSize\nh\x01\x85R" * 10_000 + b"0."
    ),
    "deep": declared(b"]" * 100_000 + b"a" * 99_999 + b"."),
    "class of torch": declared(b"ctorch.nn\nLinear\nK\x01K\x01\x86R."),
}


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_is_looked_through_before_it_is_run(name: str, here: Path) -> None:
    zipped(PICKLES[name])
    start = time.process_time()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(compare.CheckpointError, match=r"not a whole|more than a state|holds a"):
        compare.read_checkpoint("z.pth")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
    assert time.process_time() - start < 5


def test_many_small_objects_are_counted(here: Path) -> None:
    zipped(declared(b"]" * 400_000 + b"."))
    with pytest.raises(compare.CheckpointError, match="memory is needed for its pickle"):
        open_checkpoint("z.pth", memory=50 * MB)


def _entry(method: int, sizes: tuple[int, ...], offset: int) -> bytes:
    numbers = (20, 20, 0, method, 0, 33, *sizes, 0, 0, 0, 0, offset)
    return struct.pack("<4s6H3I5H2I", b"PK\1\2", *numbers)


def two_directories() -> bytes:
    """One directory in front of the end record, another where the end record says."""
    stream = io.BytesIO()
    torch.save({"w": torch.zeros(4)}, stream)
    archive = zipfile.ZipFile(stream)
    pickled = archive.read(archive.namelist()[0]).replace(b"K\4", b"J" + struct.pack("<i", 1 << 20))
    packer = zlib.compressobj(9, 8, -15)
    data = packer.compress(bytes(4 << 20)) + packer.flush()
    crc = zlib.crc32(bytes(4 << 20))
    body, first, second = b"", b"", b""
    for name, content, method, size, checksum in (
        (b"a/data.pkl", pickled, 0, len(pickled), zlib.crc32(pickled)),
        (b"a/byteorder", b"little", 0, 6, zlib.crc32(b"little")),
        (b"a/data/0", data, 8, 4 << 20, crc),
        (b"a/version", b"3\n", 0, 2, zlib.crc32(b"3\n")),
    ):
        sizes = (checksum, len(content), size, len(name), 0)
        first += _entry(0, (checksum, len(content), len(content), len(name), 0), 0) + name
        second += _entry(method, sizes, len(body)) + name
        local = struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, method, 0, 33, *sizes)
        body += local + name + content
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 4, 4, len(first), len(body), 0)
    return body + second + first + end


def _plain() -> bytes:
    stream = io.BytesIO()
    torch.save({"w": torch.arange(4.0)}, stream)
    return stream.getvalue()


def _with_comment(data: bytes) -> bytes:
    return data[:-2] + struct.pack("<H", 3) + b"abc"


def _moved(data: bytes) -> bytes:
    """A byte in front: Python's reader corrects all offsets, another does not."""
    return data[:4] + b"\0" + data[4:]


def _renamed(data: bytes) -> bytes:
    """The header of a record has another name than the directory."""
    return data.replace(b"archive/data/0", b"archive/data/9", 1)


def _cased(data: bytes) -> bytes:
    """Two records whose names differ in case, between which torch does not distinguish."""
    stream = io.BytesIO(data)
    with zipfile.ZipFile(stream, "a") as archive:
        archive.writestr("archive/DATA.pkl", archive.read("archive/data.pkl"))
    return stream.getvalue()


def _other_offset(data: bytes) -> bytes:
    """The locator of the long end record points elsewhere."""
    at = data.rindex(b"PK\6\7")
    return data[: at + 8] + struct.pack("<Q", 5) + data[at + 16 :]


def _twice() -> bytes:
    """The directory where the end record says, and another one right before that record."""
    zipped(b"\x80\x02}.")
    data = Path("z.pth").read_bytes()
    begin, end = data.index(b"PK\1\2"), data.rindex(b"PK\5\6")
    return data[:end] + data[begin:end] + data[end:]


def _other_size() -> bytes:
    """The end record says that the directory is shorter: some readers count back from the end."""
    zipped(b"\x80\x02}.")
    data = Path("z.pth").read_bytes()
    at = data.rindex(b"PK\5\6") + 12
    size = int.from_bytes(data[at : at + 4], "little") - 1
    return data[:at] + struct.pack("<I", size) + data[at + 4 :]


def _short_count(data: bytes) -> bytes:
    at = data.rindex(b"PK\5\6")
    return data[: at + 8] + struct.pack("<2H", 1, 1) + data[at + 12 :]


@pytest.mark.parametrize(
    "make",
    [
        two_directories,
        lambda: _with_comment(_plain()),
        lambda: _moved(_plain()),
        lambda: _renamed(_plain()),
        lambda: _cased(_plain()),
        lambda: _other_offset(_plain()),
        lambda: _short_count(_plain()),
        _twice,
        _other_size,
        lambda: _plain() + b"\0",
        lambda: _plain() + _plain(),
    ],
)
def test_a_zip_that_can_be_read_in_two_ways_is_refused(
    make: Callable[[], bytes], here: Path
) -> None:
    Path("z.pth").write_bytes(make())
    with pytest.raises(compare.CheckpointError, match="not a whole torch file"):
        compare.read_checkpoint("z.pth")


def test_the_views_of_a_storage_count_in_sum(here: Path) -> None:
    base = torch.zeros(8 << 18)
    torch.save({f"w{i}": base.as_strided((16, (8 << 18) - i), (0, 1)) for i in range(3)}, "v.pth")
    with pytest.raises(compare.CheckpointError, match="is an expanded view"):
        compare.read_checkpoint("v.pth")
    torch.save({f"w{i}": base[: (1 << 16) + i] for i in range(2000)}, "v.pth")
    with pytest.raises(compare.CheckpointError, match="is an expanded view"):
        compare.read_checkpoint("v.pth")
    torch.save({f"w{i}": part for i, part in enumerate(base[:4096].chunk(8))}, "v.pth")
    assert len(compare.read_checkpoint("v.pth")) == 8


def test_views_and_old_files_are_read_as_torch_reads_them(here: Path) -> None:
    base = torch.randn(4, 6, 5)
    state = {
        "transposed": base.mT,
        "strided": base[::2, 1:, ::3],
        "expanded": base[:1].expand(3, 6, 5),
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "negative": torch.randn(3, dtype=torch.complex64).conj().imag,
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "half": torch.randn(3).bfloat16(),
        "eight": torch.randn(4).to(torch.float8_e4m3fn),
        "words": torch.tensor([1, 65535], dtype=torch.uint16),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "bools": torch.tensor([True, False]),
        "overlapping": torch.arange(5.0).as_strided((3, 3), (1, 1)),
    }
    for is_zip in (True, False):
        if not is_zip:  # torch itself could not write these before 1.6
            del state["eight"], state["words"]
        torch.save(state, "s.pth", _use_new_zipfile_serialization=is_zip)
        expected = torch.load("s.pth", weights_only=True)
        loaded = compare.read_checkpoint("s.pth")
        assert loaded.keys() == expected.keys()
        for key, tensor in expected.items():
            assert loaded[key].dtype == tensor.dtype, key
            assert torch.equal(loaded[key].view(tensor.dtype), tensor.detach()), key


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-1],
        lambda raw: raw + b"\0",
        lambda raw: raw[:40] + raw[60:],
        lambda raw: raw.replace(b"little_endian", b"little_endiam"),
    ],
)
def test_damaged_old_files(damage: Callable[[bytes], bytes], here: Path) -> None:
    torch.save({"w": torch.ones(3)}, "s.pth", _use_new_zipfile_serialization=False)
    Path("s.pth").write_bytes(damage(Path("s.pth").read_bytes()))
    with pytest.raises(compare.CheckpointError, match=r"not a whole torch|more than a state dict"):
        compare.read_checkpoint("s.pth")


def flat_orbax() -> None:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as saver:
        saver.save(Path("o.orbax").absolute(), args=ocp.args.PyTreeSave({"w": np.arange(4.0)}))


def edit(name: str, **changes: Any) -> None:
    path = Path("o.orbax", name)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", ["{here}/secret", "../secret", "./../secret", "w/../../secret"])
def test_no_name_in_an_orbax_folder_leads_outside(name: str, here: Path, command: Command) -> None:
    flat_orbax()
    Path("o.orbax/w").rename("secret")
    place = name.format(here=here)
    meta = Path("o.orbax/_METADATA")
    text = meta.read_text().replace("('w',)", f"('{place}',)")
    meta.write_text(text.replace('"key": "w"', f'"key": "{place}"'))
    with pytest.raises(compare.CheckpointError, match="outside its folder"):
        open_checkpoint("o.orbax")
    assert command("convert", "o.orbax", "x.safetensors", "--layout", "flax")[0] == 1


@pytest.mark.parametrize("flag", [True, False, None])
def test_a_chunk_that_is_missing_is_missing(flag: bool | None, here: Path) -> None:
    flat_orbax()
    edit("w/.zarray", shape=[50_000_000], chunks=[50_000_000], fill_value=0.0)
    Path("o.orbax/w/0").unlink()
    edit("_METADATA", store_array_data_equal_to_fill_value=flag)
    with open_checkpoint("o.orbax") as stored, pytest.raises(compare.CheckpointError):
        list(stored.read())


def test_a_chunk_is_not_far_larger_than_its_array(here: Path) -> None:
    flat_orbax()
    edit("w/.zarray", chunks=[500_000_000])
    with pytest.raises(compare.CheckpointError, match="lies in chunks larger than itself"):
        open_checkpoint("o.orbax")


def test_an_absent_file_with_a_colon_imports_nothing(here: Path, command: Command) -> None:
    Path("evilmod.py").write_text("open('marker', 'w')")
    for arguments in (["evilmod:model"], ["evilmod:model.safetensors"], ["a.pth", "evilmod:x"]):
        assert command("inspect", *arguments)[0] == 2
    assert not Path("marker").exists()
    Path("mine.py").write_text("import torch\nnet = torch.nn.Linear(2, 2)")
    code, printed = command("inspect", "--module", "mine:net")
    assert (code, "weight parameter 2x2" in printed) == (0, True)
    assert str(here) not in sys.path


def test_a_file_beside_a_download_is_not_imported(here: Path) -> None:
    for name in ("isal", "jinja2", "matplotlib", "safetensors", "evil"):
        Path(f"{name}.py").write_text(f"open('marker-{name}', 'w')")
    root = str(Path(__file__).parents[2])
    script = Path(sys.executable).parent / "attention-parity"
    commands = [[sys.executable, "-m", "compare"], *([[str(script)]] if script.exists() else [])]
    for start, page in zip(commands, (["--html", "r.html"], []), strict=False):
        arguments = ["inspect", "a.safetensors", *page]
        done = subprocess.run(
            [*start, *arguments], env={**os.environ, "PYTHONPATH": root}, capture_output=True
        )
        assert done.returncode == 0, done.stderr
    assert not list(here.glob("marker*"))


def bomb_header() -> None:
    raw = b'{"a":{"dtype":"F32","shape":[' + b"{}," * 1_000_000 + b'1],"data_offsets":[0,4]}}'
    Path("b.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(4))


def bomb_lists() -> None:
    raw = b"\x81\xa1a\xdd" + struct.pack(">I", 3_000_000) + b"\x80" * 3_000_000
    Path("b.msgpack").write_bytes(raw)


def bomb_maps() -> None:
    names = b"".join(b"\xce" + struct.pack(">I", 2**31 + i) + b"\x80" for i in range(200_000))
    Path("b.msgpack").write_bytes(b"\xdf" + struct.pack(">I", 200_000) + names)


def sparse(suffix: str, begin: bytes) -> Callable[[], None]:
    def make() -> None:
        with Path(f"b.{suffix}").open("wb") as stream:
            stream.write(begin)
            stream.truncate(3 << 30)

    return make


def legacy_text() -> None:
    """An old torch file whose state is a text of 2 GB."""
    torch.save({}, "b.pth", _use_new_zipfile_serialization=False)
    raw = Path("b.pth").read_bytes()
    with Path("b.pth").open("wb") as stream:
        stream.write(raw[: raw.index(b"\x80\x02}q\x00.")])
        stream.write(b"\x80\x02X" + struct.pack("<I", 2**31 - 1))
        stream.truncate(3 << 30)


def mapping_bomb() -> None:
    Path("b.json").write_bytes(b"[" + b"[]," * 20_000_000 + b"[]]")


BOMBS = {
    "header of empty objects": (bomb_header, "inspect b.safetensors"),
    "list of maps": (bomb_lists, "inspect b.msgpack"),
    "map of maps": (bomb_maps, "inspect b.msgpack --memory 100"),
    "sparse torch": (sparse("pth", b"\x80\x02"), "inspect b.pth"),
    "sparse msgpack": (sparse("msgpack", b"\x81\xa1a\xc6\xbf\xff\xff\xff"), "inspect b.msgpack"),
    "text in an old torch file": (legacy_text, "inspect b.pth --memory 200"),
    "mapping": (mapping_bomb, "convert a.pth o.msgpack --map b.json --memory 300"),
}


SCRIPT = """
import json, resource, sys
import compare.checkpoint.convert, compare.commands.inspect, compare.report.plots
from compare.cli import app
peaks = []
for line in json.loads(sys.argv[1]):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        app(line.split())
    except SystemExit as end:
        peaks.append((end.code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
print(json.dumps(peaks))
"""


def test_a_small_file_takes_little_memory(here: Path) -> None:
    """A process that reads all of them takes at most 300 MB more for each."""
    lines = []
    for number, (make, line) in enumerate(BOMBS.values()):
        make()
        for made in here.glob("b.*"):
            made.rename(f"b{number}{made.suffix}")
        lines.append(line.replace(" b.", f" b{number}."))
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", SCRIPT, json.dumps(lines)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    peaks = dict(zip(BOMBS, json.loads(done.stdout.splitlines()[-1]), strict=True))
    assert "Traceback" not in done.stderr
    for name, (code, kilobytes) in peaks.items():
        assert code == 1, name
        assert kilobytes < 300_000, name


@pytest.mark.parametrize("suffix", ["pth", "safetensors", "msgpack", "orbax"])
def test_the_budget_has_both_numbers(suffix: str, here: Path, command: Command) -> None:
    is_flax = suffix in ("msgpack", "orbax")
    array = np.ones(500_000, np.float32)
    state = {"params": {"w": array}} if is_flax else {"w": torch.from_numpy(array)}
    compare.save_checkpoint(f"big.{suffix}", state)
    with open_checkpoint(f"big.{suffix}", memory=MB) as stored:  # noqa: SIM117
        with pytest.raises(compare.CheckpointError, match=r"at most [\d,]+ bytes; found 2,000,000"):
            list(stored.read())
    code, printed = command("verify", f"big.{suffix}", f"big.{suffix}", "--memory", 1)
    assert (code, "more with --memory" in printed) == (1, True)
    assert command("verify", f"big.{suffix}", f"big.{suffix}", "--memory", 100)[0] == 0


def test_a_large_file_is_inspected_in_parts(here: Path, command: Command) -> None:
    for name in ("a", "b"):
        torch.save({f"w{i}": torch.full((1000, 2500), float(i)) for i in range(8)}, f"{name}.pth")
    compare.save_checkpoint(
        "c.safetensors", {f"w{i}": torch.ones(1000, 2500) * i for i in range(8)}
    )
    for arguments in (["a.pth"], ["a.pth", "b.pth"], ["a.pth", "c.safetensors"]):
        code, printed = command("inspect", *arguments, "--memory", 20)
        assert code == 0, printed


def test_pickles_of_a_state_dict_still_load(here: Path) -> None:
    """A pickle of protocol 2 without torch's zip is not a torch file."""
    Path("p.pth").write_bytes(pickle.dumps({"w": [1.0]}, protocol=2))
    with pytest.raises(compare.CheckpointError, match="more than a state dict"):
        compare.read_checkpoint("p.pth")


def test_what_lies_between_the_elements_of_a_view_counts_too(here: Path) -> None:
    torch.save({"w": torch.zeros(5_000_000)[::4_999_999]}, "w.pth")
    with (
        open_checkpoint("w.pth", memory=10 * MB) as stored,
        pytest.raises(compare.CheckpointError, match="more memory is needed for"),
    ):
        list(stored.read())


def test_a_long_name_over_many_arrays_counts_for_each(here: Path) -> None:
    zero = np.zeros(1, np.float32)
    tree = {"k" * 300_000: {f"n{i}": zero for i in range(400)}}
    Path("long.msgpack").write_bytes(msgpack_serialize(tree))
    with pytest.raises(compare.CheckpointError, match="memory is needed for its names"):
        open_checkpoint("long.msgpack", memory=50 * MB)


def test_a_format_that_is_written_as_a_whole_is_counted_as_a_whole(here: Path) -> None:
    state = {f"w{i}": torch.ones(250_000) for i in range(30)}
    compare.save_checkpoint("big.safetensors", state)
    with pytest.raises(compare.CheckpointError, match="file as a whole than is allowed"):
        convert_checkpoint("big.safetensors", "big.pth", memory=20 * MB)
    convert_checkpoint("big.safetensors", "other.safetensors", memory=20 * MB)


def test_metadata_beside_many_tensors_takes_no_time(here: Path) -> None:
    count = 20_000
    entries: dict[str, Any] = {
        f"n{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(count)
    }
    entries["__metadata__"] = {f"t{i}": "x" for i in range(count)}
    raw = json.dumps(entries).encode()
    Path("m.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw)
    start = time.process_time()
    open_checkpoint("m.safetensors").close()
    assert time.process_time() - start < 3


@pytest.mark.parametrize("name", ["tab\tb.pth", "имя.pth", "b b.pth"])
def test_a_file_of_any_name_is_read(name: str, here: Path) -> None:
    torch.save({"w": torch.ones(2)}, name)  # torch puts the name into the records
    assert torch.equal(compare.read_checkpoint(name)["w"], torch.ones(2))


def test_a_small_expanded_mask_is_read(here: Path) -> None:
    torch.save({"mask": torch.ones(1, 1).expand(256, 256)}, "m.pth")
    assert compare.read_checkpoint("m.pth")["mask"].shape == (256, 256)


def test_copies_of_a_tensor_count(here: Path) -> None:
    """Comparing holds both sides, reading another layout holds both layouts, a cast both dtypes."""
    source = torch.nn.ModuleDict({"a": torch.nn.Linear(500, 600, bias=False)})
    template = {"params": {"a": {"kernel": np.zeros((500, 600), np.float32)}}}
    mapping = compare.match(source, template)
    torch_file = compare.save_checkpoint("big.safetensors", source, mapping=mapping)
    compare.convert_checkpoint(torch_file, "big.msgpack")
    size, one_and_a_half = 1_200_000, 1_800_000

    def convert(dtype: str | None, memory: int) -> object:
        return compare.convert_checkpoint(
            torch_file, "new.msgpack", mapping=mapping, dtype=dtype, memory=memory
        )

    convert(None, one_and_a_half)
    for work, enough in (
        (lambda memory: compare.verify_checkpoint(torch_file, torch_file, memory=memory), 3),
        (lambda memory: compare.read_checkpoint("big.msgpack", memory=memory), 3),
        (lambda memory: convert("float64", memory), 5),
    ):
        with pytest.raises(compare.CheckpointError, match="more memory is needed"):
            work(one_and_a_half)
        work(enough * size)
