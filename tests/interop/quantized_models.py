"""Tiny models whose kernels are quantized."""

from typing import Any

import jax
import numpy as np
from foreign_models import make

from jaxllm.transforms import affine, int8, nf4
from jaxllm.transforms.quantized import Quantized
from jaxllm.transforms.tree import path_name
from jaxllm.types import Model, Params

# A multiple of every block, and of the codes of a word.
SIZES = {"width": 64, "heads": 2, "head_dim": 64, "mlp_width": 128}
GPT_SIZES = {"width": 128, "heads": 2, "mlp_width": 192}


def sizes(fields: dict[str, Any]) -> dict[str, Any]:
    """Without groups of heads in BERT and T5, and with a head width where it is no consequence."""
    return GPT_SIZES if fields["name"] in ("gpt", "bert") else SIZES | ({"kv_heads": 1} if fields["name"] == "llama" else {})


def quantize(kernel: jax.Array, inputs: int, kind: str, **grid: Any) -> Quantized:
    """kind: "nf4", "double", "int8", or "grid" with the fields of a Grid; groups that an index gives are drawn, the same for each size."""
    if kind in ("nf4", "double"):
        return nf4.quantize(kernel, inputs, kind == "double")
    if kind == "int8":
        return int8.quantize(kernel, inputs)
    wanted = affine.Grid(**{"bits": 4, "group": 32, "scale_dtype": "float16"} | grid)
    leaf = affine.quantize(kernel, inputs, wanted)
    if leaf.groups is None:
        return leaf
    groups = np.random.default_rng(0).permutation(np.asarray(leaf.groups).reshape(-1)).reshape(leaf.groups.shape)
    return affine.Affine(leaf.codes, leaf.scale, leaf.zero, jax.numpy.asarray(groups), leaf.axis, leaf.bits)


def quantized(fields: dict[str, Any], kind: str, vocab_size: int = 40, **grid: Any) -> tuple[Any, Model, Params]:
    """(config, model, parameters) with the kernels of all layers quantized."""
    config, model, params = make(fields, **sizes(fields), vocab_size=vocab_size)

    def one(path: Any, leaf: jax.Array) -> Any:
        name = path_name(path).split("/")
        if "layers" not in name or name[-1] != "kernel":
            return leaf
        # Small enough for logits that float32 adds up to a few millionths.
        return quantize(leaf / 8, 2 if name[-2] == "o" else 1, kind, **grid)

    return config, model, jax.tree.map_with_path(one, params)
