"""Documents of a source, in a fixed order: the first step from raw text to training rows.

A source is one string: `python_docs`, `python_questions`, `hf:OWNER/NAME?config=C&split=S`, or a path. A path is a file
(read by its suffix), a folder (read recursively, files of known kinds only) or a glob pattern (every match). Readers of files
stream: no more than one document, or one block of a table, is in memory at a time.
"""

import difflib
import glob
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging
from ml_collections import ConfigDict

from jaxllm import registry

# Sources that are no path. Each is the registry name of its reader; what follows the colon is its location.
NAMED = ("python_docs", "python_questions", "hf", "sequences", "sums")
ACCEPTED = (
    "python_docs, python_questions, sums, a file, a folder, a glob pattern, hf:OWNER/NAME?config=C&split=S, sequences:copy or"
    " sequences:reverse"
)
# Readers of whole texts, which have nothing beside them.
WHOLE = ("python_docs", "text")
# Readers of conversations alone, and what is read of them.
TALKS = {"python_questions": ("messages",), "sums": ("messages", "prompts")}
# Readers of what is installed with Python, which is another one in another version.
OF_PYTHON = ("python_docs", "python_questions")

TABLES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
TEXTS = frozenset(
    (".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".html", ".xml")
    + (".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".java", ".js", ".ts", ".go", ".rs", ".rb", ".sh", ".sql")
)


# What is read of conversations: the whole (messages), or a prompt and two answers to it (pairs), one and whether it is good (labelled), or
# none (prompts).
CONVERSED = ("messages", "pairs", "labelled", "prompts")

# {"role": "system", "user" or "assistant", "content": text}
Message = Mapping[str, str]


class Document(NamedTuple):
    """A text and where it came from: `folder/file.txt`, `file.jsonl:17`, `python_docs:json.decoder`.

    target: what the objective predicts from it: a text, a class, a class for each of its words (which single spaces divide), or None.
    pair: a second text to classify with it, or None.
    messages: of a conversation, which is all that is learnt from; its `text` joins their contents. Else empty.
    answers: of a prompt, which the messages are then: what may follow them, the better one first. Else empty.
    fields: of a prompt without answers, what else is known of it, as values of JSON; else None.
    score: by how much the first answer is better than the second one, if that is known; of a single one whether it is good (1) or bad (0).
    """

    text: str
    origin: str
    target: str | tuple[str, ...] | None = None
    pair: str | None = None
    messages: tuple[Message, ...] = ()
    answers: tuple[tuple[Message, ...], ...] = ()
    score: float | None = None
    fields: Mapping[str, Any] | None = None


def open(source: str, config: ConfigDict, *, setting: str = "the source") -> Iterator[Document]:
    """The documents of `source`, at most `data.max_documents` of them (0: all), in the same order each time.

    A document may have the empty text (a null in a table); the cleaner `min_chars` drops it by name.
    ValueError for a path that does not exist and for plain text where the objective needs more (at once), and while reading for a
    source without any document, a file that is not UTF-8, and a table that lacks a column. `setting` is what the user changes to
    name another source.
    """
    places = readings(source, setting)
    _check_targets(places, config, setting)
    documents = itertools.chain.from_iterable(registry.resolve("documents", kind)(place, config) for kind, place in places)
    return _at_least_one(itertools.islice(documents, config.data.max_documents or None), source, setting)


_CONVERSED_FIELDS = {
    "messages": "messages, conversations, instruction and output, or prompt and completion; python_questions; sums",
    "pairs": "prompt, chosen and rejected, or whole conversations in chosen and rejected",
    "labelled": "messages and label, or prompt, completion and label",
    "prompts": "prompt, messages, conversations or instruction; sums",
}


def _check_targets(places: list[tuple[str, str]], config: ConfigDict, setting: str) -> None:
    reads = registry.resolve("examples", config.train.objective)(config).reads
    whole = [location or kind for kind, location in places if kind in WHOLE]
    if reads in CONVERSED and (alone := [*whole, *(f"{kind}:{location}" for kind, location in places if kind == "sequences")]):
        raise ValueError(
            f"{setting}: '{alone[0]}' holds no conversations, which train.objective = '{config.train.objective}' learns from.\n"
            f"  Accepted: JSON Lines, a JSON array, CSV, Parquet or hf:OWNER/NAME with {_CONVERSED_FIELDS[reads]}.\n"
            f"  Change {setting}, or train.objective."
        )
    if talks := [kind for kind, _ in places if kind in TALKS and reads not in TALKS[kind]]:
        raise ValueError(
            f"{setting}: '{talks[0]}' holds conversations, which train.objective = '{config.train.objective}' does not learn from.\n"
            f"  Accepted: train.objective = 'sft'; {_CONVERSED_FIELDS.get(reads, 'python_docs, the same documentation as text')}.\n"
            f"  Change {setting}, or train.objective."
        )
    if whole and reads != "text":
        raise ValueError(
            f"{setting}: '{whole[0]}' is text alone, and train.objective = '{config.train.objective}' also needs what to predict from it.\n"
            f"  Accepted: JSONL, CSV, Parquet or hf:OWNER/NAME with the fields '{config.data.text_field}' (data.text_field) and"
            f" '{config.data.target_field}' (data.target_field); sequences:copy.\n  Change {setting}, or train.objective."
        )


def _at_least_one(documents: Iterator[Document], source: str, setting: str) -> Iterator[Document]:
    first = next(documents, None)
    if first is None:
        raise ValueError(
            f"source '{source}' holds no document: there is nothing in it.\n"
            "  Accepted: text with at least one character, or a table with at least one row.\n"
            f"  Put text there, or change {setting}."
        )
    yield first
    yield from documents


def readings(source: str, setting: str = "the source") -> list[tuple[str, str]]:
    """(registry name of the reader, location) of everything that the source names, in order; ValueError if there is nothing."""
    name, _, location = source.partition(":")
    if name in NAMED:
        return [(name, location)]
    if not source:
        raise ValueError(f"the source is empty.\n  Accepted: {ACCEPTED}.\n  Set {setting}.")
    path = Path(os.path.expanduser(source))
    if os.path.isdir(path):
        return _folder(path)
    if os.path.exists(path):
        return [(reader(path), str(path))]
    if glob.has_magic(source):
        matches = sorted(match for match in glob.glob(str(path), recursive=True) if os.path.isfile(match))
        if matches:
            return [(reader(Path(match)), match) for match in matches]
    raise ValueError(_missing(source, path, setting))


def reader(path: Path) -> str:
    """Registry name of the reader for this file: by its suffix (before .gz); anything unknown is text."""
    return TABLES.get(_suffix(path), "text")


def _suffix(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return os.path.splitext(name)[1]


def _folder(folder: Path) -> list[tuple[str, str]]:
    """Files of known kinds below the folder: those of a folder by name, then its subfolders. No hidden ones, no links to folders."""
    found, skipped = [], Counter[str]()
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in files if not name.startswith(".")):
            path = Path(parent, name)
            suffix = _suffix(path)
            if suffix in TABLES or suffix in TEXTS:
                found.append((reader(path), str(path)))
            else:
                skipped[suffix or "no suffix"] += 1
    listed = ", ".join(f"{count} x {suffix}" for suffix, count in skipped.most_common(8))
    if not found:
        raise ValueError(
            f"folder '{folder}' holds no file to read" + (f", only {listed}.\n" if listed else ": it is empty.\n") + f"  Accepted:"
            f" {' '.join(sorted(TABLES))} {' '.join(sorted(TEXTS))}, each also with .gz (not .parquet).\n"
            f"  To read other files as text name them by a pattern: '{folder}/*'."
        )
    if listed:
        logging.warning("%s: %d files of other kinds skipped (%s); a glob pattern reads them.", folder, skipped.total(), listed)
    return found


def _missing(source: str, path: Path, setting: str) -> str:
    parent = path.parent
    while not os.path.isdir(parent):
        parent = parent.parent
    missing = path.relative_to(parent).parts[0]
    siblings = {name: str(parent / name) for name in os.listdir(parent)} | {name: name for name in NAMED}
    near = difflib.get_close_matches(missing, siblings, n=1)
    hint = f" Did you mean '{siblings[near[0]]}'?" if near else f" '{parent.resolve()}' exists, but has no '{missing}'."
    what = "no file matches" if glob.has_magic(source) else "there is no"
    return f"{what} '{source}'.{hint}\n  Accepted: {ACCEPTED}.\n  A relative path starts at '{os.getcwd()}'. Change {setting}."
