"""Measures how well a trained model predicts text: loss, perplexity and bits per byte.

  python -m jaxllm.evaluate --run DIR [--step N] [--data SOURCE | --split train|validation] [--json]

Without --data: the run's own validation rows. SOURCE is anything that data.source may be; it is cleaned and encoded as the
run's own data was. Every result is also added to DIR/evaluations.jsonl.
"""

import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
from absl import flags, logging
from rich.console import Console
from rich.table import Table

from jaxllm import command, runs
from jaxllm.data import clean, documents, loader, pack, prepare, provenance, shards
from jaxllm.engine import compilation
from jaxllm.evals import perplexity
from jaxllm.runs import Run

SPLITS = ("validation", "train")
# In a batch at most, as the rows that a whole mesh was trained on at once may be too many for the one device here.
MOST_TOKENS = 16_384


def define_flags() -> None:
    flags.DEFINE_string("run", "", "run directory of a trained model")
    flags.DEFINE_integer("step", None, "checkpoint to use; default: the newest")
    flags.DEFINE_string("data", "", "text to evaluate on: a file, a folder, a glob, or hf:OWNER/NAME?config=C&split=S")
    flags.DEFINE_enum("split", None, SPLITS, "rows of the run's own data; default: validation")
    flags.DEFINE_bool("json", False, "print one JSON object instead of a table")


def main(arguments: list[str]) -> None:
    del arguments
    given = flags.FLAGS
    if given.data and given.split:
        raise ValueError(
            f"--data {given.data} together with --split {given.split}.\n  Accepted: --split for the run's own data, or --data for"
            " other text, which has no splits.\n  Leave out one of them."
        )
    compilation.use_cache()
    run = runs.load(given.run, given.step)
    row = evaluate_source(run, given.data) if given.data else evaluate_split(run, given.split or SPLITS[0])
    append(run, row)
    if given.json:
        print(json.dumps(row))
    else:
        show(row, Console(soft_wrap=True))


def evaluate_split(run: Run, split: str) -> dict[str, Any]:
    """The result on the run's own prepared rows; ValueError if they are gone or not those that the run was trained on."""
    directory = prepare.place(run.config, run.workdir.path)
    if not directory.is_dir():
        raise ValueError(
            f"the prepared data of the run is not there: '{directory}' does not exist.\n  Accepted: the directory that it was"
            " trained with.\n  Put it back, prepare it again with the run's config.json, or evaluate a text with --data."
        )
    prepared = prepare.load(run.config, directory)
    rows = {"validation": prepared.validation, "train": prepared.train}[split]
    trained_on = json.loads(run.workdir.provenance.read_text(encoding="utf-8"))["splits"][split]["fingerprint"]
    if rows.fingerprint != trained_on:
        raise ValueError(
            f"the rows in '{rows.directory}' are not those of this run: their hash is {rows.fingerprint[:16]}.\n"
            f"  Accepted: {trained_on[:16]}, as it says in {run.workdir.provenance}.\n  Put the source back as it was and prepare it"
            " again with the run's config.json, or evaluate a text with --data."
        )
    source = run.config.data.source if split == "train" else run.config.data.validation_source or run.config.data.source
    return _measure(run, rows, f"{source} ({split} rows)")


def evaluate_source(run: Run, source: str) -> dict[str, Any]:
    """The result on all text of `source`, packed into rows of the length that the run was trained with."""
    with tempfile.TemporaryDirectory() as directory:
        totals, row_tokens = shards.Totals(), provenance.row_tokens(run.config)
        blocks = pack.pack(_texts(run, source), run.tokenizer, row_tokens, totals)
        rows = shards.write(
            Path(directory, "rows"), blocks, row_tokens=row_tokens, vocab_size=run.tokenizer.vocab_size, totals=totals
        )
        return _measure(run, rows, source)


def _texts(run: Run, source: str) -> Iterator[str]:
    """The cleaned texts of all documents, however few of its own data the run used."""
    config = run.config.copy_and_resolve_references()
    config.data.max_documents = 0
    cleaner, dropped = clean.make(config), Counter[str]()
    for document in documents.open(source, config, setting="--data"):
        cleaned = cleaner(document)
        if isinstance(cleaned, clean.Dropped):
            dropped[cleaned.reason] += 1
        else:
            yield cleaned.text
    if dropped:
        logging.warning("documents dropped from %s: %s", source, ", ".join(f"{count} by {name}" for name, count in dropped.items()))


def _measure(run: Run, rows: shards.Shards, data: str) -> dict[str, Any]:
    began = time.perf_counter()
    batch_seqs = min(run.config.train.batch_seqs // run.config.train.microbatches, max(1, MOST_TOKENS // rows.row_tokens))
    batches = loader.sweep(rows, batch_seqs, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    row = perplexity.make_eval(run.model, run.config)(run.params, batches, rows.bytes_per_token)
    return {
        "run": str(run.workdir.path),
        "step": run.step,
        "data": data,
        "documents": rows.documents,
        "metric": perplexity.metric_name(run.config, run.tokenizer, rows.row_tokens),
        **row,
        "secs": round(time.perf_counter() - began, 2),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def append(run: Run, row: dict[str, Any]) -> None:
    """Adds the result as a line of the run's evaluations.jsonl; a run that cannot be written to keeps as it is, with a log line."""
    path = run.workdir.path / "evaluations.jsonl"
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        logging.warning("the result is not kept in %s: %s", path, error)


def show(row: dict[str, Any], console: Console) -> None:
    """Prints the result; the perplexity under its full name."""
    bits = row["bits_per_byte"]
    shown = Table(show_header=False)
    shown.add_column()
    shown.add_column(justify="right")
    for name, value in (
        ("token perplexity", f"{row['perplexity']:.3f}"),
        ("loss (nats a token)", f"{row['loss']:.4f}"),
        ("bits per byte of text", "-" if bits is None else f"{bits:.4f}"),
        ("likeliest token is right", f"{row['accuracy']:.2%}"),
        ("tokens predicted", f"{row['tokens']:,}"),
        ("bytes of text", f"{row['bytes']:,}"),
        ("documents", f"{row['documents']:,}"),
    ):
        shown.add_row(name, value)
    for line in (f"{row['run']}, step {row['step']}, on {row['data']}", row["metric"]):
        console.print(line, markup=False, highlight=False)
    console.print(shown)


if __name__ == "__main__":
    define_flags()
    command.run(main)
