"""Walking, selecting, splitting and restacking parameter trees.

A parameter has one name whatever form the layer stack has: `layers/attention/q/kernel` stands for that kernel in every
layer. Lists (one entry a layer) therefore add nothing to a path.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def path_name(path: Sequence[Any]) -> str:
    """`layers/attention/q/kernel` for a jax key path; list and tuple indices are left out."""
    parts = []
    for key in path:
        if isinstance(key, jax.tree_util.DictKey):
            parts.append(str(key.key))
        elif isinstance(key, jax.tree_util.GetAttrKey):
            parts.append(key.name)
    return "/".join(parts)


def is_stacked(path: Sequence[Any]) -> bool:
    """Whether a jax key path leads to all layers of a stack, in one array."""
    keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    return "layers" in keys and not any(isinstance(key, jax.tree_util.SequenceKey) for key in path)


def named_leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[tuple[str, Any]]:
    """(path name, leaf) of every leaf, in tree order. An unrolled stack repeats a name once a layer."""
    return [(path_name(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=is_leaf)]


def names(tree: Any) -> list[str]:
    """The distinct path names, in tree order."""
    return list(dict.fromkeys(name for name, _ in named_leaves(tree)))


def matches(pattern: str, tree: Any) -> set[str]:
    """Path names that the regular expression matches in full; ValueError if there is none."""
    every = names(tree)
    found = {name for name in every if re.fullmatch(pattern, name)}
    if not found:
        raise ValueError(
            f"pattern '{pattern}' selects no parameter.\n  Accepted: a regular expression that matches a whole path, such as"
            f" {', '.join(every[:6])}.\n  Change the pattern; '.*' selects everything."
        )
    return found


def split(tree: Any, selected: set[str]) -> tuple[Any, Any]:
    """(leaves whose name is in `selected`, the others), each with None where the other one has its leaf."""
    return split_by(tree, lambda path: path_name(path) in selected)


def split_by(tree: Any, selects: Callable[[Sequence[Any]], bool]) -> tuple[Any, Any]:
    """The same by key path, which tells layers of a list apart."""
    mine = jax.tree.map_with_path(lambda path, leaf: leaf if selects(path) else None, tree)
    rest = jax.tree.map_with_path(lambda path, leaf: None if selects(path) else leaf, tree)
    return mine, rest


def combine(mine: Any, rest: Any) -> Any:
    """The inverse of `split`."""
    return jax.tree.map(lambda a, b: b if a is None else a, mine, rest, is_leaf=lambda leaf: leaf is None)


def get(tree: Any, path: Sequence[str]) -> Any:
    """`tree[path[0]][path[1]]...`."""
    for name in path:
        tree = tree[name]
    return tree


def put(tree: Any, path: Sequence[str], value: Any) -> None:
    """Sets `tree[path[0]][path[1]]...` to `value`, making what is not there."""
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


def replaced(tree: Any, path: Sequence[str], value: Any) -> Any:
    """The tree with another value at this path; nothing is changed in place."""
    first, *more = path
    return {**tree, first: replaced(tree[first], more, value) if more else value}


def without(tree: Any, path: Sequence[str]) -> Any:
    """The tree without what is at this path; nothing is changed in place."""
    first, *more = path
    if more:
        return {**tree, first: without(tree[first], more)}
    return {name: part for name, part in tree.items() if name != first}


def _is_stack(node: Any) -> bool:
    return isinstance(node, list)


def _is_hole(node: Any) -> bool:
    """True for what stands where another tree has a leaf: None, or what optax puts there; a node without leaf or child."""
    return not jax.tree.leaves(node, is_leaf=lambda part: part is not node)


def stack_layers(tree: Any, join: Callable[[list[Any]], Any] = jnp.stack) -> Any:
    """Canonical form: every list of per-layer trees becomes one tree with a leading layer axis. Works on optimizer states too.

    A leaf that some layers have and others do not (holes, where layers are frozen) becomes a stack of those that are there.
    join: what is made of the leaves of one stack, given in the order of their layers.
    """

    def leaf(*layers: Any) -> Any:
        there = [layer for layer in layers if not _is_hole(layer)]
        return join(there) if there else layers[0]

    def one(node: Any) -> Any:
        return jax.tree.map(leaf, *node, is_leaf=_is_hole) if _is_stack(node) else node

    return jax.tree.map(one, tree, is_leaf=_is_stack)


def unstack_like(tree: Any, template: Any) -> Any:
    """The inverse of `stack_layers`: gives `tree` (canonical) the form of `template`, which has lists where layers are unrolled.

    Layers go where the template has leaves, leaf by leaf; where it has a hole the result has one.
    """

    def one(like: Any, node: Any) -> Any:
        if not _is_stack(like):
            return node
        # Each stack hands out its layers one by one, to those that have this leaf.
        stacks = jax.tree.map(lambda stack: (stack[index] for index in range(stack.shape[0])), node)
        return [
            jax.tree.map(lambda leaf, stack: leaf if _is_hole(leaf) else next(stack), layer, stacks, is_leaf=_is_hole)
            for layer in like
        ]

    return jax.tree.map(one, template, tree, is_leaf=_is_stack)
