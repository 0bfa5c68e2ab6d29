"""Prepares the data of an experiment: text to a tokenizer and packed rows on disk.

If they are there and fresh it makes nothing, and compares them with the hashes of what was written.

  python -m jaxllm.prepare --config configs/NAME.py [--config.a.b=value ...] [--workdir DIR] [--show N] [--force]

`train` does the same by itself.
"""

from collections.abc import Sequence

import numpy as np
from absl import flags
from ml_collections import ConfigDict
from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from jaxllm import command
from jaxllm.data import examples, mixture
from jaxllm.data.examples.contract import Piece
from jaxllm.data.prepare import Prepared, place, prepare

# Of pieces of text that are trained, that are not, and where there is nothing to tell apart.
STYLES = {True: "green", False: "dim", None: ""}
# Around what is trained, where there are no colours.
OPENS, CLOSES = "\u27e6", "\u27e7"


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
    """Prints the first `count` rows of the first training batches: what the model reads and what it is to predict, and how much of it.

    Rows of data.replay_source stand among the others, as in training.
    """
    batches, own_rows, show = prepared.batches(config), len(prepared.train), examples.make(config).show
    rows: list[int] = []
    arrays: list[dict[str, np.ndarray]] = []
    for step in range(-(-count // batches.batch_seqs)):
        chosen = batches.rows(step)[: count - len(rows)]
        batch = batches.arrays(step, chosen)
        rows += chosen.tolist()
        arrays += [{name: array[place] for name, array in batch.items()} for place in range(len(chosen))]
    parts = [list(show(array, prepared.tokenizer, prepared.labels)) for array in arrays]
    if any(piece.trained is not None for row in parts for part in row for piece in part.pieces):
        console.print(spelled([Piece("trained tokens", True), Piece(" and "), Piece("others", False)], console))
    real_BT, trained_BT = (np.array([array[name] > 0 for array in arrays]) for name in ("segments", "weights"))
    for row, real_T, trained_T, shown in zip(rows, real_BT, trained_BT, parts, strict=True):
        title = f"row {row:,}" if row < own_rows else f"row {row - own_rows:,} of data.replay_source"
        console.print(Rule(f"{title}: {_share(trained_T, real_T)}", align="left"))
        for part in shown:
            console.print(Rule(part.title, align="left", characters="·", style="dim"))
            if part.pieces:
                console.print(spelled(part.pieces, console), soft_wrap=True)
    console.print(Rule(f"rows shown: {_share(trained_BT, real_BT)}", align="left"))


def _share(trained: np.ndarray, real: np.ndarray) -> str:
    return f"{trained.sum():,} of {real.sum():,} tokens trained ({trained.sum() / max(real.sum(), 1):.1%})"


def spelled(pieces: Sequence[Piece], console: Console) -> Text:
    """The pieces in colours; in a pipe, a file or with NO_COLOR, trained ones in double brackets."""
    text = Text()
    for piece in pieces:
        if console.color_system is None or console.no_color:
            text.append(f"{OPENS}{piece.text}{CLOSES}" if piece.trained else piece.text)
        else:
            text.append(piece.text, STYLES[piece.trained])
    return text


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
        "positions filled": (f"{split.filled_frac:.2%}" for split in splits),
        predictions: (f"{split.weighted_tokens / (len(split) * split.row_tokens):.2%}" for split in splits),
        "trained tokens": (f"{split.weighted_tokens / max(split.tokens, 1):.2%}" for split in splits),
        "cut to a row": (f"{split.cut:,}" for split in splits),
        "dropped": (f"{sum(split.dropped.values()):,}" for split in splits),
        "files": (decimal(split.bytes) for split in splits),
    }
    # Where targets are no text in order, nothing is known of their bytes; most data has nothing to cut or to drop.
    absent = ([] if train.text_bytes else ["text", "bytes a token"]) + (
        [] if any(split.cut for split in splits) else ["cut to a row"]
    )
    absent += [] if any(split.dropped for split in splits) else ["dropped"]
    absent += [] if prepared.record["recipe"].get("rows") in ("sft", "pairs") else ["trained tokens"]
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
    for name, split in record["splits"].items():
        if dropped := split.get("dropped"):
            lines.append(f"{name}: dropped {', '.join(f'{number:,} by {reason}' for reason, number in dropped.items())}")
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
        "show",
        0,
        "print this many rows as training begins with them: documents, and which of their tokens are trained",
        lower_bound=0,
    )
    flags.DEFINE_bool("force", False, "prepare again, even if the data is fresh")
    command.run(main)
