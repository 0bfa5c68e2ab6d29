"""Models of a thousand parameters of every architecture, with drawn parameters, and batches with padding."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxllm.config import base
from jaxllm.transforms import tree
from jaxllm.types import Model, Params

VOCAB, ROWS, BATCH, LENGTH = 24, 4, 2, 8
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt": {"name": "gpt"},
    "llama": {"name": "llama", "kv_heads": 2, "bias": "qkv"},
    "bert": {"name": "bert"},
    "t5": {"name": "t5", "relative_buckets": 8, "relative_max_tokens": 6, "decoder_layers": 3},
    "transformer": {"name": "transformer"},
}
TWO_SIDED = ("t5", "transformer")


def tiny(family: str, **more: Any) -> ConfigDict:
    config = base()
    sizes = {"vocab_size": VOCAB, "layers": 2, "width": 16, "heads": 4, "mlp_width": 24, "context_tokens": 16}
    config.model.update({**sizes, **FAMILIES[family], **more})
    return config


def draw(model: Model) -> Params:
    """Normal parameters, so that no bias is 0 and no scale is 1."""
    rng = np.random.default_rng(0)

    def one(path: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
        name = tree.path_name(path)
        return jnp.asarray(rng.normal(size=like.shape) * 0.3 + name.endswith("scale"), jnp.float32)

    return jax.tree.map_with_path(one, jax.eval_shape(model.init, jax.random.key(0)))


def batches(family: str, seed: int = 1) -> list[dict[str, jax.Array]]:
    """Two documents a row and padding at its end, more in each row than in the one before; inputs are as many and padded otherwise."""
    rng, found = np.random.default_rng(seed), {}

    def rows(name: str, prefix: str, padding: list[int]) -> None:
        segments = np.array([[1] * 3 + [2] * (LENGTH - 3 - pad) + [0] * pad for pad in padding], np.int32)
        places = np.array([[*range(3), *range(LENGTH - 3)]] * ROWS, np.int32)
        found.update({name: rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)})
        found.update({f"{prefix}segments": segments, f"{prefix}positions": places})

    rows("tokens", "", [0, 1, 2, 3])
    if family in TWO_SIDED:
        rows("inputs", "input_", [2, 0, 4, 1])
    return [{name: jnp.asarray(x[start : start + BATCH]) for name, x in found.items()} for start in range(0, ROWS, BATCH)]
