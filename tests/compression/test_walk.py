"""Layer by layer through tiny models of all families: statistics against NumPy, folds that change nothing, and what reaches a layer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import config as schema
from jaxllm import models
from jaxllm.compression import folds, walk
from jaxllm.compression.statistics import Moments
from jaxllm.transforms import leaf, tree

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt": {},
    "llama": {"kv_heads": 2},
    "llama_bias": {"name": "llama", "kv_heads": 2, "bias": "on"},
    "bert": {},
    "t5": {},
    "t5_gated": {"name": "t5", "activation": "geglu"},
    "transformer": {},
    "gpt_relu": {"name": "gpt", "activation": "relu", "remat": "attention"},
}
OBJECTIVES = {"bert": "masked_lm", "t5": "span_corruption", "transformer": "seq2seq"}
ROWS, INPUTS, TOKENS = 3, 9, 7
families = pytest.mark.parametrize("family", FAMILIES)


def build(family: str) -> tuple[Any, Any]:
    """A model and parameters that make attention and activations far from trivial."""
    config = schema.base()
    fields = {"name": family, "layers": 2, "width": 16, "heads": 4, "context_tokens": 16, "vocab_size": 23, "dropout_frac": 0.1}
    config.model.update(fields | FAMILIES[family])
    config.train.objective = OBJECTIVES.get(config.model.name, "causal_lm")
    model, rng = models.build(config), np.random.default_rng(0)

    def draw(path: Any, like: Any) -> np.ndarray:
        center = 1.0 if tree.path_name(path).endswith("scale") else 0.0
        return (center + rng.normal(scale=0.4, size=like.shape)).astype(np.float32)

    return model, jax.tree.map_with_path(draw, jax.eval_shape(model.init, jax.random.key(0)))


def batches_of(model: Any, count: int = 2) -> list[dict[str, jax.Array]]:
    """Rows with padding."""
    rng, found = np.random.default_rng(1), []
    for _ in range(count):
        segments = (np.arange(TOKENS) < rng.integers(3, TOKENS + 1, (ROWS, 1))).astype(np.int32)
        batch = {"tokens": rng.integers(0, 23, (ROWS, TOKENS)), "segments": segments}
        if len(model.stacks) > 1:
            read = (np.arange(INPUTS) < rng.integers(4, INPUTS + 1, (ROWS, 1))).astype(np.int32)
            batch |= {"inputs": rng.integers(0, 23, (ROWS, INPUTS)), "input_segments": read}
        found.append({name: jnp.asarray(array, jnp.int32) for name, array in batch.items()})
    return found


def hidden(model: Any, params: Any, batch: Any) -> jax.Array:
    return jax.jit(model.hidden)(params, batch["tokens"], **{name: array for name, array in batch.items() if name != "tokens"})


def seen(batch: Any) -> np.ndarray:
    return np.asarray(batch["segments"] > 0)


class Spy:
    """A kernel that keeps what it multiplies."""

    def __init__(self, kernel: Any, kept: list[np.ndarray]) -> None:
        self.kernel, self.kept, self.shape = kernel, kept, kernel.shape

    def multiply(self, spec: str, x: jax.Array) -> jax.Array:
        jax.debug.callback(lambda x: self.kept.append(np.asarray(x)), x)
        return leaf.einsum(spec, x, self.kernel)


@families
def test_statistics_are_those_of_what_each_kernel_reads(family: str) -> None:
    """In float64 from what a spy saw, without padding; of every kernel of every layer."""
    model, params = build(family)
    batches, checked = batches_of(model), []

    def check(layer: Any, site: walk.Site) -> Any:
        for group in walk.groups(layer, lambda name: True):
            for name in group:
                kept: list[np.ndarray] = []
                spied = walk.with_kernel(layer, name, Spy(walk.kernel_of(layer, name), kept))
                for each in site._reached:
                    site._runner._run(site._rest, spied, site.index, each.x, each.batch, each.parts)
                jax.effects_barrier()
                side = "input_segments" if "encoder" in site.path or name in walk.OF_MEMORY else "segments"
                mask = np.concatenate([np.asarray(each.batch[side]).reshape(-1) > 0 for each in site._reached])
                x_NI = np.concatenate([x.reshape(x.shape[0] * x.shape[1], -1) for x in kept]).astype(np.float64)[mask]
                found = site.moments(layer, name)
                expected = Moments(x_NI.T @ x_NI, np.abs(x_NI).sum(0), np.abs(x_NI).max(0), mask.sum())
                for mine, theirs in zip(found, expected, strict=True):
                    np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())
                checked.append(name)
        return layer

    walk.walk(model, params, batches, check)
    kernels = [name for name, _ in tree.named_leaves(params) if name.endswith("/kernel") and "layers" in name.split("/")]
    assert len(checked) == len(kernels)


@families
def test_each_layer_is_reached_through_the_changed_ones(family: str) -> None:
    """The hidden state at the end is that of the changed model; nothing is compiled twice."""
    model, params = build(family)
    batches, done = batches_of(model), []
    before = jax.tree.map(np.asarray, params)

    def halve(layer: Any, site: walk.Site) -> Any:
        done.append((site.path, site.index, site.number))
        assert len(site.outputs(layer, most_tokens=5)) == 1 and len(site.outputs(layer)) == 2
        return walk.with_kernel(layer, "mlp/down", walk.kernel_of(layer, "mlp/down") / 2)

    told: list[tuple[int, int]] = []
    last: list[Any] = []

    def keep(layer: Any, site: walk.Site) -> Any:
        layer = halve(layer, site)
        last[:] = [site.outputs(layer)[0], site]
        return layer

    walked = walk.walk(model, params, batches, keep, lambda *progress: told.append(progress))
    expected = jax.tree.map_with_path(lambda path, x: x / 2 if "mlp/down/kernel" in tree.path_name(path) else x, before)
    jax.tree.map(np.testing.assert_array_equal, walked, expected)
    there = seen(batches[0])
    x, site = last
    left = site._runner.stack.leave(site._rest, x)
    np.testing.assert_allclose(left[there], hidden(model, expected, batches[0])[there], atol=1e-5)
    every = 2 * len(model.stacks)
    assert told == [(index + 1, every) for index in range(every)] and [number for *_, number in done] == list(range(every))
    assert site._runner._forward._cache_size() == 1


@families
def test_a_fold_changes_nothing(family: str) -> None:
    """Scales between 1/5 and 5 in every place that there is."""
    model, params = build(family)
    batch, rng, arch = batches_of(model)[0], np.random.default_rng(2), model.config
    expected, places = hidden(model, params, batch), []
    for stack in model.stacks:
        layers = tree.get(params, stack.path)
        for index in range(stack.layers):
            for group in walk.groups(layers[index], lambda name: True):
                into = folds.source(arch, group[0])
                kernel = walk.kernel_of(layers[index], group[0])
                count = np.prod(kernel.shape[: 2 if group[0].endswith("/o") else 1])
                if into is not None:
                    s_I = folds.tie(arch, group[0], jnp.exp(jnp.asarray(rng.uniform(-1.6, 1.6, count), jnp.float32)))
                    layers[index] = folds.fold(layers[index], group, into, s_I, arch)
                    places.append(group[0])
    found = hidden(model, params, batch)
    there = seen(batch)
    np.testing.assert_allclose(found[there], expected[there], atol=1e-5 * np.abs(np.asarray(expected)).max() * 5)
    pre = ["attention/q", *(["mlp/gate"] if arch.activation in ("swiglu", "geglu") else ["mlp/up"])]
    linear = {"gpt": [], "bert": [], "t5": ["mlp/down"]}.get(family, ["mlp/down"])
    wanted = {"attention/o", *linear, *([] if arch.norm_order == "post" else pre)}
    if len(model.stacks) > 1:
        wanted |= {"cross/o", *([] if arch.norm_order == "post" else ["cross/q"])}
    assert set(places) == wanted
