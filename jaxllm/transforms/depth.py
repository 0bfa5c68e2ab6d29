"""Where a parameter stands in its model: below the layers, in one of them, or behind them.

Below are the embeddings (of tokens, positions and token types, with their norm) and the tables of relative positions, which the first layer
reads as all others do. Behind are the last norm and the head. A tied head is the embedding, so it is below.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxllm.transforms import tree


def stack_of(name: str) -> str | None:
    """ "layers", "encoder/layers" or "decoder/layers" for the path name of a parameter inside of layers, else None."""
    before, inside, _ = name.partition("layers/")
    return f"{before}layers" if inside else None


def is_below(name: str) -> bool:
    """Whether the parameter of this path name is below the layers."""
    return name.startswith("embed/") or "relative" in name.split("/")[:-1]


def layer_of(path: Sequence[Any]) -> int | None:
    """The layer that the array at this key path of a parameter tree belongs to; None outside of layers and where they are stacked."""
    return next((key.idx for key in path if isinstance(key, jax.tree_util.SequenceKey)), None)


def depths(model: Any, axes: Any) -> Mapping[str, int]:
    """Layers of each stack: {"layers": 6}, or {"encoder/layers": 6, "decoder/layers": 4}. model: config.model; axes: of all parameters."""
    stacks = dict.fromkeys(stack for name in tree.names(axes) if (stack := stack_of(name)))
    return {stack: (stack.startswith("decoder") and model.decoder_layers) or model.layers for stack in stacks}
