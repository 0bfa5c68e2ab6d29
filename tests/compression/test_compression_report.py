"""The report of a compression: its table, its picture and its file."""

import dataclasses
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from jaxllm.compression import report

NAMES = [f"{stack}/layers/{part}/kernel" for stack in ("encoder", "decoder") for part in ("attention/q", "attention/v", "mlp/up")]
KERNELS = [
    report.KernelError(layer, name, 0.01 * (index + layer + 1), 0.035 * (layer + 1))
    for layer in range(3)
    for index, name in enumerate(NAMES)
]
MEASURED = {
    "metric": "token perplexity (window 8)",
    "data": "text",
    "perplexity": 20.0,
    "loss": 3.0,
    "accuracy": 0.5,
    "tokens_per_sec": 4.0,
}


def made(**fields: object) -> report.Report:
    return dataclasses.replace(
        report.Report(
            "model", "gptq, 4 bits", "8 rows", KERNELS, 4000, 1000, MEASURED, MEASURED | {"perplexity": 25.0}, {"jax": "1"}
        ),
        **fields,
    )


def text(each: report.Report) -> str:
    console = Console(file=io.StringIO(), width=100)
    report.show(each, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table_counts_over_the_layers() -> None:
    shown = text(made())
    row = next(line for line in shown.splitlines() if "encoder/mlp/up" in line or "encoder/layers/mlp/up" in line)
    # Errors of 3, 4 and 5 % beside 3.5, 7 and 10.5 %.
    assert [cell.strip() for cell in row.strip("│").split("│")][1:] == ["4.00%", "5.00%", "7.00%", "3 of 3"]
    assert made().better() == sum(index + layer + 1 < 3.5 * (layer + 1) for layer in range(3) for index in range(6)) == 14
    changes = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:5]] for line in shown.splitlines() if "│" in line
    }
    assert changes["parameters on a device"] == ["3.91 KiB", "1000 B", "0.250"]
    assert changes["perplexity"] == ["20.000", "25.000", "1.250"]
    assert "token perplexity (window 8), on text" in shown


def test_what_was_not_measured_is_not_shown(tmp_path: Path) -> None:
    bare = made(kernels=(), before={}, after={})
    assert "perplexity" not in text(bare) and "nearest" not in text(bare)
    bare.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {report.JSON, report.PNG}


def test_what_is_written_is_what_was_found(tmp_path: Path) -> None:
    made().save(tmp_path)
    fields = json.loads((tmp_path / report.JSON).read_text("utf-8"))
    assert fields["kernels"][4] == KERNELS[4]._asdict() and fields["after"]["perplexity"] == 25
    first = (tmp_path / report.PNG).read_bytes()
    assert first.startswith(b"\x89PNG")
    made().save(tmp_path)
    assert (tmp_path / report.PNG).read_bytes() == first
    for change in ({"kernels": [each._replace(error=each.error / 2) for each in KERNELS]}, {"bytes_after": 3000}):
        made(**change).save(tmp_path)
        assert (tmp_path / report.PNG).read_bytes() != first


@pytest.mark.parametrize(
    ("names", "short"), [(["layers/mlp/up/kernel"], ["up"]), (NAMES[:1] + NAMES[3:4], ["encoder/layers/attention/q"])]
)
def test_names_are_as_short_as_they_can_be(names: list[str], short: list[str]) -> None:
    assert [report.short(name, names) for name in names][: len(short)] == short
