"""The data side of the objectives: what is stored, and how stored rows become the arrays of a batch."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from jaxllm import registry
from jaxllm.data import shards
from jaxllm.data.documents import Document
from jaxllm.data.examples.contract import Examples, row_tokens

if TYPE_CHECKING:
    from jaxllm.types import Tokenizer


def make(config: ConfigDict) -> Examples:
    """The data side of `train.objective`; ValueError for sizes that do not fit."""
    examples: Examples = registry.resolve("examples", config.train.objective)(config)
    return examples


def replayed(config: ConfigDict) -> ConfigDict:
    """The config by which data.replay_source is prepared and evaluated: with the objective itself, but plain text beside conversations."""
    if config.train.objective != "sft":
        return config
    config = config.copy_and_resolve_references()
    config.train.objective = "causal_lm"
    return config


def write(
    config: ConfigDict,
    directory: str | Path,
    documents: Iterable[Document],
    tokenizer: "Tokenizer",
    labels: tuple[str, ...],
    totals: shards.Totals,
) -> shards.Shards:
    """The documents as stored rows in a new directory, opened. `totals` counts what went in."""
    made, size = make(config), tokenizer.vocab_size
    blocks = made.pack(documents, tokenizer, labels, totals)
    return shards.write(directory, blocks, made.columns(size), row_tokens=row_tokens(config), vocab_size=size, totals=totals)
