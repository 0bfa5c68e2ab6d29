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


def stack_layers(tree: Any) -> Any:
    """Canonical form: every list of per-layer trees becomes one tree with a leading layer axis. Works on optimizer states too."""

    def one(node: Any) -> Any:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *node) if _is_stack(node) else node

    return jax.tree.map(one, tree, is_leaf=_is_stack)


def unstack_like(tree: Any, template: Any) -> Any:
    """The inverse of `stack_layers`: gives `tree` (canonical) the form of `template`, which has lists where layers are unrolled."""

    def one(like: Any, node: Any) -> Any:
        if not _is_stack(like):
            return node
        return [jax.tree.map(lambda leaf, index=index: leaf[index], node) for index in range(len(like))]

    return jax.tree.map(one, template, tree, is_leaf=_is_stack)
