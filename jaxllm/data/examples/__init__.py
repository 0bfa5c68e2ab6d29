"""The data side of the objectives: what is stored, and how stored rows become the arrays of a batch."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
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
    blocks = _counted(made.pack(documents, tokenizer, labels, totals), made.tokens_a_row, totals)
    return shards.write(directory, blocks, made.columns(size), row_tokens=row_tokens(config), vocab_size=size, totals=totals)


def _counted(blocks: Iterable[shards.Block], tokens_a_row: int, totals: shards.Totals) -> Iterator[shards.Block]:
    """The blocks; counts their positions, and as padding what their segments leave out."""
    for block in blocks:
        totals.positions += len(next(iter(block.values()))) * tokens_a_row
        totals.padding += sum(int(np.count_nonzero(block[name] == 0)) for name in ("segments", "input_segments") if name in block)
        yield block
