"""Adapters of the table of tokens and of the output head: what is special about them beside those of kernels.

PEFT keeps A and B of an embedding as lora_embedding_A [rank, V] and lora_embedding_B [D, rank], those of a head as of any Linear. A tied
head that follows its embedding has its factors the other way round: lora_A = lora_embedding_B^T, lora_B = lora_embedding_A^T. And rows of
single tokens are stored instead of a product (trainable_token_indices): these become a whole table here, with the rows written into it.
"""

import dataclasses
from collections.abc import Callable, Collection

import numpy as np

from jaxllm.interop.peft import ROWS, Adapter
from jaxllm.interop.peft_modules import of_tensor
from jaxllm.interop.weights import Slot
from jaxllm.transforms import lora
from jaxllm.transforms.grown import EMBEDDING, HEAD

# As in types.Transform, of what is stored as it is here.
INPUTS = {EMBEDDING: 0, HEAD: -1}


def takes(slot: Slot, head: str) -> bool:
    """Whether an adapter can stand beside the parameter, in a model with this model.head."""
    return bool(slot.rule.inputs) or slot.rule.path == EMBEDDING or (slot.rule.path == HEAD and head == "lm")


def sides(slot: Slot) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of what A reads and of what B gives."""
    return lora.sides(slot.shape, INPUTS.get(slot.rule.path, slot.rule.inputs))


def turns(module: str) -> bool:
    """Whether a module that is tied to the embedding is a head, not one more look-up, as the stacks of T5 have."""
    return not module.endswith(".embed_tokens")


def alike(adapter: Adapter, embedding: str, others: Collection[str]) -> bool:
    """Whether these modules, all of which have products, add to one table what the module `embedding` adds."""
    if adapter.dora:
        return not any(map(turns, others))  # lengths are of columns there, and of rows here
    first = adapter.factors(embedding)
    for module in others:
        found = adapter.factors(module)
        a, b = (found.b.T, found.a.T) if turns(module) else (found.a, found.b)
        if found.scale != first.scale or not np.array_equal(a, first.a) or not np.array_equal(b, first.b):
            return False
    return True


def with_tables(
    adapter: Adapter, base: Callable[[str], np.ndarray | None], canonical: Callable[[str], str], embedding: str
) -> Adapter:
    """The adapter with a table, stored whole, in the place of each set of rows.

    base(name): a table of the base, or None; names are canonical ones. embedding: the name of the embedding. In a tied model all that is
    tied to it follows its rows, as in PEFT, and not those of a head. ValueError for tables that the base has not, or tokens beyond them.
    """
    if not adapter.tokens:
        return adapter
    tables, saved = dict[str, np.ndarray](), adapter.saved
    for module, ids in adapter.tokens.items():
        name, rows = f"{module}.weight", adapter.read(module + ROWS)
        table = adapter.read(name) if name in adapter.shapes else base(canonical(name))
        if table is None or table.shape[1:] != rows.shape[1:] or max(ids) >= len(table):
            what = "no such table" if table is None else f"one of {list(table.shape)}"
            raise ValueError(
                f"{adapter.where}: {module}{ROWS} {list(rows.shape)} replaces the rows of tokens up to {max(ids)}, and the base has"
                f" {what}.\n  Accepted: rows of tokens that the base has.\n"
                "  Give the base that it was trained on, or save it with the grown embedding (save_embedding_layers=True)."
            )
        tables[name] = np.array(table, np.float32)
        tables[name][list(ids)] = rows
    if embedding not in map(canonical, tables):
        saved = (*saved, *map(of_tensor, tables))
    shapes = {name: shape for name, shape in adapter.shapes.items() if not name.endswith(ROWS)}
    return dataclasses.replace(
        adapter,
        saved=saved,
        tokens={},
        shapes=shapes | {name: table.shape for name, table in tables.items()},
        read=lambda name: tables[name] if name in tables else adapter.read(name),
    )
