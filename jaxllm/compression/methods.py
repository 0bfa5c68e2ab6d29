"""The ways to compress a layer, each put together of the same parts: scales of inputs, codes, and the error that they leave."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.compression import awq, folds, gptq
from jaxllm.compression import grid as grids
from jaxllm.compression.report import KernelError
from jaxllm.compression.statistics import Moments
from jaxllm.compression.walk import Compress, Site, groups, kernel_of, with_kernel
from jaxllm.models.architecture import Architecture
from jaxllm.transforms import nf4, tree
from jaxllm.transforms.affine import Grid
from jaxllm.types import Params

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
# Attention is sharp in what its scores are made of: their ranges are not clipped (as in AWQ's program).
NOT_CLIPPED = ("q", "k")
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

    def moments(self, name: str, hessian_II: jax.Array) -> jax.Array:
        """The same of the sum of x x^T that it reads."""
        s_I = self.inputs.get(name)
        return hessian_II if s_I is None else hessian_II * s_I[:, None] * s_I


def make(recipe: Recipe, arch: Architecture, chooses: Callable[[str, Site], bool], found: list[KernelError]) -> Compress:
    """What compresses a layer of a model (walk.py): its kernels "attention/q", ... that it chooses; their errors are added to `found`."""

    def compress(layer: Params, site: Site) -> Params:
        def chosen(name: str) -> bool:
            return chooses(name, site)

        scaled = _scaled(recipe, arch, chosen, layer, site)
        layer = scaled.layer
        for group in groups(layer, chosen):
            # Anew for each group: what it reads has gone through the codes of the groups before.
            moments = site.moments(layer, group[0])
            for name in group:
                kernel = kernel_of(layer, name)
                leaf = _leaf(recipe, name, kernel, moments)
                before, after = (scaled.original(name, grids.matrix(each, inputs_of(name))) for each in (kernel, leaf.dense()))
                errors = _errors(recipe, before, after, scaled.moments(name, moments.second_II))
                found.append(KernelError(site.number, "/".join((*site.path, name, "kernel")), *map(float, errors)))
                layer = with_kernel(layer, name, leaf)
        return layer

    return compress


def without_data(recipe: Recipe, params: Params, kernels: set[str]) -> Params:
    """The parameters with the kernels of these path names compressed, each by itself: for methods that need no data."""

    def one(path: Any, kernel: jax.Array) -> Any:
        name = tree.path_name(path)
        return _leaf(recipe, name.removesuffix("/kernel"), kernel, None) if name in kernels else kernel

    return jax.tree.map_with_path(one, params)


def inputs_of(name: str) -> int:
    """How many axes of the kernel are summed over."""
    return 2 if name.endswith("/o") else 1


def _leaf(recipe: Recipe, name: str, kernel: jax.Array, moments: Moments | None) -> Any:
    """The compressed kernel; moments: None for methods that need no data."""
    inputs, grid, matrix = inputs_of(name), recipe.grid, grids.matrix(kernel, inputs_of(name))
    if recipe.method == "nf4":
        return jax.jit(nf4.quantize, static_argnums=(1, 2))(kernel, inputs, recipe.double)
    if moments is None:
        rounded = grids.round_to_nearest(matrix, grid)
    elif recipe.method in ("gptq", "awq+gptq"):
        rounded = gptq.solve(matrix, moments.second_II, grid, recipe.damp, recipe.order)[0]
    elif recipe.method == "clip" or (recipe.method == "awq" and name.split("/")[1] not in NOT_CLIPPED):
        rounded = grids.clipped(matrix, moments.second_II, grid)
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
    for group in groups(layer, lambda name: True):
        # All that reads the same is scaled, or nothing.
        into = folds.source(arch, group[0])
        if into is None or not any(map(chosen, group)):
            continue
        layer = scaled.layer
        moments = site.moments(layer, group[0])
        s_I = (
            _smooth(arch, layer, group, moments)
            if recipe.method == "smoothquant"
            else _awq(recipe, arch, layer, group, site, moments)
        )
        outputs = {} if into.endswith("/norm") else {into: folds.of_outputs(arch, into, s_I)}
        scaled = _Scaled(
            folds.fold(layer, group, into, s_I, arch), scaled.inputs | dict.fromkeys(group, s_I), scaled.outputs | outputs
        )
    return scaled


def _smooth(arch: Architecture, layer: Params, group: tuple[str, ...], moments: Moments) -> jax.Array:
    """s = max|x|^a / max|w|^(1 - a) of each input (Xiao et al. 2022, arXiv:2211.10438, eq. 4)."""
    weights_I = jnp.stack([jnp.abs(grids.matrix(kernel_of(layer, name), inputs_of(name))).max(1) for name in group]).max(0)
    ratio = jnp.maximum(moments.largest_I, 1e-5) ** SMOOTH / jnp.maximum(weights_I, 1e-5) ** (1 - SMOOTH)
    return folds.tie(arch, group[0], jnp.maximum(ratio, 1e-5))


def _awq(recipe: Recipe, arch: Architecture, layer: Params, group: tuple[str, ...], site: Site, moments: Moments) -> jax.Array:
    scales = awq.candidates(folds.tie(arch, group[0], moments.absolute_I / moments.tokens))
    kernels = {name: kernel_of(layer, name) for name in group}
    if len(group) == 1:
        # The layer's output is its own one, or close behind: the error of that is known without running anything.
        matrix = grids.matrix(kernels[group[0]], inputs_of(group[0]))
        return awq.search(scales, awq.linear_loss(matrix, moments.second_II, recipe.grid))
    expected = site.outputs(layer, SEARCH_TOKENS)

    def loss(s_I: jax.Array) -> jax.Array:
        tried = layer
        for name, kernel in kernels.items():
            rounded = awq.rounded(grids.matrix(kernel, inputs_of(name)), s_I, recipe.grid)
            tried = with_kernel(tried, name, rounded.reshape(kernel.shape))
        return _distance(site.outputs(tried, SEARCH_TOKENS), expected)

    return awq.search(scales, loss)


def _distance(some: list[jax.Array], others: list[jax.Array]) -> jax.Array:
    """The sum of squared differences."""
    return jnp.stack([_squares(one, other) for one, other in zip(some, others, strict=True)]).sum()


@jax.jit
def _squares(one: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(one.astype(jnp.float32) - other.astype(jnp.float32)))
