"""Layer-wise learning-rate decay: the nearer to the input, the smaller the learning rate, as lower layers are the more general ones.

Of L layers, with decay d:

    layer i                              d^(L - 1 - i)
    embeddings, relative positions       d^L
    last norm, head                      1

as Howard and Ruder 2018, arXiv:1801.06146, section 3.2 have it (there each layer has 1 / 2.6 of the one above). Clark et al. 2020,
arXiv:2003.10555 (ELECTRA), take a d of 0.7 to 0.9. Deviations: in their code the last layer has d^2 already, in that of Bao et al. 2021,
arXiv:2106.08254 (BEiT), d, and embeddings one power of d more than the first layer, as here: with the same d the learning rates of our
layers and embeddings are 1 / d^2 and 1 / d times as large. In BEiT a table of relative positions that all layers share has 1.

An encoder and a decoder each count their own layers; what both read, the embeddings, counts those of the deeper one.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

from jaxllm.transforms import depth, tree


def slowed(rule: optax.GradientTransformation, decay: float, depths: Mapping[str, int]) -> optax.GradientTransformation:
    """`rule`, whose updates (a tree of the parameters' paths) are multiplied by these factors. depths: see transforms/depth.py."""

    def one(path: Any, update: jax.Array) -> jax.Array:
        name = tree.path_name(path)
        stack = depth.stack_of(name)
        if stack is not None:
            layers, layer = depths[stack], depth.layer_of(path)
            exponents = layers - 1 - (np.arange(layers) if layer is None else np.array(layer))
            return update * np.float32(decay**exponents).reshape(-1, *[1] * (update.ndim - 1) if layer is None else ())
        if not depth.is_below(name):
            return update
        own = [layers for stack, layers in depths.items() if stack.partition("/")[0] == name.partition("/")[0]]
        return update * np.float32(decay ** max(own or depths.values()))

    def update(gradients: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, state = rule.update(gradients, state, params)
        return jax.tree.map_with_path(one, updates), state

    return optax.GradientTransformation(rule.init, update)
