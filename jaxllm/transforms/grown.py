"""A frozen table of tokens with trained rows for new tokens below it: an embedding, an output head, or the one that is both.

Training the whole table for the sake of a few rows would need its gradient and its optimizer state, 12 bytes for each of its numbers.

Letters: V rows that were there, N new rows, D width.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxllm.transforms.product import product
from jaxllm.transforms.tree import named_leaves
from jaxllm.types import Params, Transform

EMBEDDING, HEAD = "embed/tokens", "head/kernel"
TABLES = (EMBEDDING, HEAD, "head/bias")


def tables(head: str) -> tuple[str, ...]:
    """Path names of the parameters that have a row for each token in a model with this model.head, as far as it has them."""
    return TABLES if head == "lm" else TABLES[:1]


@partial(jax.tree_util.register_dataclass, data_fields=("base", "rows"), meta_fields=("kind",))
@dataclasses.dataclass(frozen=True)
class Grown:
    """A leaf of the parameter tree. base [V, D]; rows [N, D]; or their axes."""

    base: Any
    rows: Any
    kind: str = "grown"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.base.shape[0] + self.rows.shape[0], *self.base.shape[1:])

    def multiply(self, spec: str, x: jax.Array) -> jax.Array:
        return product(spec, x, self.dense())

    def take(self, ids: jax.Array) -> jax.Array:
        """The rows with these ids; NaN for an id beyond all of them."""
        old = self.base.shape[0]
        of_base = jnp.take(self.base, jnp.minimum(ids, old - 1), axis=0).astype(self.rows.dtype)
        of_rows = jnp.take(self.rows, jnp.maximum(ids - old, 0), axis=0, mode="fill")
        return jnp.where((ids < old)[..., None], of_base, of_rows)

    def map_rows(self, function: Callable[[jax.Array, str], jax.Array], axis: str) -> "Grown":
        """function(rows, their logical axis) of both parts."""
        return dataclasses.replace(self, base=function(self.base, axis), rows=function(self.rows, "new_tokens"))

    def dense(self) -> jax.Array:
        """float32 [V + N, D]."""
        return jnp.concatenate([self.base.astype(self.rows.dtype), self.rows])


def make(config: ConfigDict) -> Transform:
    """Cuts the tables after the rows that `train.start` had."""
    rows = config.model.start_rows

    def apply(table: jax.Array, inputs: int, rng: jax.Array) -> Grown:
        del inputs, rng
        return Grown(table[:rows], table[rows:])

    def axes(axes: Any, inputs: int) -> Grown:
        del inputs
        return Grown(axes, ("new_tokens", *axes[1:]))

    targets = f"{EMBEDDING}|{HEAD}" if config.model.head == "lm" else EMBEDDING
    return Transform(targets, apply, axes, adapts=True, tables=True)


def names(params: Params) -> set[str]:
    """Path names of the tables that are in two pieces."""
    return {name for name, node in named_leaves(params, is_leaf=_is_grown) if _is_grown(node)}


def joined(params: Params) -> Params:
    """The same parameters with each table in one piece."""
    return jax.tree.map(lambda node: node.dense() if _is_grown(node) else node, params, is_leaf=_is_grown)


def _is_grown(node: Any) -> bool:
    return isinstance(node, Grown)
