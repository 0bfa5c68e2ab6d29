"""The one form in which checkpoints hold a state: a flat dict of named arrays, layers stacked.

A name is the path in the tree, `params/layers/attention/q/kernel` or `opt_state/0/mu/embed/tokens`. It does not depend on the
class of a container, nor on whether layers are unrolled (a list, one tree a layer) or scanned (one tree with a leading axis).
A leaf type (transforms/leaf.py) gives one array a field, `frozen/layers/attention/q/kernel/codes`; a field that is a hole gives
none. Its class and what else it holds is not stored: the template of `restore_form` has them.

Where layers are frozen, the unrolled `params` and `frozen` each have holes in place of the other's layers. Each then has a stack
of the layers that it holds, leaf by leaf ([2, ...] and [10, ...] of 12 layers), and `layers_held` says which those are.
"""

import functools
from collections.abc import Hashable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxllm.engine import digest
from jaxllm.transforms.tree import stack_layers, unstack_like


def named(canonical: Any) -> dict[str, Any]:
    """Name -> leaf of a tree whose layers are stacked; also the inverse of `nested`."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(canonical)}


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a/b": 1}` as `{"a": {"b": 1}}`, which is what is written to disk."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def _is_stack(node: Any) -> bool:
    return isinstance(node, list)


def _has_stacks(tree: Any) -> bool:
    """True if layers are unrolled somewhere."""
    return any(_is_stack(node) for node in jax.tree.leaves(tree, is_leaf=_is_stack))


def layers_held(tree: Any) -> dict[str, tuple[int, ...]]:
    """Name -> which layers, counted from 0, its stack is of, in their order; only of stacks that are not of all layers."""

    def one(node: Any) -> Any:
        if not _is_stack(node):
            return None
        numbered = [jax.tree.map(lambda _, index=index: index, layer) for index, layer in enumerate(node)]
        return stack_layers(numbered, lambda held: np.array(held) if len(held) < len(node) else None)

    return {name: tuple(held.tolist()) for name, held in named(jax.tree.map(one, tree, is_leaf=_is_stack)).items()}


def digests(tree: Any) -> dict[str, str]:
    """Name -> digest of the array that `canonicalize` would give; unrolled layers are not stacked for it."""
    found = named(stack_layers(tree, digest.stacked))
    return {name: leaf if isinstance(leaf, str) else digest.digests({name: leaf})[name] for name, leaf in found.items()}


def abstract(tree: Any) -> Any:
    """`tree` (arrays or ShapeDtypeStructs, any form) as ShapeDtypeStructs with shardings, layers stacked.

    The layer axis is not split. A leaf without a sharding gets the first device: left open, the layout at the time of saving
    would be taken, on devices that may not exist here.
    """

    def leaf(like: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(like, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])
        return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=sharding)

    def stack(layers: list[jax.ShapeDtypeStruct]) -> jax.ShapeDtypeStruct:
        first = layers[0]
        return jax.ShapeDtypeStruct((len(layers), *first.shape), first.dtype, sharding=_unsplit_first(first.sharding))

    return stack_layers(jax.tree.map(leaf, tree), stack)


def _unsplit_first(sharding: Sharding) -> Sharding:
    """The sharding of an array with one more axis in front."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec), memory_kind=sharding.memory_kind)
    return sharding


def canonicalize(state: Any) -> dict[str, jax.Array]:
    """Name -> array of a state that lives on devices.

    Unrolled layers are copied into stacks on their devices, which for a while takes their memory again; nothing else is copied.
    """
    if not _has_stacks(state):
        return named(state)
    shardings, structure = jax.tree.flatten(jax.tree.map(lambda leaf: leaf.sharding, abstract(state)))
    return named(_stacker(structure, tuple(shardings))(state))


@functools.lru_cache(maxsize=4)
def _stacker(structure: Hashable, shardings: tuple[Sharding, ...]) -> Any:
    """The compiled `stack_layers`; kept, as every save of a run needs the same one."""
    # A leaf on one device of many (a counter made outside of the mesh) goes where the compiler wants it.
    wanted = [sharding if isinstance(sharding, NamedSharding) else None for sharding in shardings]
    compiled = jax.jit(lambda state: jax.tree.leaves(stack_layers(state)), out_shardings=wanted)
    return lambda state: jax.tree.unflatten(structure, compiled(state))


def restore_form(arrays: Mapping[str, jax.Array], template: Any) -> Any:
    """Canonical arrays as a tree of the form and with the shardings of `template`."""
    stacked = abstract(template)
    canonical = jax.tree.unflatten(jax.tree.structure(stacked), [arrays[name] for name in named(stacked)])
    if not _has_stacks(template):
        return canonical
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(template)]
    unstack = jax.jit(lambda tree: jax.tree.leaves(unstack_like(tree, template)), out_shardings=shardings)
    return jax.tree.unflatten(jax.tree.structure(template), unstack(canonical))
