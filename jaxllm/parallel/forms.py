"""Parameters by the form in which they are held: which numbers are trained, which are frozen, in how many bits."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax

from jaxllm.parallel.plan import shard_bytes
from jaxllm.transforms import adapt, tree
from jaxllm.transforms.quantized import Quantized
from jaxllm.types import Params


class Form(NamedTuple):
    """weights: numbers of the dense arrays that these stand for; none for scales, which belong to their codes. bytes: on one device."""

    what: str
    trained: bool
    weights: int
    bytes: int
    whole: int

    @property
    def bits(self) -> float:
        """For each weight, over all devices' shares of one copy."""
        return 8 * self.whole / max(self.weights, 1)


def of(params: Params, trained: Iterable[str]) -> list[Form]:
    """The forms of a tree of shapes with shardings, those that are trained last; `trained`: their names."""
    names, found = set(trained), dict[tuple[str, bool], Form]()

    def add(what: str, trained: bool, weights: int, node: Any) -> None:
        before = found.get((what, trained), Form(what, trained, 0, 0, 0))
        held = shard_bytes(jax.tree.map(lambda leaf: leaf.sharding, node), node)
        whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(node))
        found[what, trained] = Form(what, trained, before.weights + weights, before.bytes + held, before.whole + whole)

    for path, node in jax.tree.leaves_with_path(params, is_leaf=lambda node: isinstance(node, Quantized)):
        name = tree.path_name(path)
        if isinstance(node, Quantized):
            add(f"kernels in {node.form}, with their scales", False, math.prod(node.shape), node)
        else:
            kind = "adapters" if name in adapt.adapters(params) and name in names else _kind(name, node, path)
            add(f"{kind} in {node.dtype.name}", name in names, node.size, node)
    return sorted(found.values(), key=lambda form: form.trained)


def weights(params: Params) -> int:
    """Numbers of the parameters, those of quantized kernels counted as if they were dense."""
    nodes = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, Quantized))
    return sum(math.prod(node.shape) for node in nodes)


def _kind(name: str, leaf: Any, path: Any) -> str:
    if leaf.ndim - tree.is_stacked(path) == 1:
        return "vectors"
    return "kernels" if "layers" in name.split("/") else "embeddings and heads"
