"""From raw text to packed rows on disk: read, clean, split, train the tokenizer, pack.

A prepared directory holds `train/` and `validation/` (see shards.py), the same two of data.replay_source as `replay/` and
`replay_validation/`, `tokenizer/`, and `data.json`, the record of what they were made from (see folder.py for how it gets there).
"""

import hashlib
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from jaxllm.consistency import LOADED
from jaxllm.data import clean, documents, examples, folder, mixture, provenance, shards, spool, tokenize
from jaxllm.data.documents import Document
from jaxllm.data.examples import labels
from jaxllm.data.examples.contract import MakeBatch

if TYPE_CHECKING:
    from jaxllm.types import Tokenizer

LOG_SECS = 2.0

Log = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """Prepared data, opened. `record` is the content of data.json. The replay splits are None without a data.replay_source."""

    directory: Path
    tokenizer: "Tokenizer"
    train: shards.Shards
    validation: shards.Shards
    replay: shards.Shards | None
    replay_validation: shards.Shards | None
    record: dict[str, Any]

    @property
    def splits(self) -> dict[str, shards.Shards]:
        """Those that are there, by name."""
        return {name: split for name in folder.SPLITS if (split := getattr(self, name)) is not None}

    @property
    def fingerprint(self) -> str:
        """Hash of all rows that may be trained on."""
        return _fingerprint(self.train, self.replay)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, by number; empty if the objective has none."""
        return tuple(self.record.get("labels", ()))

    def notes(self, config: ConfigDict) -> list[str]:
        """What can be trained on and is hardly meant, one line each."""
        own_seqs, rows = config.train.batch_seqs - mixture.replay_seqs(config), len(self.train)
        if own_seqs <= rows:
            return []
        return [f"a batch has {own_seqs} rows of data.source, which is {rows} rows in all: some of them are in it more than once"]

    def make_batch(self, config: ConfigDict) -> MakeBatch:
        """What makes batches of these rows for the objective."""
        return examples.make(config).batch(self.tokenizer)

    def make_replay_batch(self, config: ConfigDict) -> MakeBatch:
        """The same for rows of the replay splits."""
        return examples.make(examples.replayed(config)).batch(self.tokenizer)

    def batches(
        self, config: ConfigDict, arrange: Callable[[MakeBatch], MakeBatch] = lambda make_batch: make_batch
    ) -> mixture.Batches:
        """The training batches, with what is replayed of data.replay_source. arrange: how their tokens are to lie."""
        replay, seqs = None, mixture.replay_seqs(config)
        if self.replay is not None and seqs:
            replay = mixture.Replay(self.replay, arrange(self.make_replay_batch(config)), seqs, config.train.microbatches)
        return mixture.Batches(self.train, arrange(self.make_batch(config)), config.train.batch_seqs, config.seed, replay)


def place(config: ConfigDict, workdir: str | Path) -> Path:
    """The directory for the prepared data of a run."""
    return Path(config.data.dir).expanduser() if config.data.dir else Path(workdir) / "data"


def prepare(
    config: ConfigDict, directory: str | Path, *, force: bool = False, rows: str | None = None, log: Log = print
) -> Prepared:
    """The prepared data in `directory`: at once if it is there and fresh, else made from the source.

    It is stale if a config field that it depends on, a source file or the tokenizer's file has changed, or if a part of it is
    gone. ValueError for a source that cannot be used, for shards or a tokenizer that were changed since they were written, and
    for a full disk; what was there before is then still there. Processes that prepare the same directory wait for each other.
    `rows` is the fingerprint that the training rows must have, for a run that has begun; with others it is a ValueError, too.
    """
    directory = Path(directory)
    _check_outside(config, directory)
    if force or _stale(config, directory, log):
        with folder.explained(directory), folder.locked(directory, log):
            # Another process may have prepared it while this one waited.
            if reasons := (["--force"] if force else _stale(config, directory, log)):
                log(f"preparing {directory}: {'; '.join(reasons)}")
                _remake(config, directory, rows, log)
    prepared = load(config, directory)
    _check_rows(rows, prepared.fingerprint, directory)
    return prepared


def load(config: ConfigDict, directory: str | Path) -> Prepared:
    """Prepared data as it lies there; ValueError if it was damaged, or is too large for `model.vocab_size`."""
    directory = Path(directory)
    record = folder.read_record(directory)
    if "tokenizer" not in record:
        raise ValueError(f"no prepared data in '{directory}'.\n  Accepted: what prepare writes.\n  {shards.AGAIN}")
    tokenizer = tokenize.load(directory / "tokenizer")
    found, wanted = tokenize.fingerprint(tokenizer), record["tokenizer"]["fingerprint"]
    if found != wanted:
        raise ValueError(
            f"the tokenizer in '{directory}' has changed since the shards were written: its fingerprint is {found[:16]}.\n"
            f"  Accepted: {wanted[:16]}. To use another tokenizer set tokenizer.kind=file and tokenizer.path.\n"
            f"  Put the old one back. {shards.AGAIN}"
        )
    _check_vocabulary(config, tokenizer)
    splits = {name: shards.Shards(directory / name) for name in record["splits"]}
    for name, split in splits.items():
        if split.summary() != record["splits"][name]:
            raise ValueError(
                f"the shards in '{directory / name}' are not those that {folder.RECORD} beside them describes.\n"
                f"  Accepted: the directory as prepare wrote it.\n  Put the old files back. {shards.AGAIN}"
            )
    return Prepared(
        directory, tokenizer, splits["train"], splits["validation"], splits.get("replay"), splits.get("replay_validation"), record
    )


def _stale(config: ConfigDict, directory: Path, log: Log) -> list[str]:
    """Why the data has to be made; empty if it is fresh."""
    record = folder.read_record(directory)
    if not record:
        return ["nothing is there yet"]
    try:
        changes = provenance.changes(record, config)
    except provenance.SourceGone as error:
        log(f"{error} The data prepared from it on {record['prepared']} is used.")
        return []
    return changes or [
        f"'{directory / name}' is missing" for name in (*record["splits"], "tokenizer") if not (directory / name).is_dir()
    ]


def _check_outside(config: ConfigDict, directory: Path) -> None:
    """ValueError if the source is a folder that the prepared files would land in: they would be read as text the next time."""
    for field in ("source", "validation_source", "replay_source"):
        source = Path(config.data[field]).expanduser()
        if config.data[field] and source.is_dir() and directory.resolve().is_relative_to(source.resolve()):
            raise ValueError(
                f"'{directory}', the directory for prepared data, lies inside data.{field} = '{source}'.\n"
                "  Accepted: a directory outside of it. Set data.dir or --workdir, or name the files by a pattern."
            )


def _fingerprint(train: shards.Shards, replay: shards.Shards | None) -> str:
    """Hash of the training rows."""
    both = "" if replay is None else train.fingerprint + replay.fingerprint
    return hashlib.sha256(both.encode()).hexdigest() if both else train.fingerprint


def _check_rows(wanted: str | None, found: str, directory: Path) -> None:
    if wanted is not None and found != wanted:
        raise ValueError(
            f"the training rows for '{directory}' are not those that this run began with: their hash is {found[:16]}.\n"
            f"  Accepted: {wanted[:16]}. Put the source back as it was, or use another --workdir."
        )


def _remake(config: ConfigDict, directory: Path, rows: str | None, log: Log) -> None:
    partial = directory / folder.PARTIAL
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        _build(config, partial, log)
        replay = shards.Shards(partial / "replay") if config.data.replay_source else None
        _check_rows(rows, _fingerprint(shards.Shards(partial / "train"), replay), directory)
        folder.replace(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _build(config: ConfigDict, partial: Path, log: Log) -> None:
    """Fills `partial` with the splits, the tokenizer and the record."""
    started = time.monotonic()
    origins = provenance.origins(config)
    counts: dict[str, Any] = {}
    replayed = examples.replayed(config)
    # What it lacks is said before the text is read.
    loaded = tokenize.make(config, list) if config.tokenizer.kind in LOADED else None
    split = _split(config, replayed, partial, counts, log)
    setups = {name: replayed if name.startswith("replay") else config for name in split}
    # A vocabulary of characters has to cover all splits, or some held-out text could not be written at all.
    read = [name for name in split if config.tokenizer.kind == "char" or "validation" not in name]
    log(f"tokenizer: {config.tokenizer.kind}{f' {config.tokenizer.path}' if config.tokenizer.kind in LOADED else ''}")
    tokenizer = loaded or tokenize.make(
        config,
        lambda: (text for name in read for document in split[name]() for text in examples.make(setups[name]).texts(document)),
    )
    _check_vocabulary(config, tokenizer)
    tokenizer.save(str(partial / "tokenizer"))
    classes = _classes(config, split)
    splits = {name: _pack(setups[name], partial / name, split[name], tokenizer, classes, log) for name in split}
    record = {
        "prepared": datetime.now(UTC).isoformat(timespec="seconds"),
        "secs": round(time.monotonic() - started, 1),
        "versions": provenance.versions(),
        "recipe": provenance.recipe(config),
        "origins": origins,
        "documents": counts,
        "labels": classes,
        "tokenizer": {"vocab_size": tokenizer.vocab_size, "fingerprint": tokenize.fingerprint(tokenizer)},
        "splits": {name: split.summary() for name, split in splits.items()},
    }
    folder.write_record(partial / folder.RECORD, record)
    for path in partial.glob("*.documents"):
        path.unlink()


def _split(config: ConfigDict, replayed: ConfigDict, partial: Path, counts: dict[str, Any], log: Log) -> dict[str, spool.Documents]:
    """The documents of each split. `replayed`: the config of data.replay_source."""

    def read(config: ConfigDict, field: str) -> spool.Spool:
        cleaned = _clean(config, field, counts.setdefault(field, {}), log)
        return spool.Spool(partial / f"{field.partition('.')[2]}.documents", cleaned)

    def halve(config: ConfigDict, field: str, source: spool.Spool) -> dict[str, spool.Documents]:
        by = config.data.split_by
        if source.count == 1 and by == "documents" and examples.make(config).reads == "text":
            log(f"{field} is one document, so that the end of its text is held out, as with data.split_by=characters")
            by = "characters"
        return spool.split(source, by, config.data.validation_frac)

    source = read(config, "data.source")
    if config.data.validation_source:
        split = {"train": source.documents, "validation": read(config, "data.validation_source").documents}
    else:
        split = halve(config, "data.source", source)
    if config.data.replay_source:
        found = halve(replayed, "data.replay_source", read(replayed, "data.replay_source"))
        split |= {"replay": found["train"], "replay_validation": found["validation"]}
    return split


def _classes(config: ConfigDict, split: dict[str, spool.Documents]) -> tuple[str, ...]:
    """Names of the classes in the training data, by number; ValueError if another split has others."""
    if examples.make(config).reads not in ("label", "labels"):
        return ()
    found = {name: {label for document in source() for label in labels.of(document)} for name, source in split.items()}
    classes = labels.distinct(found["train"])
    for name in [name for name in found if name != "train"]:
        labels.check_known(found[name], classes, f"the {name.replace('_', ' ')} data")
    return classes


def _clean(config: ConfigDict, field: str, counts: dict[str, Any], log: Log) -> Iterator[Document]:
    """The cleaned documents of the source in this config field; counts what was read, dropped and kept."""
    cleaner = clean.make(config)
    source = config.data[field.partition(".")[2]]
    dropped: Counter[str] = Counter()
    counts |= {"read": 0, "dropped": dropped, "kept": 0, "chars": 0}
    pace = _Pace(log)
    for document in documents.open(source, config, setting=field):
        counts["read"] += 1
        pace(lambda: f"read {counts['read']:,} documents, {counts['chars']:,} characters")
        result = cleaner(document)
        if isinstance(result, clean.Dropped):
            dropped[result.reason] += 1
            continue
        counts["kept"] += 1
        counts["chars"] += len(result.text) + sum(len(message["content"]) for answer in result.answers for message in answer)
        yield result
    if not counts["kept"]:
        reasons = ", ".join(f"{count} by {reason}" for reason, count in dropped.items())
        accepted, change = "at least one document with text", "Change data.cleaners or data.min_chars"
        if examples.make(config).converses:
            accepted = "conversations in which an answer follows each question, no message is empty and none is of a tool"
            change = "Correct the data"
        raise ValueError(
            f"{field} = '{source}': every document was dropped ({reasons}).\n  Accepted: {accepted}.\n"
            f"  {change}, or set another source."
        )
    log(f"read {counts['read']:,} documents, kept {counts['kept']:,} with {counts['chars']:,} characters")


def _pack(
    config: ConfigDict,
    directory: Path,
    source: spool.Documents,
    tokenizer: "Tokenizer",
    classes: tuple[str, ...],
    log: Log,
) -> shards.Shards:
    name, made, totals = directory.name, examples.make(config), shards.Totals()
    pace, started = _Pace(log), time.monotonic()

    def watched() -> Iterator[Document]:
        for document in source():
            yield document
            pace(lambda: f"{name}: {totals.tokens:,} tokens, {totals.tokens / (time.monotonic() - started):,.0f} tokens/s")

    written = examples.write(config, directory, watched(), tokenizer, classes, totals)
    rows = f"{len(written):,} rows of {written.row_tokens:,} tokens"
    log(f"{name}: {rows} from {totals.documents:,} documents, {totals.tokens:,} tokens")
    if made.reads == "messages":
        share = f"{totals.weighted_tokens / max(totals.tokens, 1):.1%} of the tokens are trained"
        log(f"{name}: {share} (chat.train_on = {config.chat.train_on})")
    elif made.converses:
        log(f"{name}: {totals.documents:,} {made.unit}, {written.filled_frac:.1%} of the positions are filled")
    if totals.dropped:
        reasons = ", ".join(f"{count:,} by {reason}" for reason, count in totals.dropped.items())
        log(f"{name}: {sum(totals.dropped.values()):,} {made.unit} dropped: {reasons}")
    if totals.cut:
        setting = "data.row_tokens, data.input_tokens" if made.reads == "target" else "data.row_tokens"
        log(f"{name}: {totals.cut:,} of {totals.documents:,} documents were longer than a row and are cut ({setting})")
    least = made.columns(tokenizer.vocab_size)["tokens"].width if made.reads == "text" else 0
    if name in ("train", "replay") and totals.tokens < least:
        text = "training" if name == "train" else name
        raise ValueError(
            f"the {text} text has {totals.tokens:,} tokens, which is shorter than one row of {written.row_tokens:,} tokens.\n"
            f"  Accepted: {least:,} tokens or more.\n  Give more text, or lower data.row_tokens."
        )
    if not written.weighted_tokens:
        raise ValueError(
            f"the {name} text has {totals.tokens:,} tokens and nothing to predict.\n  Accepted: a document of two tokens or more"
            f"{f', and {least:,} tokens in all, which fill one row of data.row_tokens' if made.added.sentinels else ''}.\n"
            "  Raise data.validation_frac, give more text, or set data.validation_source."
        )
    return written


def _check_vocabulary(config: ConfigDict, tokenizer: "Tokenizer") -> None:
    if 0 < config.model.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens, but model.vocab_size = {config.model.vocab_size:,}.\n"
            f"  Accepted: {tokenizer.vocab_size:,} or more, or 0 for the tokenizer's size.\n"
            "  Set model.vocab_size, or a smaller tokenizer.vocab_size."
        )


class _Pace:
    """Logs how far the work has come, at most every LOG_SECS."""

    def __init__(self, log: Log):
        self._log, self._last = log, time.monotonic()

    def __call__(self, describe: Callable[[], str]) -> None:
        if time.monotonic() - self._last >= LOG_SECS:
            self._log(describe())
            self._last = time.monotonic()
