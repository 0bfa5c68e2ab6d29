"""Paths, selections and the two forms of a layer stack, on parameters and on what optax makes of them."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxllm.transforms import tree


def make_params(layers=3):
    def layer(index):
        return {
            "attention": {"q": {"kernel": jnp.full((2, 4), index), "bias": jnp.full(4, -index)}},
            "mlp": {"up": {"kernel": jnp.full((4, 2), 10 + index)}},
        }

    return {
        "embed": {"tokens": jnp.ones((5, 4))},
        "layers": [layer(float(index)) for index in range(layers)],
        "norm": {"scale": jnp.ones(4)},
    }


NAMES = ["embed/tokens", "layers/attention/q/bias", "layers/attention/q/kernel", "layers/mlp/up/kernel", "norm/scale"]


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_names_are_the_same_in_both_forms():
    params = make_params()
    assert tree.names(params) == tree.names(tree.stack_layers(params)) == NAMES
    assert len(tree.named_leaves(params)) == 2 + 3 * 3
    state = optax.adam(1e-3).init(params)
    assert f"mu/{NAMES[2]}" in tree.names(state) and "count" in tree.names(state)


def test_a_pattern_must_match_a_whole_path():
    params = make_params()
    assert tree.matches("layers/.*kernel", params) == {"layers/attention/q/kernel", "layers/mlp/up/kernel"}
    assert tree.matches(".*", params) == set(NAMES)
    for pattern in ("kernel", "layers", "layers/0/.*"):
        with pytest.raises(ValueError, match=r"selects no parameter.\n  Accepted: .*embed/tokens.*\n  Change the pattern"):
            tree.matches(pattern, params)


@pytest.mark.parametrize("form", [lambda params: params, tree.stack_layers], ids=["unrolled", "scan"])
def test_split_parts_have_holes_and_combine_to_the_whole(form):
    params = form(make_params())
    selected = tree.matches(".*kernel", params)
    mine, rest = tree.split(params, selected)
    assert set(tree.names(mine)) == selected and set(tree.names(rest)) == set(NAMES) - selected
    assert_same(tree.combine(mine, rest), params)
    assert_same(tree.combine(*tree.split(params, set())), params)
    # A hole has no leaf: gradients and optimizer states of the selected part alone cost nothing for the rest.
    gradient = jax.grad(lambda mine: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree.combine(mine, rest))))(mine)
    assert set(tree.names(gradient)) == selected


def test_stack_puts_layers_first_in_order():
    stacked = tree.stack_layers(make_params())
    kernel = stacked["layers"]["attention"]["q"]["kernel"]
    assert kernel.shape == (3, 2, 4)
    np.testing.assert_array_equal(kernel[:, 0, 0], [0, 1, 2])
    assert stacked["embed"]["tokens"].shape == (5, 4)
    assert_same(tree.stack_layers(stacked), stacked)


def make_states():
    params = make_params()
    mine, _ = tree.split(params, {"layers/attention/q/kernel", "norm/scale"})
    labels = jax.tree.map_with_path(lambda path, _: "a" if tree.path_name(path).endswith("kernel") else "b", params)
    return {
        "parameters": params,
        "one layer": make_params(layers=1),
        "holes": mine,
        "adam": optax.chain(optax.clip(1.0), optax.adamw(1e-3)).init(params),
        "adam with holes": optax.adamw(1e-3).init(mine),
        "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=2).init(params),
        "groups": optax.partition({"a": optax.adam(1e-3), "b": optax.sgd(1e-3, momentum=0.9)}, labels).init(params),
    }


@pytest.mark.parametrize("name", make_states())
def test_unstack_is_the_inverse_of_stack(name):
    state = make_states()[name]
    # Distinct values in every leaf, so that a swapped layer shows.
    leaves, structure = jax.tree.flatten(state)
    state = jax.tree.unflatten(structure, [leaf + index for index, leaf in enumerate(leaves)])
    stacked = tree.stack_layers(state)
    assert not any(isinstance(node, list) for node in jax.tree.leaves(stacked, is_leaf=lambda node: isinstance(node, list)))
    assert_same(tree.unstack_like(stacked, state), state)
    # The template may be abstract, and a stacked one asks for no change.
    assert_same(tree.unstack_like(stacked, jax.eval_shape(lambda: state)), state)
    assert_same(tree.unstack_like(stacked, stacked), stacked)


@partial(jax.tree_util.register_dataclass, data_fields=("base", "added"), meta_fields=("rank",))
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A leaf type: each of its fields may be a hole."""

    base: object
    added: object
    rank: int


def adapted_layers(present):
    """[layers] of leaf types and an array; `present` [layers][3] says which leaves each layer has, with values that tell all apart."""

    def layer(index, has):
        base, added, scale = (jnp.full((2,), 10.0 * index + field) if there else None for field, there in enumerate(has))
        return {"q": {"kernel": Adapted({"codes": base}, added, rank=4)}, "scale": scale}

    return {"layers": [layer(index, has) for index, has in enumerate(present)], "embed": None}


@pytest.mark.parametrize(
    "present",
    [
        # The whole leaf type, or the same field of it, in every layer.
        [(1, 1, 1), (1, 1, 1)],
        [(0, 1, 1), (0, 1, 1), (0, 1, 1)],
        # Layers without anything: the first ones, the last ones, every other one, all.
        [(0, 0, 0), (0, 0, 0), (1, 1, 1)],
        [(1, 0, 1), (0, 0, 0), (0, 0, 0)],
        [(0, 0, 0), (0, 1, 1), (0, 0, 0), (0, 1, 1)],
        [(0, 0, 0), (0, 0, 0)],
        # Each leaf for itself.
        [(1, 0, 0), (1, 1, 0), (0, 1, 1), (1, 0, 1)],
    ],
    ids=str,
)
def test_layers_with_holes_are_stacked_leaf_by_leaf_and_go_back_to_their_places(present):
    params = adapted_layers(present)
    canonical = tree.stack_layers(params)
    kernel = canonical["layers"]["q"]["kernel"]
    assert isinstance(kernel, Adapted) and kernel.rank == 4
    for field, stack in enumerate((kernel.base["codes"], kernel.added, canonical["layers"]["scale"])):
        values = [10.0 * index + field for index, has in enumerate(present) if has[field]]
        assert stack is None if not values else stack[:, 0].tolist() == values and stack.shape == (len(values), 2)
    assert_same(tree.unstack_like(canonical, params), params)
    assert_same(jax.jit(lambda canonical: tree.unstack_like(canonical, params))(canonical), params)
    assert_same(tree.unstack_like(jax.device_get(canonical), jax.eval_shape(lambda: params)), params)


@pytest.mark.parametrize("name", ["adamw", "groups"])
def test_optimizer_states_of_frozen_layers_have_their_holes(name):
    params = make_params()
    mine = {**params, "layers": [jax.tree.map(lambda _: None, params["layers"][0]), *params["layers"][1:]]}
    labels = jax.tree.map_with_path(lambda path, _: "a" if tree.path_name(path).endswith("kernel") else "b", mine)
    optimizers = {
        "adamw": lambda: optax.adamw(1e-3),
        "groups": lambda: optax.partition({"a": optax.adam(1e-3), "b": optax.sgd(1e-3, momentum=0.9)}, labels),
    }
    state = optimizers[name]().init(mine)
    leaves, structure = jax.tree.flatten(state)
    state = jax.tree.unflatten(structure, [leaf + index for index, leaf in enumerate(leaves)])
    stacked = tree.stack_layers(state)
    moments = [leaf for path, leaf in tree.named_leaves(stacked) if path.endswith("layers/mlp/up/kernel")]
    assert moments and all(leaf.shape == (2, 4, 2) for leaf in moments)
    assert_same(tree.unstack_like(stacked, state), state)
