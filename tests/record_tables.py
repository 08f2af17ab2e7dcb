"""The tables between markers in the READMEs; `python -m tests.record_tables` rewrites them.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. It is made from a record under
`compare/records`, or from the code itself.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from compare.conversion.mapping import ROWS, slashed
from compare.ports.library_ports import PORTS

ROOT = Path(__file__).parent.parent
READMES = sorted(path for path in ROOT.rglob("README.md") if ".venv" not in path.parts)
BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end -->)", flags=re.DOTALL)

Record = dict[str, Any]


def record(name: str, device: str = "cpu") -> Record:
    path = ROOT / f"compare/records/{name}-{device}.json"
    content: Record = json.loads(path.read_text(encoding="utf-8"))
    return content


def first_table(section: Record) -> Record:
    return next(block for block in section["blocks"] if isinstance(block, dict) and "rows" in block)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def mapping() -> str:
    rows = []
    for row in ROWS:
        names = row.torch_key, slashed(row.linen_path), slashed(row.nnx_path)
        rows.append([*(f"`{name}`" for name in names), row.layout, row.kind])
    return table(["torch key", "Linen path", "NNX path", "layout", "kind"], rows)


def bound() -> str:
    campaign, slips = (
        block for block in record("bound")["sections"][0]["blocks"] if "rows" in block
    )
    at_five_tokens = slips["rows"][1]
    rows = [
        [dtype, cases, outside, *(f"{value:.2g}" for value in (*worst, slip))]
        for (dtype, cases, outside, *worst), slip in zip(
            campaign["rows"], at_five_tokens[2:], strict=True
        )
    ]
    columns = ["dtype", "cases", "may overflow", "PyTorch", "Flax Linen", "Flax NNX"]
    return table([*columns, "smallest mistake caught"], rows)


def ports() -> str:
    found = first_table(record("ports")["sections"][1])
    return table(found["columns"], found["rows"])


def mutants() -> str:
    honest, planted = record("mutants")["sections"]
    grid = next(
        block
        for block in planted["blocks"]
        if isinstance(block, dict) and isinstance(block["rows"], dict)
    )
    worst = [max(float(value or 0.0) for value in row) for row in grid["rows"].values()]
    smallest = min(value for value in worst if value > 1.0)  # an error alone caught the others
    caught, tried = (
        sum(int(check["count"].split("/")[index]) for check in planted["checks"])
        for index in (0, 1)
    )
    compared = honest["blocks"][0].split("drawn; ")[1].split()[0]
    largest = max(row[1] for row in honest["blocks"][1]["rows"])
    alarms = f"{len(honest['findings'])} of {compared}"
    columns = ["planted bugs", "in all frameworks", "caught", "smallest error/limit of a bug"]
    row = [planted["title"].split()[0], tried, caught, f"{smallest:.2g}", alarms, f"{largest:.2g}"]
    return table([*columns, "false alarms", "largest error/limit without a bug"], [row])


def mechanical() -> str:
    rows = [
        row
        for name in ("mechanical", "mechanical-compare")
        for row in first_table(record(name)["sections"][0])["rows"]
    ]
    sums = {
        folder: [
            sum(row[column] for row in rows if row[0].startswith(folder)) for column in (1, 2, 3, 4)
        ]
        for folder in ("torch_impl", "flax_impl", "compare/conversion", "compare/checkpoint")
    }
    columns = ["sources", "mechanical bugs", "killed", "marked", "neither"]
    return table(columns, [[f"`{folder}`", *counts] for folder, counts in sums.items()])


def layers() -> str:
    section = record("layers")["sections"][0]
    found = first_table(section)
    return table(found["columns"], found["rows"])


def library_ports() -> str:
    found = first_table(record("library-ports")["sections"][0])
    bugs = {port.model: port.bug for port in PORTS}
    rows = [
        [*row[:-1], "`{}` becomes `{}`".format(*bugs[row[0]]), row[-1]] for row in found["rows"]
    ]
    return table([*found["columns"][:-1], "bug", "its line is the"], rows)


def libraries() -> str:
    classes, names = (first_table(section) for section in record("libraries")["sections"])
    built, same = (sum(row[column] for row in classes["rows"]) for column in (2, 3))
    told = sum(bool(row[-1]) for row in classes["rows"])
    modules, right = (sum(row[column] for row in names["rows"]) for column in (1, 2))
    architectures = len(classes["rows"])
    rows = [
        [
            f"classes of {architectures} architectures, {told} of which need an argument",
            built,
            same,
        ],
        [f"modules of {len(names['rows'])} pairs of models", f"{modules:,}", f"{right:,}"],
    ]
    return table(["what was tried", "how many", "right"], rows)


def campaigns() -> str:
    killed, fuzzed = record("kill"), record("fuzz")
    rows = first_table(killed["sections"][0])["rows"]
    tries, reads, lost = (sum(row[column] for row in rows) for column in (1, 4, 5))
    what = f"`kill -9` during a save, while another process reads {reads:,} times"
    lines = [[what, f"{tries:,}", lost, f"`{killed['command']}`"]]
    rows = first_table(fuzzed["sections"][0])["rows"]
    inputs = sum(int(row[1].replace(",", "")) for row in rows)
    bad = sum(row[-1] for row in rows)
    lines.append(["damaged files read", f"{inputs:,}", bad, f"`{fuzzed['command']}`"])
    return table(["what was tried", "how often", "failures", "command"], lines)


def streaming() -> str:
    section = record("stream")["sections"][0]
    allowed = section["checks"][0]["expected"].split()[2]
    rows = [
        [f"`{source}`", f"`{target}`", peak, allowed]
        for source, target, peak, *_ in first_table(section)["rows"]
    ]
    return table(["from", "to", "peak, MB", "allowed, MB"], rows)


def checkpoints() -> str:
    rows = [
        [job, " to ".join(f"`{word}`" for word in suffix.split(" to ")), plain, ours, ratio]
        for job, suffix, plain, ours, ratio in first_table(record("state")["sections"][0])["rows"]
    ]
    return table(["job", "format", "library, s", "ours, s", "ratio"], rows)


def attention(title: str, device: str = "cpu") -> Callable[[], str]:
    def one_table() -> str:
        sections = record("attention", device)["sections"]
        content = first_table(next(s for s in sections if s["title"].startswith(title)))
        return table(content["columns"], content["rows"])

    return one_table


def contexts(section: int, number: int) -> Callable[[], str]:
    def one_table() -> str:
        blocks = record("contexts")["sections"][section]["blocks"]
        content = [block for block in blocks if isinstance(block, dict)][number]
        return table(content["columns"], content["rows"])

    return one_table


TABLES: dict[str, Callable[[], str]] = {
    "mapping": mapping,
    "bound": bound,
    "mutants": mutants,
    "ports": ports,
    "library-ports": library_ports,
    "mechanical": mechanical,
    "layers": layers,
    "libraries": libraries,
    "campaigns": campaigns,
    "streaming": streaming,
    "checkpoints": checkpoints,
    "attention-forward": attention("causal, float32, forward:"),
    "attention-backward": attention("causal, float32, forward + backward"),
    "attention-ratios": attention("Ratios"),
    "attention-memory": attention("Working memory"),
    "contexts-torch": contexts(0, 0),
    "contexts-mesh": contexts(1, 0),
    "contexts-compile": contexts(1, 1),
    "gpu-float32": attention("causal, float32, forward + backward", "cuda"),
    "gpu-bfloat16": attention("causal, bfloat16, forward + backward", "cuda"),
}


def filled(text: str) -> str:
    """Return the README with every table rewritten."""
    return BLOCK.sub(lambda block: f"{block[1]}{TABLES[block[2]]()}{block[4]}", text)


def main() -> None:
    """Write the tables into every README."""
    for path in READMES:
        text = path.read_text(encoding="utf-8")
        path.write_text(filled(text), encoding="utf-8")


if __name__ == "__main__":
    main()
