"""The optimizer of a config: an optax update rule, weight decay and learning-rate groups.

`make` gives a GradientTransformation whose updates are meant for a learning rate of 1: the train step computes

    params + learning_rate * updates,    updates = -lr_factor * (rule(gradients) + weight_decay * decay_factor * params)

so that there is one step counter (a skipped step leaves no second one behind) and weight decay is decoupled, times the learning rate,
for every rule (Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2, with alpha as the learning rate).

Trees may have None where a parameter is frozen: it has no state. A scanned stack is treated layer by layer, so both forms of the
stack get the same updates, and `transforms.tree.stack_layers` of the unrolled state is the scanned state.

Letters: D width, H heads, K head width, F mlp width, L layers.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxllm import registry
from jaxllm.optim import groups, layer_decay, small_state
from jaxllm.transforms import adapt, depth, tree
from jaxllm.types import Axes


def make(config: Any, axes: Any) -> optax.GradientTransformation:
    """The optimizer of the whole config, for a model whose parameters (frozen ones included) have these `axes`.

    update(gradients, state, params) -> (updates for a learning rate of 1, state). Gradients come in clipped. ValueError if a group's
    pattern selects nothing.
    """
    rule = registry.resolve("optimizer", config.optimizer.name)(config.optimizer, axes)
    factors = groups.faster(groups.factors(config.optimizer.groups, axes), adapt.adapters(axes), config.lora.lr_ratio)
    whole = _per_layer(optax.chain(rule, _decayed(config.optimizer.weight_decay, factors)), axes)
    kind, decay = config.optimizer.state, config.optimizer.layer_decay
    whole = whole if kind == "float32" else small_state.narrowed(whole, kind, axes)
    return whole if decay == 1 else layer_decay.slowed(whole, decay, depth.depths(config.model, axes))


def adamw(optimizer: Any, axes: Any) -> optax.GradientTransformation:
    """Adam's direction with bias correction (Kingma and Ba 2015, arXiv:1412.6980, algorithm 1)."""
    del axes
    return optax.scale_by_adam(b1=optimizer.b1, b2=optimizer.b2, eps=optimizer.eps)


def lion(optimizer: Any, axes: Any) -> optax.GradientTransformation:
    """sign(b1 m + (1 - b1) g), m <- b2 m + (1 - b2) g (Chen et al. 2023, arXiv:2302.06675, algorithm 2). Its authors take a learning
    rate 3-10 times smaller than AdamW's, a weight decay as much larger, and b2 = 0.99. `eps` plays no part."""
    del axes
    return optax.scale_by_lion(b1=optimizer.b1, b2=optimizer.b2)


def adafactor(optimizer: Any, axes: Any) -> optax.GradientTransformation:
    """Second moments as row and column means (Shazeer and Stern 2018, arXiv:1804.04235, algorithms 4 and 5) without momentum.

    The learning rate is relative, as in section 8 of the paper: each matrix moves by at most max(RMS(matrix), 1e-3) times it, 1e-2 being
    the paper's. Factored where both sides of the matrix are 128 or more. `b1`, `b2` and `eps` play no part: decay is 1 - t^-0.8.
    """
    del optimizer
    rule = optax.chain(
        optax.scale_by_factored_rms(decay_rate=0.8, epsilon=1e-30, min_dim_size_to_factor=128),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(1e-3),
    )
    return _as_matrices(rule, axes)


def muon(optimizer: Any, axes: Any) -> optax.GradientTransformation:
    """Orthogonalized momentum for the matrices inside layers (Jordan et al. 2024), Adam for embeddings, head, norms and biases.

    Five Newton-Schulz steps on the Nesterov momentum, times 0.2 sqrt(max(rows, columns)), which gives updates of Adam's size so that
    one learning rate and one weight decay serve both (Liu et al. 2025, arXiv:2502.16982, eq. 4). An attention kernel [D, H, K] is the
    matrix D x (H K), [H, K, D] is (H K) x D. `b1` is the momentum, `b2` is Adam's, `eps` serves both.
    """
    inputs = {name: count for name, count in _inputs(axes).items() if "layers" in name.split("/")}

    def labels(params: Any) -> Any:
        return jax.tree.map_with_path(lambda path, _: "matrix" if tree.path_name(path) in inputs else "other", params)

    def numbers(params: Any) -> Any:
        def one(path: Any, leaf: Any) -> optax.contrib.MuonDimensionNumbers:
            sides = tuple(range(leaf.ndim))
            count = inputs[tree.path_name(path)]
            return optax.contrib.MuonDimensionNumbers(sides[:count], sides[count:])

        return jax.tree.map_with_path(one, params)

    matrix = optax.chain(
        optax.contrib.scale_by_muon(beta=optimizer.b1, eps=optimizer.eps, weight_dimension_numbers=numbers),
        optax.stateless(
            lambda updates, _: jax.tree.map_with_path(lambda path, leaf: leaf * _rms_scale(path, leaf, inputs), updates)
        ),
    )
    return optax.partition({"matrix": matrix, "other": adamw(optimizer, axes)}, labels)


def _rms_scale(path: Any, leaf: jax.Array, inputs: Mapping[str, int]) -> float:
    count = inputs[tree.path_name(path)]
    return 0.2 * math.sqrt(max(math.prod(leaf.shape[:count]), math.prod(leaf.shape[count:])))


def _one_layer(axes: Axes) -> Axes:
    return axes[1:] if axes[:1] == ("layers",) else axes


def _leaf_axes(axes: Any) -> dict[str, Axes]:
    return dict(tree.named_leaves(axes, is_leaf=lambda leaf: isinstance(leaf, tuple)))


def _inputs(axes: Any) -> dict[str, int]:
    """Path name -> how many of its leading dimensions (within a layer) are the rows, for each parameter that is a matrix.

    A matrix maps the residual stream to something or something to it: "embed" (outside the layers "embed_rest") is one of its sides, all
    the rest is the other.
    """
    counts = {}
    for name, leaf in _leaf_axes(axes).items():
        sides = _one_layer(leaf)
        if len(sides) > 1 and {"embed", "embed_rest"} & {sides[0], sides[-1]}:
            counts[name] = 1 if sides[0] == "embed" else len(sides) - 1
    return counts


def _decayed(weight_decay: float, factors: Mapping[str, groups.Factors]) -> optax.GradientTransformation:
    """The last stage: decay and both factors, downhill."""

    def one(path: Any, update: jax.Array, param: jax.Array) -> jax.Array:
        factor = factors[tree.path_name(path)]
        decay = weight_decay * factor.weight_decay
        return -factor.learning_rate * (update + decay * param if decay else update)

    return optax.stateless(lambda updates, params: jax.tree.map_with_path(one, updates, params))


def _as_matrices(rule: optax.GradientTransformation, axes: Any) -> optax.GradientTransformation:
    """`rule` on gradients and parameters with every matrix as 2 dimensions, [D, H, K] as [D, H K]."""
    inputs = _inputs(axes)

    def flat(path: Any, leaf: jax.Array) -> jax.Array:
        count = inputs.get(tree.path_name(path))
        return leaf if count is None else leaf.reshape(math.prod(leaf.shape[:count]), math.prod(leaf.shape[count:]))

    def init(params: Any) -> Any:
        return rule.init(jax.tree.map_with_path(flat, params))

    def update(gradients: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, state = rule.update(jax.tree.map_with_path(flat, gradients), state, jax.tree.map_with_path(flat, params))
        return jax.tree.map(lambda leaf, like: leaf.reshape(like.shape), updates, gradients), state

    return optax.GradientTransformation(init, update)


def _per_layer(rule: optax.GradientTransformation, axes: Any) -> optax.GradientTransformation:
    """`rule` where each layer of a scanned stack is seen by itself; the rule as it is where layers are unrolled or have no parameter."""
    stacked = [name for name, leaf in _leaf_axes(axes).items() if leaf[:1] == ("layers",)]

    def stack_of(path: Any) -> str | None:
        """The stacked parameter that this array belongs to: paths of states end with its path, e.g. `mu/layers/mlp/up/kernel`."""
        return next((name for name in stacked if f"/{tree.path_name(path)}".endswith(f"/{name}")), None)

    def is_stacked(path: Any) -> bool:
        return stack_of(path) is not None

    def layer_axes(values: Any) -> Any:
        return jax.tree.map_with_path(lambda path, _: 0 if is_stacked(path) else None, values)

    def one_layer(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape[1:] if is_stacked(path) else leaf.shape, leaf.dtype)

    def mapped(function: Any, *arguments: Any) -> Any:
        sides = layer_axes(arguments)
        if not jax.tree.leaves(sides):
            return function(*arguments)
        results = jax.eval_shape(function, *jax.tree.map_with_path(one_layer, arguments))
        layers = {stack_of(path): leaf.shape[0] for path, leaf in jax.tree.leaves_with_path(arguments) if is_stacked(path)}
        # An encoder and a decoder may differ in depth: the shorter stack is filled up, and what comes of that is cut off.
        most = max(layers.values())

        def fill(path: Any, leaf: jax.Array) -> jax.Array:
            missing = most - layers.get(stack_of(path), most)
            return jnp.pad(leaf, [(0, missing), *[(0, 0)] * (leaf.ndim - 1)]) if missing else leaf

        def cut(path: Any, leaf: jax.Array) -> jax.Array:
            return leaf[: layers[stack_of(path)]] if is_stacked(path) else leaf

        mapped_results = jax.vmap(function, in_axes=sides, out_axes=layer_axes(results))(*jax.tree.map_with_path(fill, arguments))
        return jax.tree.map_with_path(cut, mapped_results)

    def init(params: Any) -> Any:
        return mapped(rule.init, params)

    def update(gradients: Any, state: Any, params: Any) -> tuple[Any, Any]:
        return mapped(rule.update, gradients, state, params)

    return optax.GradientTransformation(init, update)
