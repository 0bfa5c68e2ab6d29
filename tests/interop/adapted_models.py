"""Tiny models with adapters whose numbers are all random, B's too."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from foreign_models import MODELS, make
from ml_collections import ConfigDict

from jaxllm import models
from jaxllm.transforms import adapt, leaf, tree
from jaxllm.types import Model, Params

EVERY = ".*layers/.*/kernel|pooler/kernel|head/dense/kernel"
Q_V, ONLY_Q, MLP = ".*attention/(q|v)/kernel", ".*attention/q/kernel", ".*mlp/.*/kernel"
TOKENS, HEAD = "embed/tokens", "head/kernel"
# model (foreign_models.py), kind, lora.targets, lora.also: kernels of every kind, of one kind, of one side, and of a part of what GPT-2
# holds side by side, and of tables, tied and untied; of what is trained whole tied and untied embeddings, norms, heads, a table.
CASES = [
    ("gpt2", "lora", EVERY, ""),
    ("gpt2", "lora", Q_V, "embed/.*|.*norm/.*"),
    ("gpt2", "dora", ONLY_Q, ""),
    ("gpt2", "dora", EVERY, ""),
    ("gpt2", "rslora", EVERY, ""),
    ("gpt2", "rslora", MLP, "norm/scale"),
    ("gpt2", "pissa", Q_V + "|" + MLP, ""),
    ("gpt2 untied", "lora", ".*layers/.*/kernel", "head/kernel"),
    ("gpt2 classes", "lora", Q_V, ""),
    ("llama", "lora", EVERY, "embed/tokens|head/kernel|.*norm/scale"),
    ("llama", "dora", EVERY, ""),
    ("llama", "pissa", EVERY, ""),
    ("llama tied", "rslora", Q_V, "embed/tokens"),
    ("llama biases", "dora", Q_V, "norm/scale"),
    ("llama classes", "lora", MLP, "head/.*"),
    ("mistral", "lora", EVERY, ""),
    ("qwen2", "dora", Q_V, ""),
    ("bert", "lora", EVERY, ""),
    ("bert", "dora", ".*layers/.*/kernel", "embed/tokens|head/bias"),
    ("bert", "rslora", Q_V, "head/.*|.*norm/.*"),
    ("bert", "pissa", ".*mlp/down/kernel", ""),
    ("bert classes", "lora", EVERY, ""),
    ("bert tags", "dora", ".*mlp/down/kernel", "embed/.*"),
    ("bert alone", "lora", ".*attention/o/kernel", "embed/norm/.*"),
    ("t5", "lora", "decoder/layers/attention/q/kernel", ""),
    ("t5", "dora", "decoder/layers/.*/kernel", "embed/tokens"),
    ("t5", "rslora", ".*cross/(k|v)/kernel", ".*norm/scale|.*relative/table"),
    ("t5", "pissa", Q_V, ""),
    ("t5 1.1", "lora", MLP, "head/kernel"),
    ("t5 1.1", "dora", EVERY, "embed/tokens"),
    ("gpt2", "rslora", f"{TOKENS}|{MLP}", ""),
    ("gpt2 untied", "pissa", f"{TOKENS}|{HEAD}|{ONLY_Q}", ""),
    ("gpt2 classes", "dora", TOKENS, ""),
    ("llama", "lora", f"{TOKENS}|{HEAD}|{EVERY}", "norm/scale"),
    ("llama", "dora", f"{TOKENS}|{HEAD}", ""),
    ("llama tied", "lora", f"{TOKENS}|{Q_V}", ""),
    ("llama tied", "pissa", TOKENS, ""),
    ("bert", "lora", TOKENS, "embed/norm/.*"),
    ("bert alone", "dora", f"{TOKENS}|{Q_V}", ""),
    ("t5", "lora", f"{TOKENS}|{Q_V}", ""),
    ("t5 1.1", "dora", f"{TOKENS}|{HEAD}|{MLP}", ""),
]


def adapted(
    case: str, kind: str, targets: str, layers_as: str = "unrolled", start_rows: int = 0
) -> tuple[ConfigDict, Model, Params, Params]:
    """(config, model, parameters with adapters, the base that they began with); `kind`: lora, rslora, dora or pissa.

    start_rows: of the tables, below which there are new tokens.
    """
    fields = MODELS[case][1] | {"layers_as": layers_as, "start_rows": start_rows}
    config, dense_model, base = make(fields)
    config.train.transforms = ("dora" if kind == "dora" else "lora",)
    settings = {"rank": 3, "alpha": 7.0, "targets": targets, "rslora": kind == "rslora"}
    config.lora.update(settings | {"init": "pissa" if kind == "pissa" else "zero"})
    model = models.build(config)
    begun = adapt.Adaptation(dense_model.axes, model.config.transforms).params(base, jax.random.key(0))
    trained, rng = adapt.adapters(model.axes), np.random.default_rng(1)

    # Small: with large factors attention is so sharp that rounding is seen. Those of PiSSA are large before anything is added.
    size = 0.05 if kind == "pissa" else 0.2

    def draw(path: Any, array: jax.Array) -> jax.Array:
        noise = size * rng.normal(size=array.shape) if tree.path_name(path) in trained else 0.0
        return jnp.asarray(array + noise, "float32")

    return config, model, jax.tree.map_with_path(draw, begun), base


def dense(params: Params) -> Params:
    """The parameters with each adapter multiplied out."""

    def one(path: Any, node: Any) -> jax.Array:
        stacked = "layers" in tree.path_name(path).split("/") and not any(
            isinstance(key, jax.tree_util.SequenceKey) for key in path
        )
        return jax.vmap(leaf.dense)(node) if stacked and leaf.is_type(node) else leaf.dense(node)

    return jax.tree.map_with_path(one, params, is_leaf=leaf.is_type)


# Models whose vocabulary grows; untied, tied, with a bias at the output, with three places that read one table, and without a head.
GROWN = ["llama", "llama tied", "gpt2", "bert", "t5", "bert classes"]
START_ROWS = 9


def before_it_grew(config: ConfigDict, params: Params) -> tuple[ConfigDict, Params]:
    """The base of a model whose vocabulary grew, itself a run that began with fewer tokens and was trained whole."""

    def one(path: Any, node: Any) -> Any:
        node = node.base if adapt.is_adapter(node) else node
        return node[:START_ROWS] if tree.path_name(path) == "head/bias" and config.model.head == "lm" else node

    config = without_transforms(config)
    config.model.vocab_size, config.model.start_rows = START_ROWS, START_ROWS - 4
    return config, jax.tree.map_with_path(one, params, is_leaf=adapt.is_adapter)


def without_transforms(config: ConfigDict) -> ConfigDict:
    """Of the base."""
    config = config.copy_and_resolve_references()
    config.train.transforms = ()
    return config
