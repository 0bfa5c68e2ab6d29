"""Tokenizers as the rest of the package sees them: make one, load one, tell whether two are the same."""

import hashlib
import importlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from jaxllm import registry
from jaxllm.data.tokenizers import files

if TYPE_CHECKING:
    from jaxllm.types import Tokenizer

# The kinds that a saved tokenizer may have; each is a module of data/tokenizers with `restore(saved)`.
KINDS = ("byte", "char", "huggingface", "sentencepiece")


def make(config: ConfigDict, texts: Callable[[], Iterable[str]]) -> "Tokenizer":
    """The tokenizer that `config.tokenizer` describes. Those that are trained call `texts()` once and read it to its end.

    ValueError if there is no text, or if `tokenizer.vocab_size` does not fit the text.
    """
    return registry.resolve("tokenizer", config.tokenizer.kind)(config, texts)


def load(directory: str | Path) -> "Tokenizer":
    """The tokenizer that `save(directory)` wrote; ValueError if there is none."""
    saved = files.read(directory)
    kind = saved.record.get("kind")
    if kind not in KINDS:
        raise ValueError(
            f"the tokenizer in '{directory}' is of kind {kind!r}.\n  Accepted: {', '.join(KINDS)}.\n"
            "  It was saved by another version of jaxllm: install that one, or prepare the data again."
        )
    try:
        return importlib.import_module(f"jaxllm.data.tokenizers.{kind}").restore(saved)
    except (files.NotATokenizer, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(files.damaged(directory, error)) from error


def fingerprint(tokenizer: "Tokenizer") -> str:
    """Hexadecimal SHA-256 of everything that decides the ids of a text: equal tokenizers, equal fingerprints."""
    digest = hashlib.sha256()
    for name, data in sorted(tokenizer.contents().items()):
        digest.update(f"{name} {len(data)}\n".encode() + data)
    return digest.hexdigest()
