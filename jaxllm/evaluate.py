"""Measures how well a trained model predicts: loss, perplexity, accuracy, and what its objective has besides.

  python -m jaxllm.evaluate --run DIR [--step N] [--data SOURCE | --split NAME] [--max_seqs N] [--json]
                            [--text_field NAME] [--target_field NAME] [--pair_field NAME]

Without --data: the run's own validation rows, or those of another split: train, and with data.replay_source replay and replay_validation,
which are evaluated as the run did it: beside conversations as plain text. SOURCE is anything that data.source may be; it is cleaned and
encoded as the run's own data was. Beside loss and accuracy stands the unigram baseline: every target guessed by its frequency in the run's
training data. There are also bits per byte (causal_lm), the share of exact sequences (seq2seq) and the recall of each class
(classification). A run that prefers answers is measured by its objective: loss, rewards, their margin and accuracy; one that learns from a
teacher also by how far it is from it. Every result is added to DIR/evaluations.jsonl. DIR may also be a directory of transformers, or a
GGUF file: then --data is needed, and nothing is written.
"""

import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags, logging
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from jaxllm import command, registry, runs
from jaxllm import config as schema
from jaxllm.consistency import DISTILL, ON_POLICY, PREFERENCES, REFERRED
from jaxllm.data import examples, folder, foreign, loader, prepare, shards
from jaxllm.data.examples import prompts
from jaxllm.data.examples.contract import MakeBatch
from jaxllm.decode import rewards
from jaxllm.engine import compilation, references
from jaxllm.engine.checkpoint import Checkpoints
from jaxllm.evals import answers, baseline, exact, metrics, perplexity, recall
from jaxllm.interop import peft
from jaxllm.report import healthy, units
from jaxllm.runs import Run
from jaxllm.types import Batch

VALIDATION = "validation"
FIELDS = ("text_field", "target_field", "pair_field")
# In a batch at most, as the rows that a whole mesh was trained on at once may be too many for the one device here.
MOST_TOKENS = 16_384
# Sequences that are written to be compared with their targets: enough to tell 99 % from 98 %.
MOST_SEQS = 1000
# In the table of classes.
MOST_CLASSES = 20


def define_flags() -> None:
    flags.DEFINE_string("run", "", "run directory of a trained model, directory of transformers, or GGUF file")
    flags.DEFINE_integer("step", None, "checkpoint to use; default: the newest")
    flags.DEFINE_string("base", "", "of an adapter: the model that it stands beside; default: the path that the adapter names")
    flags.DEFINE_string("data", "", "text to evaluate on: a file, a folder, a glob, or hf:OWNER/NAME?config=C&split=S")
    for name in FIELDS:
        flags.DEFINE_string(name, None, f"of --data: {schema.SCHEMA[f'data.{name}'].meaning}; default: as the run was trained")
    flags.DEFINE_string("split", None, f"rows of the run's own data: {', '.join(folder.SPLITS)}; default: {VALIDATION}")
    flags.DEFINE_integer(
        "max_seqs", MOST_SEQS, "seq2seq: so many outputs are compared with their targets; 0 means all", lower_bound=0
    )
    flags.DEFINE_bool("json", False, "print one JSON object instead of a table")


def main(arguments: list[str]) -> None:
    del arguments
    given = flags.FLAGS
    if given.data and given.split:
        raise ValueError(
            f"--data {given.data} together with --split {given.split}.\n  Accepted: --split for the run's own data, or --data for"
            " other text, which has no splits.\n  Leave out one of them."
        )
    if not given.data and (named := [f"--{name}" for name in FIELDS if given[name].present]):
        raise ValueError(
            f"{', '.join(named)} without --data.\n  Accepted: with --data, whose fields they name.\n  Add --data, or leave them out."
        )
    compilation.use_cache()
    run = runs.load(given.run, given.step, base=given.base)
    run.config.data.update({name: given[name].value for name in FIELDS if given[name].present})
    options = {"max_seqs": given.max_seqs}
    row = evaluate_source(run, given.data, **options) if given.data else evaluate_split(run, given.split or VALIDATION, **options)
    append(run, row)
    if given.json:
        print(json.dumps(row))
    else:
        show(row, Console(soft_wrap=True))


def evaluate_split(run: Run, split: str, max_seqs: int = MOST_SEQS) -> dict[str, Any]:
    """The result on the run's own prepared rows; ValueError if they are gone or not those that the run was trained on, and for a split
    that it has not."""
    if not _is_own(run):
        raise ValueError(
            f"'{run.workdir.path}' holds a model without the data that it was trained on.\n  Accepted: a text to evaluate it on.\n"
            "  Add --data FILE."
        )
    directory = prepare.place(run.config, run.workdir.path)
    if not directory.is_dir():
        raise ValueError(
            f"the prepared data of the run is not there: '{directory}' does not exist.\n  Accepted: the directory that it was"
            " trained with.\n  Put it back, prepare it again with the run's config.json, or evaluate a text with --data."
        )
    prepared = prepare.load(run.config, directory)
    if split not in prepared.splits:
        replay = "replay" in split and not run.config.data.replay_source
        raise ValueError(
            f"'{run.workdir.path}' has no split '{split}'{', as data.replay_source was empty' if replay else ''}.\n"
            f"  Accepted: {', '.join(prepared.splits)}.\n  Give one of these as --split."
        )
    rows, replayed = prepared.splits[split], split.startswith("replay")
    trained_on = _fingerprint(run, split)
    if rows.fingerprint != trained_on:
        raise ValueError(
            f"the rows in '{rows.directory}' are not those of this run: their hash is {rows.fingerprint[:16]}.\n"
            f"  Accepted: {trained_on[:16]}, as it says in {run.workdir.provenance}.\n  Put the source back as it was and prepare it"
            " again with the run's config.json, or evaluate a text with --data."
        )
    data = run.config.data
    if replayed:
        run = dataclasses.replace(run, config=examples.replayed(run.config))
    source = data.replay_source if replayed else (split == VALIDATION and data.validation_source) or data.source
    train, what = prepared.replay if replayed else prepared.train, f"{source} ({split.replace('_', ' ')} rows)"
    if run.config.train.objective in PREFERENCES:
        return _compare(run, rows, what, _reference(run, prepared, split))
    if run.config.train.objective in ON_POLICY:
        return _answer(run, rows, what, max_seqs)
    return _measure(run, rows, train, what, max_seqs, _taught(run, prepared, split))


def evaluate_source(run: Run, source: str, max_seqs: int = MOST_SEQS) -> dict[str, Any]:
    """The result on all text of `source`, packed into rows of the length that the run was trained with.

    ValueError for an objective that compares the model with a reference, which only the run's own rows have.
    """
    if run.config.train.objective in REFERRED:
        raise ValueError(
            f"--data {source} for a run of train.objective = '{run.config.train.objective}', whose loss compares the model with the one"
            " that training began with: what that says is known of the run's own rows alone.\n  Accepted: --split train or validation.\n"
            "  Leave out --data. For other text, make it the data.validation_source of a run."
        )
    with tempfile.TemporaryDirectory() as directory:
        rows = foreign.pack(run.config, run.tokenizer, run.classes, source, Path(directory, "rows"), setting="--data")
        if run.config.train.objective in PREFERENCES:
            return _compare(run, rows, source, examples.make(run.config).batch(run.tokenizer))
        if run.config.train.objective in ON_POLICY:
            return _answer(run, rows, source, max_seqs)
        return _measure(run, rows, _train_rows(run), source, max_seqs)


def _is_own(run: Run) -> bool:
    """Whether it is a run of this package, not a model of another tool, nor an adapter in a directory of PEFT."""
    return run.imported is None and not peft.is_one(run.workdir.path)


def _fingerprint(run: Run, split: str) -> str:
    """Hash of the rows that the run was trained on."""
    return str(json.loads(run.workdir.provenance.read_text(encoding="utf-8"))["splits"][split]["fingerprint"])


def _train_rows(run: Run) -> shards.Shards | None:
    """The rows that the run was trained on; None if they are no longer there, which other text does not need."""
    directory = prepare.place(run.config, run.workdir.path) / "train"
    if not _is_own(run) or not directory.is_dir():
        return None
    rows = shards.Shards(directory)
    return rows if rows.fingerprint == _fingerprint(run, "train") else None


def _measure(
    run: Run, rows: shards.Shards, train: shards.Shards | None, data: str, max_seqs: int, taught: MakeBatch | None = None
) -> dict[str, Any]:
    """The result of an objective that predicts tokens or classes. taught: what makes batches with what a teacher says of the rows."""
    began = time.perf_counter()
    make_batch = examples.make(run.config).batch(run.tokenizer)
    sweep = partial(_sweep, run, rows, make_batch)
    measure = perplexity.make_eval(run.model, run.config, with_reference=taught is not None)
    row = measure(run.params, _sweep(run, rows, taught or make_batch), rows.bytes_per_token)
    beside = {**_baseline(run, train, rows, make_batch), **_beside(run, sweep, max_seqs)}
    return _told(run, rows, data, perplexity.metric_name(run.config, run.tokenizer, rows.row_tokens), {**row, **beside}, began)


def _compare(run: Run, rows: shards.Shards, data: str, make_batch: MakeBatch) -> dict[str, Any]:
    """The result of an objective that compares answers: what it measures."""
    began, config = time.perf_counter(), run.config
    unit = examples.make(config).unit
    objective = registry.resolve("objective", config.train.objective)(run.model, config)
    row = metrics.make_eval(objective, run.model, config, unit)(run.params, _sweep(run, rows, make_batch))
    name = f"{config.train.objective} of {unit} (up to {rows.row_tokens}, chat template {config.chat.template})"
    return _told(run, rows, data, name, row, began)


def _answer(run: Run, rows: shards.Shards, data: str, max_seqs: int) -> dict[str, Any]:
    """The result of an objective with rewards: what they say of the likeliest answers to at most so many prompts (0: all)."""
    began, config = time.perf_counter(), run.config
    stored, most_tokens = rows.rows(np.arange(min(max_seqs or len(rows), len(rows)))), config.rl.max_new_tokens
    asked, known = prompts.prompts(stored), prompts.fields(stored)
    found = answers.measure(run.model, run.params, run.tokenizer, asked, known, rewards.make(config), most_tokens)
    name = f"reward of likeliest answers (up to {most_tokens} tokens, chat template {config.chat.template})"
    return _told(run, rows, data, name, found, began)


def _sweep(run: Run, rows: shards.Shards, make_batch: MakeBatch) -> Iterator[dict[str, jax.Array]]:
    """All rows, on one device."""
    train, tokens_a_row = run.config.train, examples.make(run.config).tokens_a_row
    batch_seqs = min(train.batch_seqs // train.microbatches, max(1, MOST_TOKENS // tokens_a_row))
    return loader.sweep(rows, make_batch, batch_seqs, jax.sharding.SingleDeviceSharding(jax.devices()[0]))


def _told(run: Run, rows: shards.Shards, data: str, metric: str, found: Mapping[str, Any], began: float) -> dict[str, Any]:
    """The row of a result: what was measured, `found`, and of what."""
    return {
        "run": str(run.workdir.path),
        "step": run.step,
        "data": data,
        "documents": rows.documents,
        "objective": run.config.train.objective,
        "metric": metric,
        **found,
        "parameter_bytes": sum(array.nbytes for array in jax.tree.leaves(run.params)),
        "secs": round(time.perf_counter() - began, 2),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _reference(run: Run, prepared: prepare.Prepared, split: str) -> MakeBatch:
    """What makes batches of the rows of a split, with the reference where the objective needs it."""
    make_batch = prepared.make_batch(run.config)
    if not references.needed(run.config):
        return make_batch
    key = Checkpoints(run.workdir.checkpoints).record(run.step).meta[references.NAME]
    return references.read(prepared, key).join(split, make_batch)


def _taught(run: Run, prepared: prepare.Prepared, split: str) -> MakeBatch | None:
    """What makes batches of the rows of a split with what the teacher of the run says of them; None without a teacher, and if what it says
    is no longer there, which the student's own numbers do not need."""
    if run.config.train.objective != DISTILL:
        return None
    key = Checkpoints(run.workdir.checkpoints).record(run.step).meta.get(references.NAME)
    if key is None or not references.are_there(prepared, key):
        logging.warning("what the teacher says of the rows is not in %s: its divergence is not measured", prepared.directory)
        return None
    return references.read(prepared, key).join(split, prepared.make_batch(run.config))


def _baseline(run: Run, train: shards.Shards | None, rows: shards.Shards, make_batch: MakeBatch) -> dict[str, float]:
    """What guessing by frequency in the training data gets; nothing without that data."""
    if train is None:
        return {}
    outcomes = run.tokenizer.vocab_size if run.config.model.head == "lm" else run.model.config.classes
    found = baseline.measure(train, rows, make_batch, outcomes)
    return {"baseline_loss": found.loss, "baseline_accuracy": found.accuracy}


def _beside(run: Run, sweep: Callable[[], Iterator[Batch]], max_seqs: int) -> dict[str, Any]:
    """What the objective has besides the perplexity."""
    if run.config.train.objective == "seq2seq":
        found = exact.measure(run.model, run.params, run.tokenizer, exact.unpack(sweep()), max_seqs)
        return {"exact": found.right / max(found.pairs, 1), "exact_seqs": found.pairs}
    if run.config.model.head in ("classify", "tag"):
        recalls = recall.measure(run.model, run.params, sweep())
        names = run.classes or tuple(map(str, range(len(recalls))))
        return {"classes": {name: found._asdict() for name, found in zip(names, recalls, strict=True)}}
    return {}


def append(run: Run, row: dict[str, Any]) -> None:
    """Adds the result as a line of the run's evaluations.jsonl; a run that cannot be written to keeps as it is, with a log line.

    Nothing is written to a model of another tool, nor to a directory of PEFT.
    """
    if not _is_own(run):
        return
    path = run.workdir.path / "evaluations.jsonl"
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        logging.warning("the result is not kept in %s: %s", path, error)


def show(row: dict[str, Any], console: Console) -> None:
    """Prints the result, the perplexity under its full name, and beside it what guessing by frequency gets."""
    shown = Table("", Column("model", justify="right"), show_header="baseline_loss" in row)
    if "baseline_loss" in row:
        shown.add_column("unigram baseline", justify="right")
    for name, *values in _lines(row):
        shown.add_row(name, *values)
    for line in (f"{row['run']}, step {row['step']}, on {row['data']}", row["metric"]):
        console.print(line, markup=False, highlight=False)
    console.print(shown)
    if "classes" in row:
        console.print(_class_table(row["classes"]))
    if "calibration" in row:
        console.print(_calibration_table(row["calibration"]))


def _lines(row: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Name, value, and the baseline's if there is one."""
    if "perplexity" in row:
        yield from _token_lines(row)
    else:
        told = [name for name in healthy.NAMES if name in row]
        told += [name for name in row if name == "answer_tokens" or name.startswith("reward")]
        yield from ((name.replace("_", " "), f"{row[name]:.4f}") for name in told)
        yield from ((unit, f"{row[unit]:,}") for unit in ("pairs", "answers") if unit in row)
    yield "parameters on the device", units.size(row["parameter_bytes"])


def _token_lines(row: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    what, base = "class" if "classes" in row else "token", "baseline_loss" in row
    score = (f"{math.exp(row['baseline_loss']):.3f}",) if base else ()
    yield row["metric"].partition(" (")[0], f"{row['perplexity']:.3f}", *score
    yield f"loss (nats a {what})", f"{row['loss']:.4f}", *((f"{row['baseline_loss']:.4f}",) if base else ())
    yield f"likeliest {what} is right", f"{row['accuracy']:.2%}", *((f"{row['baseline_accuracy']:.2%}",) if base else ())
    if "kl" in row:
        yield "KL of the teacher (nats a token)", f"{row['kl']:.4f}"
    if row["bits_per_byte"] is not None:
        yield "bits per byte of text", f"{row['bits_per_byte']:.4f}"
    if "exact" in row:
        yield f"exact sequences, of {row['exact_seqs']:,}", f"{row['exact']:.2%}"
    yield ("classes" if "classes" in row else "tokens") + " predicted", f"{row['tokens']:,}"
    if row["bytes"] is not None:
        yield "bytes of text", f"{row['bytes']:,}"
    yield "documents", f"{row['documents']:,}"


def _calibration_table(bins: Sequence[tuple[float, float, int]]) -> Table:
    """How often the higher reward is the chosen answer's, by the probability that the rewards give to it."""
    table = Table("probability", *(Column(name, justify="right") for name in ("is right", "pairs")))
    for predicted, right, pairs in bins:
        table.add_row(f"{predicted:.1%}", f"{right:.1%}", f"{pairs:,}")
    return table


def _class_table(found: Mapping[str, Mapping[str, int]]) -> Table:
    """Recall of each class, the most frequent first."""
    table = Table("class", Column("found (recall)", justify="right"), Column("examples", justify="right"))
    for name, each in sorted(found.items(), key=lambda item: -item[1]["examples"])[:MOST_CLASSES]:
        share = f"{each['found'] / each['examples']:.2%}" if each["examples"] else "-"
        table.add_row(Text(name), share, f"{each['examples']:,}")
    if len(found) > MOST_CLASSES:
        table.caption = f"and {len(found) - MOST_CLASSES} classes with fewer examples; --json has all"
    return table


if __name__ == "__main__":
    define_flags()
    command.run(main)
