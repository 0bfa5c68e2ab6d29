"""Prepares the data of an experiment: text to a tokenizer and packed rows on disk.

If they are there and fresh it makes nothing, and compares them with the hashes of what was written.

  python -m jaxllm.prepare --config configs/NAME.py [--config.a.b=value ...] [--workdir DIR] [--show N] [--force]

`train` does the same by itself.
"""

from absl import flags
from ml_collections import ConfigDict
from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from jaxllm import command
from jaxllm.data import examples, mixture, order
from jaxllm.data.prepare import Prepared, place, prepare


def main(arguments: list[str]) -> None:
    del arguments
    config, workdir = command.experiment()
    console = Console(highlight=False)
    prepared = prepare(
        config, place(config, workdir), force=flags.FLAGS.force, log=lambda line: console.print(Text(line), soft_wrap=True)
    )
    for split in prepared.splits.values():
        split.verify()
    if flags.FLAGS.show:
        show_rows(console, config, prepared, flags.FLAGS.show)
    console.print(table(prepared))
    console.print(Text(remarks(prepared)), soft_wrap=True)
    if prepared.replay is not None:
        console.print(Text(mixture.describe(config, prepared.train, prepared.replay)), soft_wrap=True)


def show_rows(console: Console, config: ConfigDict, prepared: Prepared, count: int) -> None:
    """Prints the first `count` rows of the first training batch: what the model reads and what it is to predict."""
    rows = order.batch_rows(len(prepared.train), count, config.seed, 0)
    batch = prepared.make_batch(config)(prepared.train.rows(rows), rows, config.seed, 0)
    show = examples.make(config).show
    for index, row in enumerate(rows):
        arrays = {name: array[index] for name, array in batch.items()}
        weights = arrays["weights"]
        console.print(Rule(f"row {row:,}: {len(weights)} predictions, {int(weights.sum())} of weight 1", align="left"))
        for part in show(arrays, prepared.tokenizer, prepared.labels):
            console.print(Rule(part.title, align="left", characters="·", style="dim"))
            if part.text:
                console.print(Text(part.text), soft_wrap=True)


def table(prepared: Prepared) -> Table:
    """The counts of the splits side by side."""
    train, splits = prepared.train, prepared.splits.values()
    shown = Table("", box=box.SIMPLE_HEAD, title=f"data in {prepared.directory}", title_justify="left", title_style="bold")
    for name in prepared.splits:
        shown.add_column(name.replace("_", " "), justify="right")
    # What masked_lm predicts is drawn anew each time.
    predictions = "may be predicted" if prepared.record["recipe"].get("rows") == "masked_lm" else "weighted predictions"
    lines = {
        "documents": (f"{split.documents:,}" for split in splits),
        "text": (decimal(split.text_bytes) for split in splits),
        "tokens": (f"{split.tokens:,}" for split in splits),
        "bytes a token": (f"{split.bytes_per_token:.2f}" for split in splits),
        f"rows of {train.row_tokens:,} tokens": (f"{len(split):,}" for split in splits),
        predictions: (f"{split.weighted_tokens / (len(split) * split.row_tokens):.2%}" for split in splits),
        "cut to a row": (f"{split.cut:,}" for split in splits),
        "files": (decimal(split.bytes) for split in splits),
    }
    # Where targets are no text in order, nothing is known of their bytes; most data has nothing to cut.
    absent = ([] if train.text_bytes else ["text", "bytes a token"]) + (
        [] if any(split.cut for split in splits) else ["cut to a row"]
    )
    for name, cells in lines.items():
        if name not in absent:
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
    if prepared.labels:
        lines.append(f"{len(prepared.labels):,} classes: {', '.join(prepared.labels)}")
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
