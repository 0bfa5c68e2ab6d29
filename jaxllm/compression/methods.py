"""The ways to compress a layer, each put together of the same parts: scales of inputs, codes, and the error that they leave."""

import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.compression import awq, folds, gptq
from jaxllm.compression import grid as grids
from jaxllm.compression.folds import Fold
from jaxllm.compression.report import KernelError
from jaxllm.compression.statistics import Statistics
from jaxllm.compression.walk import Compress, Layers, Site
from jaxllm.models.architecture import Architecture
from jaxllm.transforms import nf4, tree
from jaxllm.transforms.affine import Grid
from jaxllm.types import Model, Params

# Method -> what it is, in words.
METHODS = {
    "nearest": "each weight to the nearest code",
    "clip": "to the nearest code of clipped ranges",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "awq+gptq": "AWQ, then GPTQ",
    "smoothquant": "SmoothQuant, activations in 8 bits",
    "nf4": "NF4",
}
# Tokens that a search for scales sends through a layer for each candidate.
SEARCH_TOKENS = 2048
# How much of the difficulty goes from activations to weights (SmoothQuant, eq. 4).
SMOOTH = 0.5


class Recipe(NamedTuple):
    """method: of METHODS. order, damp: of GPTQ. double: of NF4."""

    method: str
    grid: Grid
    order: str = "static"
    damp: float = 0.01
    double: bool = True


class _Scaled(NamedTuple):
    """A layer with scaled inputs. inputs: what those of a kernel were multiplied with; outputs: what its outputs were divided by."""

    layer: Params
    inputs: dict[str, jax.Array]
    outputs: dict[str, jax.Array]

    def original(self, name: str, kernel_IO: jax.Array) -> jax.Array:
        """What a kernel of the scaled layer is in the layer as it was."""
        if name in self.inputs:
            kernel_IO = kernel_IO / self.inputs[name][:, None]
        return kernel_IO * self.outputs.get(name, 1.0)

    def moments(self, name: str, second_II: jax.Array) -> jax.Array:
        """The same of the sum of x x^T that it reads."""
        s_I = self.inputs.get(name)
        return second_II if s_I is None else second_II * s_I[:, None] * s_I


def make(recipe: Recipe, arch: Architecture, chosen: Collection[str], found: list[KernelError]) -> Compress:
    """What compresses a layer of a model (walk.py): its kernels with these path names; their errors are added to `found`."""

    def compress(layer: Params, site: Site) -> Params:
        def whole(name: str) -> str:
            return "/".join((*site.path, name))

        scaled = _scaled(recipe, arch, lambda name: whole(name) in chosen, layer, site)
        layer = scaled.layer
        for group in site.groups:
            names = [name for name in group if whole(name) in chosen]
            if not names:
                continue
            # Anew for each group: what it reads has gone through the codes of the groups before.
            read = site.statistics(layer, group)
            says_nothing = _is_blank(read, f"{whole(names[0])} of layer {site.number}")
            for name in names:
                kernel = kernel_of(layer, name)
                leaf = _leaf(recipe, name, kernel, None if says_nothing else read)
                before, after = (scaled.original(name, grids.matrix(each, inputs_of(name))) for each in (kernel, leaf.dense()))
                errors = _errors(recipe, before, after, scaled.moments(name, read.second_II))
                found.append(KernelError(site.number, whole(name), *map(float, errors)))
                layer = with_kernel(layer, name, leaf)
        return layer

    return compress


def _is_blank(read: Statistics, name: str) -> bool:
    """Whether nothing but 0 was read, so that no code is better than another. ValueError for what is not finite."""
    whole = float(jnp.trace(read.second_II))
    if not math.isfinite(whole):
        raise ValueError(
            f"{name} reads numbers on the calibration data that are not finite, or whose squares are not.\n"
            "  Accepted: data on which all activations are finite.\n"
            "  Look at the model (python -m jaxllm.evaluate), take other data (--calibrate), or leave the kernel out (--targets)."
        )
    return whole == 0


def without_data(recipe: Recipe, model: Model, params: Params, chosen: Collection[str]) -> Params:
    """`params` with the kernels of these path names compressed, each by itself, in place: for methods that need no data."""
    for stack in model.stacks:
        layers = Layers(tree.get(params, stack.path))
        for index in range(stack.layers):
            layer = layers.take(index)
            for name in tree.names(layer):
                if "/".join((*stack.path, name)) in chosen:
                    layer = with_kernel(layer, name, _leaf(recipe, name, kernel_of(layer, name), None))
            layers.put(index, layer)
        tree.put(params, stack.path, layers.after)
    return params


def kernel_of(layer: Params, name: str) -> Any:
    """A kernel of a layer, "attention/q/kernel"."""
    return tree.get(layer, name.split("/"))


def with_kernel(layer: Params, name: str, kernel: Any) -> Params:
    """The layer with another kernel; nothing is changed in place."""
    return tree.replaced(layer, name.split("/"), kernel)


def inputs_of(name: str) -> int:
    """How many axes of the kernel are summed over."""
    return 2 if name.endswith("/o/kernel") else 1


def _leaf(recipe: Recipe, name: str, kernel: jax.Array, read: Statistics | None) -> Any:
    """The compressed kernel; read: None for methods that need no data."""
    inputs, grid, matrix = inputs_of(name), recipe.grid, grids.matrix(kernel, inputs_of(name))
    if recipe.method == "nf4":
        return jax.jit(nf4.quantize, static_argnums=(1, 2))(kernel, inputs, recipe.double)
    if read is None:
        rounded = grids.round_to_nearest(matrix, grid)
    elif recipe.method in ("gptq", "awq+gptq"):
        rounded, _ = gptq.solve(matrix, read.second_II, grid, recipe.damp, recipe.order)
    elif recipe.method in ("clip", "awq"):
        rounded = grids.clipped(matrix, read.second_II, grid)
    else:
        rounded = grids.round_to_nearest(matrix, grid)
    return grids.leaf(rounded, kernel.shape, inputs, grid, rounds=recipe.method == "smoothquant")


def _errors(recipe: Recipe, kernel_IO: jax.Array, dense_IO: jax.Array, hessian_II: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(relative error of the outputs, that of the nearest codes)."""
    nearest = grids.round_to_nearest(kernel_IO, recipe.grid).dense(recipe.grid)
    return grids.relative_error(kernel_IO, dense_IO, hessian_II), grids.relative_error(kernel_IO, nearest, hessian_II)


def _scaled(recipe: Recipe, arch: Architecture, chosen: Callable[[str], bool], layer: Params, site: Site) -> _Scaled:
    """The layer with the inputs of its kernels scaled, and the inverse folded into what comes before, where the method does so."""
    scaled = _Scaled(layer, {}, {})
    if recipe.method not in ("awq", "awq+gptq", "smoothquant"):
        return scaled
    # All that reads the same is scaled, or nothing.
    for each in folds.find(arch, layer):
        if not any(map(chosen, each.kernels)):
            continue
        layer = scaled.layer
        read = site.statistics(layer, each.kernels)
        s_S = _smooth(layer, each, read) if recipe.method == "smoothquant" else _awq(recipe, layer, each, site, read)
        outputs = {name: s_S for name in each.sources if name.endswith("/kernel")}
        scaled = _Scaled(
            folds.fold(layer, each, s_S), scaled.inputs | dict.fromkeys(each.kernels, each.spread(s_S)), scaled.outputs | outputs
        )
    return scaled


def _smooth(layer: Params, each: Fold, read: Statistics) -> jax.Array:
    """s = max|x|^a / max|w|^(1 - a) of each input (Xiao et al. 2022, arXiv:2211.10438, eq. 4), the mean of those that are tied."""
    weights_I = jnp.stack([jnp.abs(grids.matrix(kernel_of(layer, name), inputs_of(name))).max(1) for name in each.kernels]).max(0)
    ratio_I = jnp.maximum(read.largest_I, 1e-5) ** SMOOTH / jnp.maximum(weights_I, 1e-5) ** (1 - SMOOTH)
    return each.join(jnp.maximum(ratio_I, 1e-5), jnp.mean)


def _awq(recipe: Recipe, layer: Params, each: Fold, site: Site, read: Statistics) -> jax.Array:
    """Of the candidates that make no kernel's own error larger the one with the least error of what the layer gives, [S]."""
    scales_CS = awq.candidates(each.join(read.absolute_I / jnp.maximum(read.tokens, 1), jnp.mean))
    kernels = {name: kernel_of(layer, name) for name in each.kernels}

    def own(name: str) -> Callable[[jax.Array], jax.Array]:
        loss = awq.linear_loss(grids.matrix(kernels[name], inputs_of(name)), read.second_II, recipe.grid)
        return lambda s_S: loss(each.spread(s_S))

    if len(kernels) == 1:
        # The layer's output is its own one, or close behind: the error of that is known without running anything.
        return awq.search(scales_CS, own(*kernels))
    scales_CS = awq.harmless(scales_CS, [own(name) for name in kernels])
    expected = site.outputs(layer, SEARCH_TOKENS)

    def loss(s_S: jax.Array) -> jax.Array:
        tried = layer
        for name, kernel in kernels.items():
            rounded = awq.rounded(grids.matrix(kernel, inputs_of(name)), each.spread(s_S), recipe.grid)
            tried = with_kernel(tried, name, rounded.reshape(kernel.shape))
        return _distance(site.outputs(tried, SEARCH_TOKENS), expected)

    return awq.search(scales_CS, loss)


def _distance(some: list[jax.Array], others: list[jax.Array]) -> jax.Array:
    """The sum of squared differences."""
    return jnp.stack([_squares(one, other) for one, other in zip(some, others, strict=True)]).sum()


@jax.jit
def _squares(one: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(one.astype(jnp.float32) - other.astype(jnp.float32)))
