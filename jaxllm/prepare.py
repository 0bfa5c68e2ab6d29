"""Prepares the data of an experiment: text to a tokenizer and packed rows on disk.

If they are there and fresh it makes nothing, and compares them with the hashes of what was written.

  python -m jaxllm.prepare --config configs/NAME.py [--config.a.b=value ...] [--workdir DIR] [--show N] [--force]

`train` does the same by itself.
"""

import numpy as np
from absl import flags
from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from jaxllm import command
from jaxllm.data import order
from jaxllm.data.prepare import Prepared, place, prepare


def main(arguments: list[str]) -> None:
    del arguments
    config, workdir = command.experiment()
    console = Console(highlight=False)
    prepared = prepare(
        config, place(config, workdir), force=flags.FLAGS.force, log=lambda line: console.print(Text(line), soft_wrap=True)
    )
    for split in (prepared.train, prepared.validation):
        split.verify()
    if flags.FLAGS.show:
        for row in order.batch_rows(len(prepared.train), flags.FLAGS.show, config.seed, 0):
            show_row(console, prepared, int(row))
    console.print(table(prepared))
    console.print(Text(remarks(prepared)), soft_wrap=True)


def show_row(console: Console, prepared: Prepared, row: int) -> None:
    """Prints a training row as text, a line between its documents."""
    arrays = {name: array[0] for name, array in prepared.train.rows(np.array([row])).items()}
    tokens = [*arrays["tokens"].tolist(), int(arrays["targets"][-1])]
    segments = arrays["segments"]
    # The last token is only a target: it belongs to the last document where that target counts, and else starts the next one.
    segments = [*segments.tolist(), int(segments[-1] + (segments[-1] > 0 and not arrays["weights"][-1]))]
    console.print(Rule(f"row {row:,}: {len(tokens) - 1} predictions, {int(arrays['weights'].sum())} of weight 1", align="left"))
    for number in dict.fromkeys(segments):
        mine = [token for token, segment in zip(tokens, segments, strict=True) if segment == number]
        name = f"document {number}" if number else "padding"
        console.print(Rule(f"{name}, {len(mine)} tokens", align="left", characters="·", style="dim"))
        if number:
            console.print(Text(prepared.tokenizer.decode(mine)), soft_wrap=True)


def table(prepared: Prepared) -> Table:
    """The counts of the two splits side by side."""
    train, validation = prepared.train, prepared.validation
    shown = Table("", box=box.SIMPLE_HEAD, title=f"data in {prepared.directory}", title_justify="left", title_style="bold")
    for name in ("train", "validation"):
        shown.add_column(name, justify="right")
    lines = {
        "documents": (f"{split.documents:,}" for split in (train, validation)),
        "text": (decimal(split.text_bytes) for split in (train, validation)),
        "tokens": (f"{split.tokens:,}" for split in (train, validation)),
        "bytes a token": (f"{split.bytes_per_token:.2f}" for split in (train, validation)),
        f"rows of {train.row_tokens:,} tokens": (f"{len(split):,}" for split in (train, validation)),
        "weighted predictions": (f"{split.weighted_tokens / (len(split) * split.row_tokens):.2%}" for split in (train, validation)),
        "files": (decimal(split.bytes) for split in (train, validation)),
    }
    for name, cells in lines.items():
        shown.add_row(name, *cells)
    return shown


def remarks(prepared: Prepared) -> str:
    """What the table leaves out: dropped documents, the tokenizer, and when all this was made."""
    record = prepared.record
    lines = []
    for field, count in record["documents"].items():
        dropped = ", ".join(f"{number:,} by {reason}" for reason, number in count["dropped"].items()) or "none"
        lines.append(
            f"{field} {record['recipe'][field]}: read {count['read']:,} documents, kept {count['kept']:,}, dropped {dropped}"
        )
    tokenizer = record["tokenizer"]
    lines.append(
        f"tokenizer {record['recipe']['tokenizer.kind']}: {tokenizer['vocab_size']:,} tokens, {tokenizer['fingerprint'][:16]}"
    )
    return "\n".join([*lines, f"prepared {record['prepared']} in {record['secs']} s by jaxllm {record['versions']['jaxllm']}"])


if __name__ == "__main__":
    command.define_flags()
    flags.DEFINE_integer(
        "show", 0, "print this many rows of the first training batch, with their documents' borders", lower_bound=0
    )
    flags.DEFINE_bool("force", False, "prepare again, even if the data is fresh")
    command.run(main)
