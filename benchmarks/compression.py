"""One model by every method of jaxllm.quantize, in 8, 4 and 3 bits: perplexity, bytes and the errors of its kernels.

    python benchmarks/compression.py --model MODEL --calibrate TEXT --evaluate TEXT --to DIRECTORY [--rows 32] [--tokens 256]

Each case is a process of its own, `python -m jaxllm.quantize ... --to DIRECTORY/CASE`. A case whose report is there is not run again, so
that a run that was ended goes on; --only names some. DIRECTORY then has compression.md, compression.png and compression.json. --group: of
the cases with groups; it must divide the inputs of the kernels.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.report import canvas


class Case(NamedTuple):
    """grouped: inputs share scales in groups, else all inputs of an output share one. zeros: not symmetric."""

    method: str
    bits: int
    grouped: bool
    zeros: bool = False

    @property
    def name(self) -> str:
        return f"{self.method}_{self.bits}{'_grouped' if self.grouped else ''}{'_zeros' if self.zeros else ''}"


DATA = ("clip", "gptq", "awq", "awq+gptq")
CASES = [
    Case("nearest", 8, False),
    Case("gptq", 8, False),
    Case("smoothquant", 8, False),
    Case("nf4", 4, False),
    *(Case(method, 4, True) for method in ("nearest", *DATA)),
    *(Case(method, 4, False) for method in ("nearest", "gptq", "awq")),
    *(Case(method, 3, True, zeros) for zeros in (False, True) for method in ("nearest", *DATA)),
    *(Case(method, 3, False, zeros=True) for method in ("nearest", "gptq", "awq")),
]


def run(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """The report of a case, with the seconds that it took."""
    target = args.to / case.name
    if not (target / "compression.json").is_file():
        began = time.perf_counter()
        flags = [f"--model={args.model}", f"--to={target}", f"--method={case.method}", f"--evaluate={args.evaluate}"]
        if case.method not in ("nf4", "smoothquant"):
            flags += [f"--bits={case.bits}", f"--group={args.group if case.grouped else 0}", f"--symmetric={not case.zeros}"]
        if case.method != "nf4":
            flags += [f"--calibrate={args.calibrate}", f"--rows={args.rows}", f"--tokens={args.tokens}"]
        subprocess.run([sys.executable, "-m", "jaxllm.quantize", *flags], check=True, stdout=subprocess.DEVNULL)
        (target / "secs").write_text(f"{time.perf_counter() - began:.1f}\n")
    return json.loads((target / "compression.json").read_text()) | {"secs": float((target / "secs").read_text())}


def row(case: Case, group: int, report: dict[str, Any]) -> list[str]:
    """Of the table."""
    kernels = report["kernels"]
    errors = [each["error"] for each in kernels]
    speeds = [report[when].get("tokens_per_sec") for when in ("after", "before")]
    return [
        str(case.bits),
        "scale and zero of 64" if case.method == "nf4" else str(group) if case.grouped else "all",
        case.method + (", zeros" if case.zeros else ""),
        f"{report['after']['perplexity']:.2f}",
        f"{report['after']['loss'] - report['before']['loss']:+.4f}",
        f"{statistics.median(errors):.2%}" if errors else "",
        f"{max(errors):.2%}" if errors else "",
        f"{sum(each['error'] < each['nearest'] for each in kernels)} of {len(kernels)}" if errors else "",
        f"{report['bytes_after'] / 2**20:.0f}",
        f"{speeds[0] / speeds[1]:.2f}" if all(speeds) else "",
        f"{report['secs']:.0f}",
    ]


COLUMNS = ("bits", "group", "method", "perplexity", "loss", "median error", "largest", "below nearest", "MiB", "speed", "s")


def table(rows: list[list[str]]) -> str:
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def picture(found: list[tuple[Case, dict[str, Any]]], metric: str) -> bytes:
    """PNG: the perplexity of each case."""
    theme = canvas.LIGHT
    drawn = canvas.figure(theme, 7.5, 0.3 * len(found) + 1.4)
    axes = drawn.add_subplot()
    canvas.dress(axes, theme, metric.partition(" (")[0], "", "")
    values = [report["after"]["perplexity"] for _, report in found]
    axes.barh([case.name.replace("_", " ") for case, _ in found], values, color=theme.lines[0])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(found[0][1]["before"]["perplexity"], color=theme.faint, linestyle=(0, (4, 2)), linewidth=1.0)
    for place, value in enumerate(values):
        axes.text(value, place, f" {value:.2f}", va="center", fontsize=8, color=theme.ink)
    axes.set_xlim(right=max(values) * 1.3)
    return canvas.png(drawn)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "calibrate", "evaluate"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--to", required=True, type=Path)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--only", nargs="*", default=[case.name for case in CASES], choices=[case.name for case in CASES])
    args = parser.parse_args()
    args.to.mkdir(parents=True, exist_ok=True)
    found = []
    for case in CASES:
        if case.name in args.only:
            found.append((case, run(case, args)))
            print(" ".join(row(case, args.group, found[-1][1])), flush=True)
    before = found[0][1]["before"]
    size = found[0][1]["bytes_before"] / 2**20
    first = f"{before['metric']}, {before['tokens']:,} tokens: {before['perplexity']:.2f} before, in {size:.0f} MiB.\n\n"
    (args.to / "compression.md").write_text(first + table([row(case, args.group, report) for case, report in found]))
    (args.to / "compression.json").write_text(json.dumps({case.name: report for case, report in found}, indent=1) + "\n")
    (args.to / "compression.png").write_bytes(picture(found, before["metric"]))
    print(first + table([row(case, args.group, report) for case, report in found]))


if __name__ == "__main__":
    main()
