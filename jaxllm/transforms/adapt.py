"""Transforms applied to the kernels of a model: to its parameters, to their logical axes, and to one kernel at a time.

Stacked layers are transformed one by one, so that both forms of the stack give the same numbers, and layer i of a kernel draws from a key
of its own, made of the kernel's name and i.
"""

import dataclasses
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxllm import registry
from jaxllm.transforms import grown, leaf, tree
from jaxllm.transforms.quantized import Quantized
from jaxllm.types import Axes, Params, Transform


def make(config: ConfigDict) -> tuple[Transform, ...]:
    """What config.train.transforms lists, in this order; with adapters also what gives new tokens rows of their own."""
    made = tuple(registry.resolve("transform", name)(config) for name in config.train.transforms)
    grows = 0 < config.model.start_rows < config.model.vocab_size and any(transform.adapts for transform in made)
    return (*made, grown.make(config)) if grows else made


def inputs(axes: Any) -> dict[str, int]:
    """Path name -> how many axes of the kernel (within a layer) are summed over, of each kernel that multiplies activations.

    They lead from the residual stream or to it: "embed" is the whole of one side. Embeddings and heads ("embed_rest") are `tables`.
    """
    counts = {}
    for name, each in tree.named_leaves(axes, is_leaf=is_axes):
        sides = within_layer(each)
        if len(sides) > 1 and "embed" in (sides[0], sides[-1]):
            counts[name] = 1 if sides[0] == "embed" else len(sides) - 1
    return counts


def tables(axes: Any) -> dict[str, int]:
    """The same of what has a row for each token: 0 of the embedding, -1 of a head of its own."""
    found = dict(tree.named_leaves(axes, is_leaf=is_axes))
    return {name: count for name, count in ((grown.EMBEDDING, 0), (grown.HEAD, -1)) if found.get(name, ())[:1] == ("vocab",)}


def within_layer(axes: Axes) -> Axes:
    """The logical axes of one layer of a parameter."""
    return axes[1:] if axes[:1] == ("layers",) else axes


def is_axes(node: Any) -> bool:
    return isinstance(node, tuple)


def is_adapter(node: Any) -> bool:
    """Whether a node of a parameter tree is a frozen kernel with something trained beside it."""
    # NumPy's arrays have a `base`, too.
    return dataclasses.is_dataclass(node) and hasattr(node, "base")


def adapters(params: Any) -> set[str]:
    """Path names of what adapters train, in a tree of parameters or of their axes."""
    found = {
        f"{name}/{tree.path_name(path)}"
        for name, node in tree.named_leaves(params, is_leaf=is_adapter)
        if is_adapter(node)
        for path, _ in jax.tree.leaves_with_path(node)
    }
    return {name for name in found if "/base" not in name}


def merged(params: Params, *, keep_codes: bool = False) -> Params:
    """Dense parameters that do the same: each leaf type as the array that it stands for, in float32.

    keep_codes: but for quantized kernels without an adapter, which stay as they are.
    """

    def one(path: Sequence[Any], node: Any) -> Any:
        if keep_codes and isinstance(node, Quantized):
            return node
        if not hasattr(node, "dense"):
            return node.astype(jnp.float32)  # one that was frozen in bfloat16
        return jax.lax.map(leaf.dense, node) if tree.is_stacked(path) else leaf.dense(node)

    return jax.jit(partial(jax.tree.map_with_path, one, is_leaf=lambda node: hasattr(node, "dense")))(params)


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """Transforms of the kernels of a model whose dense parameters have these axes."""

    dense_axes: Any
    transforms: tuple[Transform, ...]

    def axes(self) -> Any:
        """The logical axes of the parameters afterwards."""
        counts = self._counts()

        def one(path: Sequence[Any], axes: Axes) -> Any:
            node: Any = within_layer(axes)
            for transform in self._of(tree.path_name(path)):
                node = _inside(transform, node, transform.axes, counts.get(tree.path_name(path), 0))
            lead = axes[: len(axes) - len(within_layer(axes))]
            return jax.tree.map(lambda inner: (*lead, *inner), node, is_leaf=is_axes)

        return jax.tree.map_with_path(one, self.dense_axes, is_leaf=is_axes)

    def params(self, params: Params, rng: jax.Array) -> Params:
        """Dense parameters, transformed; rng: for what is drawn."""

        def one(path: Sequence[Any], axes: Axes, kernel: Any) -> Any:
            return self.kernel(tree.path_name(path), len(axes) > len(within_layer(axes)), kernel, rng, _layer(path))

        return jax.tree.map_with_path(one, self.dense_axes, params, is_leaf=is_axes)

    def kernel(self, name: str, stacked: bool, kernel: Any, rng: jax.Array, layer: Any) -> Any:
        """One parameter, transformed if it is a target; `layer`: its place in an unrolled stack, or 0. One that is quantized stays so."""
        chosen = self._of(name)
        if not chosen:
            return kernel
        count, rng = self._counts().get(name, 0), jax.random.fold_in(rng, zlib.crc32(name.encode()))

        def of_layer(kernel: Any, layer: Any) -> Any:
            for index, transform in enumerate(chosen):
                if isinstance(kernel, Quantized) and not transform.adapts:
                    continue  # it comes in its codes
                key = jax.random.fold_in(jax.random.fold_in(rng, layer), index)
                try:
                    kernel = _inside(transform, kernel, transform.apply, count, key)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
            return kernel

        # One after the other: a decomposition or a search of all layers at once would need the memory of all.
        return (
            jax.lax.map(lambda part: of_layer(*part), (kernel, jnp.arange(kernel.shape[0]))) if stacked else of_layer(kernel, layer)
        )

    def check(self) -> None:
        """ValueError if a transform's targets are none, or not only what it is for."""
        names = tree.names(self.dense_axes)
        for transform in (each for each in self.transforms if not each.tables):
            fit = [*inputs(self.dense_axes), *(tables(self.dense_axes) if transform.adapts else ())]
            found = [name for name in names if re.fullmatch(transform.targets, name)]
            others = [name for name in found if name not in fit]
            if not found or others:
                field = "lora.targets" if transform.adapts else "quant.targets"
                what = f"selects {', '.join(others)}, which no transform fits" if others else "selects no parameter"
                raise ValueError(
                    f"{field} = '{transform.targets}' {what}.\n  Accepted: a regular expression that"
                    f" matches whole names among {', '.join(fit)}.\n  Change the pattern."
                    + (" To train a norm, or a table as it is, name it in lora.also." if others else "")
                )
            if both := [name for name in found if any(each.tables for each in self._of(name))]:
                raise ValueError(
                    f"lora.targets = '{transform.targets}' selects {', '.join(both)}, whose new tokens have rows of their own.\n"
                    "  Accepted: adapters of other kernels where the vocabulary grew.\n"
                    "  Leave it out of the pattern; lora.also = 'embed/.*' would train all of its rows."
                )

    def _of(self, name: str) -> list[Transform]:
        return [transform for transform in self.transforms if re.fullmatch(transform.targets, name)]

    def _counts(self) -> Mapping[str, int]:
        return inputs(self.dense_axes) | tables(self.dense_axes)


def _inside(transform: Transform, node: Any, change: Callable[..., Any], *given: Any) -> Any:
    """change(node, *given); where a frozen form comes after an adapter, of the kernel inside the adapter."""
    if not transform.adapts and is_adapter(node):
        return dataclasses.replace(node, base=change(node.base, *given))
    return change(node, *given)


def _layer(path: Sequence[Any]) -> int:
    return next((key.idx for key in path if isinstance(key, jax.tree_util.SequenceKey)), 0)
