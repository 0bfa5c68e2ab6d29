"""Text that is not a run's own, packed into rows as the run's were."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from absl import logging
from ml_collections import ConfigDict

from jaxllm.data import clean, documents, examples, shards
from jaxllm.data.documents import Document
from jaxllm.data.examples import labels
from jaxllm.types import Tokenizer


def pack(
    config: ConfigDict,
    tokenizer: Tokenizer,
    classes: tuple[str, ...],
    source: str,
    directory: Path,
    *,
    setting: str,
    most_characters: int = 0,
) -> shards.Shards:
    """Rows of the text of `source`, anything that data.source may be, in `directory`: cleaned, encoded and packed as `config` says.

    setting: the flag that names the source, for errors. most_characters: to be read, about; 0 for all; text that is longer is cut there.
    However few documents of its own a run used. A warning says what was dropped. ValueError for a source that cannot be read or gives no
    row.
    """
    found = _cleaned(config, source, classes, setting, most_characters)
    rows = examples.write(config, directory, found, tokenizer, classes, shards.Totals())
    _tell_dropped(rows.dropped, source)
    return rows


def _cleaned(config: ConfigDict, source: str, classes: tuple[str, ...], setting: str, most_characters: int) -> Iterator[Document]:
    config = config.copy_and_resolve_references()
    config.data.max_documents = 0
    cleaner, dropped, left = clean.make(config), Counter[str](), most_characters
    reads = examples.make(config).reads
    cuts, named = most_characters and reads == "text", bool(classes) and reads in ("label", "labels")
    for document in documents.open(source, config, setting=setting):
        cleaned = cleaner(document)
        if isinstance(cleaned, clean.Dropped):
            dropped[cleaned.reason] += 1
            continue
        if named:
            labels.check_known(labels.of(cleaned), classes, cleaned.origin)
        yield cleaned._replace(text=cleaned.text[:left]) if cuts else cleaned
        left -= len(cleaned.text)
        if most_characters and left <= 0:
            break
    _tell_dropped(dropped, source)


def _tell_dropped(dropped: Mapping[str, int], source: str) -> None:
    if dropped:
        logging.warning("documents dropped from %s: %s", source, ", ".join(f"{count} by {name}" for name, count in dropped.items()))
