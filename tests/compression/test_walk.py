"""A walk through the layers of a model: what its kernels read, in which order they are visited, and what comes of it."""

from collections import Counter
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import BATCH, FAMILIES, LENGTH, batches, draw, tiny

from jaxllm import models
from jaxllm.compression.methods import kernel_of, with_kernel
from jaxllm.compression.statistics import Read, Statistics, of
from jaxllm.compression.walk import Group, Site, walk
from jaxllm.transforms import int8, leaf, tree
from jaxllm.types import Model, Params, Stack


def unrolled(model: Model, params: Params) -> Params:
    """The parameters with a list for each stack of layers."""
    for stack in model.stacks:
        layers = tree.get(params, stack.path)
        if not isinstance(layers, list):
            cut = [jax.tree.map(lambda leaf, index=index: leaf[index], layers) for index in range(stack.layers)]
            params = tree.replaced(params, stack.path, cut)
    return params


def captured(model: Model, params: Params, batch: dict[str, jax.Array]) -> dict[tuple[str, int], np.ndarray]:
    """(name, layer within its stack) -> what each kernel of the layers reads in a pass through the whole model, [B, T, I] in float64."""
    taken: dict[tuple[str, int], np.ndarray] = {}

    class Spy:
        def __init__(self, kernel: Any, key: tuple[str, int]):
            self.kernel, self.key, self.shape = kernel, key, kernel.shape

        def multiply(self, spec: str, x: jax.Array) -> jax.Array:
            taken[self.key] = np.asarray(x, np.float64).reshape(*x.shape[:2], -1)
            return leaf.einsum(spec, x, self.kernel)

    def one(path: Any, kernel: Any) -> Any:
        layer = [key.idx for key in path if isinstance(key, jax.tree_util.SequenceKey)]
        return Spy(kernel, (tree.path_name(path), *layer)) if layer and tree.path_name(path).endswith("kernel") else kernel

    spied = jax.tree.map_with_path(one, params, is_leaf=leaf.is_type)
    with jax.disable_jit():
        model.hidden(spied, batch["tokens"], **{name: x for name, x in batch.items() if name != "tokens"})
    return taken


def to_int8(layer: Params, group: Group) -> Params:
    for name in group:
        layer = with_kernel(layer, name, int8.quantize(kernel_of(layer, name), 2 if name.endswith("o/kernel") else 1))
    return layer


@pytest.mark.parametrize("layers_as", ["unrolled", "scan"])
@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_what_kernels_read(family: str, layers_as: str) -> None:
    """Against float64 of what a pass through the whole compressed model multiplies, without its padding.

    What a kernel reads depends on the kernels before it alone. So what it reads in the end is what it has to be visited with.
    """
    model, given = models.build(tiny(family, layers_as=layers_as, remat="attention")), batches(family)
    seen: dict[tuple[str, int], Statistics] = {}

    def visit(layer: Params, site: Site) -> Params:
        within = site.number - (2 if "decoder" in site.path else 0)
        for group in site.groups:
            found = site.statistics(layer, group)
            seen.update({("/".join((*site.path, name)), within): found for name in group})
            layer = to_int8(layer, group)
        return layer

    compressed = unrolled(model, walk(model, draw(model), given, visit))
    reads = [captured(models.build(tiny(family)), compressed, batch) for batch in given]
    assert seen.keys() == reads[0].keys()
    for (name, layer), found in seen.items():
        prefix = "input_" if "encoder" in name or "cross/k" in name or "cross/v" in name else ""
        kept = [read[name, layer][np.asarray(batch[f"{prefix}segments"]) > 0] for read, batch in zip(reads, given, strict=True)]
        x_NI = np.concatenate(kept)
        expected = Statistics(x_NI.T @ x_NI, np.abs(x_NI).sum(0), np.abs(x_NI).max(0), len(x_NI))
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.max(np.abs(b)), err_msg=f"{name} {layer}")


@pytest.mark.parametrize("layers_as", ["unrolled", "scan"])
def test_each_kind_of_layer_is_compiled_once(layers_as: str) -> None:
    """A program a group and one for the layer; the encoder's layers first. What the encoder gave is measured once, for all layers."""
    model, given, traces, order = models.build(tiny("t5", layers_as=layers_as)), batches("t5"), [], []
    of_memory: list[Statistics] = []

    def counted(stack: Stack) -> Stack:
        def block(*arguments: Any) -> Any:
            traces.append(stack.path[0])
            return stack.block(*arguments)

        return stack._replace(block=block)

    def visit(layer: Params, site: Site) -> Params:
        for group in site.groups:
            order.append((site.number, tuple(name.removesuffix("/kernel") for name in group)))
            found = site.statistics(layer, group)
            of_memory.extend([found] * (group[0] == "cross/k/kernel"))
            layer = to_int8(layer, group)
        return layer

    done: list[tuple[int, int]] = []
    counting = replace(model, stacks=tuple(map(counted, model.stacks)))
    walk(counting, draw(model), given, visit, lambda *now: done.append(now))
    attention = [("attention/q", "attention/k", "attention/v"), ("attention/o",)]
    cross = [("cross/q",), ("cross/k", "cross/v"), ("cross/o",)]
    mlp = [("mlp/up",), ("mlp/down",)]
    layers = [attention + mlp] * 2 + [attention + cross + mlp] * 3
    assert order == [(number, group) for number, groups in enumerate(layers) for group in groups]
    # One more trace, which is not compiled, finds the groups.
    assert Counter(traces) == {"encoder": 4 + 1 + 1, "decoder": 7 + 1 + 1}
    assert done == [(number, 5) for number in range(1, 6)]
    assert len(of_memory) == 3 and of_memory[0] is of_memory[1] is of_memory[2]


@pytest.mark.parametrize("layers_as", ["unrolled", "scan"])
def test_each_layer_is_reached_through_the_changed_ones(layers_as: str) -> None:
    """What comes out at the end is what the changed model gives; outputs are those of as many batches as are asked for."""
    model, given = models.build(tiny("t5", layers_as=layers_as)), batches("t5")
    last: list[jax.Array] = []

    def halve(layer: Params, site: Site) -> Params:
        layer = with_kernel(layer, "mlp/down/kernel", kernel_of(layer, "mlp/down/kernel") / 2)
        last[:] = site.outputs(layer)
        assert len(last) == 2 and len(site.outputs(layer, most_tokens=BATCH * LENGTH)) == 1
        return layer

    walked = walk(model, draw(model), given, halve)
    halved = jax.tree.map_with_path(lambda path, x: x / 2 if "mlp/down/" in tree.path_name(path) else x, draw(model))
    jax.tree.map(np.testing.assert_array_equal, walked, halved)
    for batch, x in zip(given, last, strict=True):
        beside = {name: array for name, array in batch.items() if name != "tokens"}
        there = np.asarray(batch["segments"]) > 0
        assert not x[~there].any()
        expected = model.hidden(halved, batch["tokens"], **beside)
        np.testing.assert_allclose(model.stacks[-1].leave(halved, x)[there], expected[there], atol=1e-5)


def test_what_waits_is_on_the_host_and_dense_layers_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch in front of and behind each of two layers is fetched; the list of layers holds the new ones as soon as they are there."""
    model, given = models.build(tiny("llama")), batches("llama")
    params, fetched, get = draw(model), [], jax.device_get
    layers = params["layers"]
    monkeypatch.setattr(jax, "device_get", lambda array: fetched.append(array.shape) or get(array))

    def visit(layer: Params, site: Site) -> Params:
        kinds = [getattr(each["mlp"]["up"]["kernel"], "kind", "dense") for each in layers]
        assert kinds == ["int8"] * site.number + ["dense"] * (2 - site.number)
        for group in site.groups:
            layer = to_int8(layer, group)
        return layer

    walked = walk(model, params, given, visit)
    assert walked is params and fetched == [(BATCH, LENGTH, 16)] * 6


def test_tokens_that_are_all_padding_are_none() -> None:
    """Zeros, not NaN: whatever is fitted to them has to know that they say nothing."""
    model, given = models.build(tiny("llama")), batches("llama")
    empty = [{**batch, "segments": jnp.zeros_like(batch["segments"])} for batch in given]

    def visit(layer: Params, site: Site) -> Params:
        for group in site.groups:
            assert all(float(jnp.abs(array).max()) == 0 for array in site.statistics(layer, group))
        return layer

    walk(model, draw(model), empty, visit)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_padding_may_hold_anything(dtype: jnp.dtype) -> None:
    """Not a number, even: a maximum or a sum of it would be none. Sums are float32 whatever is read."""
    x = np.random.default_rng(0).normal(size=(2, 300, 2, 4)).astype(dtype)
    is_real = np.random.default_rng(1).uniform(size=(2, 300)) < 0.7
    x[~is_real] = np.nan
    found = of(Read(jnp.asarray(x), 2), jnp.asarray(is_real))
    x_NI = x[is_real].reshape(-1, 8).astype(np.float64)
    np.testing.assert_allclose(found.second_II, x_NI.T @ x_NI, rtol=0, atol=1e-6 * len(x_NI))
    np.testing.assert_allclose(found.absolute_I, np.abs(x_NI).sum(0), rtol=1e-6)
    np.testing.assert_array_equal(found.largest_I, np.abs(x_NI).max(0).astype(np.float32))
    assert found.tokens == len(x_NI)


def test_stacked_layers_keep_one_form() -> None:
    model = models.build(tiny("llama", layers_as="scan"))

    def visit(layer: Params, site: Site) -> Params:
        return to_int8(layer, site.groups[0]) if site.number == 0 else layer

    with pytest.raises(ValueError, match=r"layer 1 was compressed to other forms[\s\S]*Accepted: the same form"):
        walk(model, draw(model), batches("llama"), visit)
