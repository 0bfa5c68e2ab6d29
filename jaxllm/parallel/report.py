"""The sharding report as tables: where each parameter lies, what a device holds of the training state, and what a step moves."""

from collections.abc import Iterable, Mapping
from typing import Any

from jax.sharding import PartitionSpec
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from jaxllm.parallel.forms import Form
from jaxllm.parallel.layout import Entry
from jaxllm.parallel.traffic import Difference, Row

_MIB, _KIB = 2**20, 2**10


def parameters(entries: Iterable[Entry], mesh_shape: Mapping[str, int]) -> Table:
    """One row a parameter, in two lines: its name over its logical axes, its shape over its PartitionSpec."""
    table = _table("Parameters", "parameter\n  logical axes", "shape\n  PartitionSpec", ">parts", ">on a device")
    for entry in entries:
        name = entry.name + (f"  ({entry.layers} layers)" if entry.layers > 1 else "")
        shape = " x ".join(f"{size:,}" for size in entry.shape)
        spec = f"P({', '.join(_dimension(part, mesh_shape) for part in _padded(entry.spec, len(entry.shape)))})"
        table.add_row(
            _two(name, ", ".join(entry.axes)),
            _two(shape, spec),
            f"{entry.parts:,}",
            size_text(entry.bytes),
        )
    return table


def forms(found: Iterable[Form]) -> Table:
    """One row a form of parameters."""
    table = _table("Parameters by form", "what", "", ">weights", ">bits a weight", ">on a device")
    for form in found:
        table.add_row(
            form.what, "trained" if form.trained else "frozen", f"{form.weights:,}", f"{form.bits:.3f}", size_text(form.bytes)
        )
    return table


def memory(sizes: Mapping[str, int], textbook: Mapping[str, float], uncut: Mapping[str, Mapping[str, float]]) -> Table:
    """One row a category of bytes: on a device, what ZeRO's formula gives, and the share that each mesh axis leaves whole."""
    axes = list(dict.fromkeys(axis for shares in uncut.values() for axis in shares))
    title = "Memory of a device, by formula (activations and temporaries come on top)"
    table = _table(title, "", ">on a device", ">ZeRO's formula", *(f">not cut by {axis}" for axis in axes))
    for name, size in sizes.items():
        formula = size_text(textbook[name]) if name in textbook else ""
        shares = [uncut[name].get(axis) if name in uncut else None for axis in axes]
        table.add_row(name, size_text(size), formula, *("" if share is None else share_text(share) for share in shares))
    table.add_section()
    table.add_row("together", size_text(sum(sizes.values())), size_text(sum(textbook.values())) if textbook else "")
    return table


def traffic(rows: Iterable[Row], note: str = "") -> Table:
    """What a step moves; bytes of whole arrays on one device, and what it sends by the ring algorithms. note: written below."""
    table = _table("What a step moves, predicted", "what", "how", "over", ">arrays", ">bytes", ">a device sends")
    for row in rows:
        table.add_row(row.what, row.kind, " x ".join(row.axes), f"{row.arrays:,}", size_text(row.bytes), size_text(row.sent))
    table.caption, table.caption_justify = note or None, "left"
    return table


def comparison(differences: Iterable[Difference]) -> Table:
    """Predicted beside found in the compiled program."""
    table = _table("What a step moves, predicted and found", "how", "over", ">arrays", ">found", ">bytes", ">found", "")
    for (kind, axes), predicted, found in differences:
        verdict = "equal" if predicted == found else "bytes equal" if predicted.bytes == found.bytes else "differs"
        if not predicted.arrays and found.bytes < _KIB:
            verdict = "under 1 KiB"  # single numbers, of which XLA's GPU compiler makes a vector
        numbers = (f"{number:,}" for number in (predicted.arrays, found.arrays, predicted.bytes, found.bytes))
        table.add_row(kind, " x ".join(axes), *numbers, verdict)
    return table


def size_text(size: float) -> str:
    """Of bytes: "12.3 MiB", or KiB and B below a tenth of one."""
    if size >= 0.1 * _MIB:
        return f"{size / _MIB:,.1f} MiB"
    return f"{size / _KIB:,.1f} KiB" if size >= 0.1 * _KIB else f"{size:,.0f} B"


def share_text(share: float) -> str:
    """In percent; what is not nothing does not look like it."""
    return "0" if not share else f"{100 * share:.1f} %" if share >= 0.001 else f"{100 * share:.1g} %"


def group(*tables: Any) -> Group:
    """The tables with a line between them."""
    return Group(*(Padding(table, (0, 0, 1, 0)) for table in tables))


def _table(title: str, *columns: str) -> Table:
    """Columns whose name begins with > are numbers."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left", overflow="fold")
    return table


def _two(first: str, second: str) -> Text:
    return Text.assemble(first, "\n  ", (second, "dim"))


def _padded(spec: PartitionSpec, rank: int) -> tuple[Any, ...]:
    return (*spec, *[None] * (rank - len(spec)))


def _dimension(part: Any, mesh_shape: Mapping[str, int]) -> str:
    names = [] if part is None else [part] if isinstance(part, str) else list(part)
    return " x ".join(name for name in names if mesh_shape[name] > 1) or "-"
