"""What must hold of every architecture: one tree of parameters, two forms of the stack, cached decoding, isolation, sharding."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxllm import models
from jaxllm.config import base
from jaxllm.parallel import plan as plans
from jaxllm.transforms import tree
from jaxllm.types import Model, Params

VOCAB, ROWS, INPUTS, TOKENS = 24, 8, 10, 8
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt": {"name": "gpt"},
    "llama": {"name": "llama", "kv_heads": 2, "rope_scaling": "llama3", "rope_factor": 4.0, "window_tokens": 3, "bias": "qkv"},
    "bert": {"name": "bert"},
    "t5": {"name": "t5", "relative_buckets": 8, "relative_max_tokens": 6},
    "t5_v1_1": {"name": "t5", "activation": "geglu", "tied_head": "off", "head_dim": 6, "decoder_layers": 1},
    "transformer": {"name": "transformer"},
}
TWO_SIDED = ("t5", "t5_v1_1", "transformer")


def tiny(family: str, **more: Any) -> ConfigDict:
    config = base()
    sizes = {"vocab_size": VOCAB, "layers": 2, "width": 16, "heads": 4, "context_tokens": 16, "attention_block_tokens": 4}
    config.model.update({**sizes, **FAMILIES[family], **more})
    return config


def abstract(model: Model) -> Params:
    return jax.eval_shape(model.init, jax.random.key(0))


def draw(model: Model) -> Params:
    """Normal parameters, so that no bias is 0 and no scale is 1."""
    rng = np.random.default_rng(0)

    def one(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        return (rng.normal(size=leaf.shape) * 0.3 + tree.path_name(path).endswith("scale")).astype(np.float32)

    return jax.tree.map_with_path(one, abstract(model))


def batch(family: str) -> dict[str, np.ndarray]:
    """Two documents a row and padding; inputs of the same two segments for encoder-decoders, token types for BERT."""
    rng = np.random.default_rng(1)

    def rows(width: int, name: str, first: int, second: int) -> dict[str, np.ndarray]:
        segments = np.array([1] * first + [2] * second + [0] * (width - first - second), np.int32)
        positions = np.array([*range(first), *range(second), *[0] * (width - first - second)], np.int32)
        ids = rng.integers(0, VOCAB, (ROWS, width)).astype(np.int32)
        single = name.removesuffix("s") + "_" if name == "inputs" else ""
        return {name: ids} | {
            f"{single}{key}": np.tile(x, (ROWS, 1)) for key, x in (("segments", segments), ("positions", positions))
        }

    found = rows(TOKENS, "tokens", 4, 3)
    if family in TWO_SIDED:
        found |= rows(INPUTS, "inputs", 3, 5)
    if family == "bert":
        found["token_types"] = (np.arange(TOKENS) % 3 == 0).astype(np.int32) * np.ones((ROWS, 1), np.int32)
    return found


def logits_of(model: Model, params: Params, arrays: dict[str, np.ndarray]) -> np.ndarray:
    return np.asarray(jax.jit(model.apply)(params, arrays["tokens"], **{key: x for key, x in arrays.items() if key != "tokens"}))


@pytest.mark.parametrize("family", FAMILIES)
def test_axes_and_parameters_are_one_tree(family: str) -> None:
    for layers_as in ("unrolled", "scan"):
        model = models.build(tiny(family, layers_as=layers_as))
        shapes, is_axes = abstract(model), lambda node: isinstance(node, tuple)
        assert jax.tree.structure(shapes) == jax.tree.structure(model.axes, is_leaf=is_axes)
        for axes, leaf in zip(jax.tree.leaves(model.axes, is_leaf=is_axes), jax.tree.leaves(shapes), strict=True):
            assert len(axes) == leaf.ndim


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_have_the_compute_dtype(family: str) -> None:
    """To the end: one array in float32 would turn all that follows it into float32."""
    config, arrays = tiny(family), batch(family)
    config.precision.compute = "bfloat16"
    model, tokens = models.build(config), arrays.pop("tokens")
    hidden, logits = (jax.eval_shape(run, abstract(model), tokens, **arrays) for run in (model.hidden, model.apply))
    assert (hidden.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize(
    ("switches", "count"),
    [
        # As the published checkpoints count, each with its tied tensors once.
        ({"name": "bert", "layers": 12, "width": 768, "heads": 12, "context_tokens": 512, "vocab_size": 30_522}, 109_514_298),
        ({"name": "t5", "layers": 6, "width": 512, "heads": 8, "mlp_width": 2048, "vocab_size": 32_128}, 60_506_624),
        (
            {"name": "t5", "layers": 12, "width": 768, "heads": 12, "mlp_width": 2048, "vocab_size": 32_128}
            | {"activation": "geglu", "tied_head": "off"},
            247_577_856,
        ),
        (
            {"name": "llama", "layers": 32, "width": 4096, "heads": 32, "kv_heads": 8, "mlp_width": 14_336, "vocab_size": 32_000},
            7_241_732_096,
        ),
        (
            {"name": "llama", "layers": 24, "width": 896, "heads": 14, "kv_heads": 2, "mlp_width": 4864, "vocab_size": 151_936}
            | {"bias": "qkv", "tied_head": "on"},
            494_032_768,
        ),
        (
            {"name": "llama", "layers": 30, "width": 576, "heads": 9, "kv_heads": 3, "mlp_width": 1536, "vocab_size": 49_152}
            | {"tied_head": "on"},
            134_515_008,
        ),
    ],
    ids=["bert_base", "t5_small", "t5_v1_1_base", "mistral_7b", "qwen2_0.5b", "smollm2_135m"],
)
def test_parameter_counts(switches: dict[str, Any], count: int) -> None:
    config = base()
    config.model.update({"context_tokens": 512, **switches})
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract(models.build(config)))) == count


@pytest.mark.parametrize("family", FAMILIES)
def test_both_forms_of_the_stack_and_recomputation_agree(family: str) -> None:
    """Logits and gradients of unrolled layers, and of a scan that computes everything again, from the same weights."""
    arrays = batch(family)
    found = []
    for options in ({}, {"layers_as": "scan", "remat": "full"}):
        model = models.build(tiny(family, **options))
        params = draw(models.build(tiny(family)))
        params = params if not options else tree.stack_layers(params)

        def loss(params: Params, model: Model = model) -> tuple[jax.Array, jax.Array]:
            logits = model.apply(params, arrays["tokens"], **{key: x for key, x in arrays.items() if key != "tokens"})
            return jnp.sum(jax.nn.log_softmax(logits)[..., 0] * (arrays["segments"] > 0)), logits

        gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
        found.append((logits, tree.stack_layers(gradients)))
    (logits, gradients), (expected, expected_gradients) = found
    np.testing.assert_allclose(logits, expected, atol=2e-5)
    for (name, one), other in zip(tree.named_leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.abs(other).max()) + 1e-5, err_msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_do_not_see_each_other(family: str) -> None:
    """Bit-equal: a token of document 1, of its inputs too, changes no logit of document 2; and it does change its own."""
    model, arrays = models.build(tiny(family)), batch(family)
    params = draw(model)
    before = logits_of(model, params, arrays)
    for name in ("tokens", "inputs") if family in TWO_SIDED else ("tokens",):
        segments = arrays["input_segments" if name == "inputs" else "segments"][0]
        for place in (0, int(np.flatnonzero(segments == 2)[0])):
            changed = arrays | {name: arrays[name].copy()}
            changed[name][:, place] = (changed[name][:, place] + 1) % VOCAB
            same = (logits_of(model, params, changed) == before).all((0, 2))
            others = (arrays["segments"][0] != segments[place]) & (arrays["segments"][0] > 0)
            assert same[others].all() and not same[arrays["segments"][0] == segments[place]].all(), (name, place)


@pytest.mark.parametrize(
    ("family", "layers_as"),
    [("gpt", "unrolled"), ("llama", "scan"), ("t5", "unrolled"), ("t5_v1_1", "scan"), ("transformer", "scan")],
)
def test_cached_decoding_equals_the_whole_row(family: str, layers_as: str) -> None:
    """Rows of different lengths, a prompt of several tokens and then one token at a time; inputs of different lengths."""
    model = models.build(tiny(family, layers_as=layers_as))
    params = draw(models.build(tiny(family)))
    params = tree.stack_layers(params) if layers_as == "scan" else params
    arrays, prompts, inputs = batch(family), np.arange(ROWS) % 3 + 2, np.arange(ROWS) % 4 + 5
    more, cache = {}, model.init_cache(ROWS, TOKENS)
    if family in TWO_SIDED:
        here = (np.arange(INPUTS) < inputs[:, None]).astype(np.int32)
        more = {"inputs": arrays["inputs"], "input_segments": here, "segments": np.ones((ROWS, TOKENS), np.int32)}
        cache = jax.jit(model.encode)(params, arrays["inputs"], inputs, cache)
    whole = np.asarray(jax.jit(model.apply)(params, arrays["tokens"], **more))
    decode, held = jax.jit(model.decode), np.zeros(ROWS, int)
    for step in range(TOKENS - 3):
        lengths = prompts if step == 0 else np.ones(ROWS, int)
        width = prompts.max() if step == 0 else 1
        tokens = np.take_along_axis(arrays["tokens"], np.minimum(held[:, None] + np.arange(width), TOKENS - 1), axis=1)
        logits, cache = decode(params, tokens, lengths, cache)
        held += lengths
        np.testing.assert_allclose(logits, whole[np.arange(ROWS), held - 1], atol=3e-5)


@pytest.mark.parametrize("family", ["bert", "t5_v1_1"])
def test_a_mesh_gives_the_logits_and_gradients_of_one_device(family: str) -> None:
    """2 x 2 x 2 devices: batch, parameters and matrix products are shared."""
    config = tiny(family)
    config.parallel.update({"data": 2, "fsdp": 2, "tensor": 2})
    config.train.batch_seqs = ROWS
    plan = plans.make(config)
    single, meshed = models.build(config), models.build(config, plan.constrain)
    params, arrays = draw(single), batch(family)
    more = {key: x for key, x in arrays.items() if key != "tokens"}

    def loss(model: Model) -> Any:
        def total(params: Params, tokens: jax.Array, more: dict[str, jax.Array]) -> jax.Array:
            return jnp.mean(jax.nn.log_softmax(model.apply(params, tokens, **more))[..., 0])

        return jax.jit(jax.value_and_grad(total))

    placed = jax.device_put(params, plan.shardings(meshed.axes, abstract(meshed)))
    shared = jax.device_put(arrays, plan.batch_sharding())
    value, gradients = loss(meshed)(placed, shared["tokens"], {key: shared[key] for key in more})
    expected, expected_gradients = loss(single)(params, arrays["tokens"], more)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for (name, one), other in zip(tree.named_leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.abs(other).max()) + 1e-6, err_msg=name)
    split = [name for name, leaf in tree.named_leaves(placed) if not leaf.sharding.is_fully_replicated]
    assert {"embed/tokens"} < set(split) and any(name.endswith("o/kernel") for name in split)
    # Rows of tables travel before a look-up; what was looked up, [2, LENGTH, width] on a device, never does.
    more = {key: shared[key] for key in more}
    text = jax.jit(meshed.hidden).lower(placed, shared["tokens"], **more).compile().as_text()
    gathered = re.findall(r"= \S+?\[([\d,]*)\]\S* all-gather\(", text)
    assert str(config.model.width) in ",".join(gathered)
    assert f"{ROWS // 4},{shared['tokens'].shape[1]},{config.model.width}" not in gathered


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_a_prefix_is_seen_from_everywhere(name: str) -> None:
    """Prefix LM: a later token of the prefix reaches all earlier ones of its document; and so it does in the prompt of `decode`."""
    config = tiny(name, window_tokens=0)
    config.train.objective = "prefix_lm"
    model, arrays = models.build(config), batch(name)
    params, prefix = draw(model), np.tile(np.arange(TOKENS) < 3, (ROWS, 1))
    arrays["prefix"] = prefix
    before = logits_of(model, params, arrays)
    changed = arrays | {"tokens": arrays["tokens"].copy()}
    changed["tokens"][:, 2] = (changed["tokens"][:, 2] + 1) % VOCAB
    same = (logits_of(model, params, changed) == before).all((0, 2))
    np.testing.assert_array_equal(same, [False] * 4 + [True] * 4)
    cache = model.init_cache(ROWS, TOKENS)
    logits, cache = model.decode(params, arrays["tokens"][:, :3], np.full(ROWS, 3), cache)
    np.testing.assert_allclose(logits, before[:, 2], atol=3e-5)
    logits, _ = model.decode(params, arrays["tokens"][:, 3:4], np.ones(ROWS, int), cache)
    np.testing.assert_allclose(logits, before[:, 3], atol=3e-5)


@pytest.mark.parametrize(("family", "places"), [("gpt", 1 + 2 * 3), ("bert", 1 + 2 * 3), ("t5", 1 + 2 * 3 + 1 + 2 * 5)])
def test_dropout_has_its_own_key_at_each_place(family: str, places: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedding of each side; in each layer the probabilities and the output of each attention, and the output of the MLP."""
    model, arrays, keys = models.build(tiny(family, dropout_frac=0.25, attention="plain")), batch(family), []
    params, tokens = draw(model), arrays.pop("tokens")

    def record(key: jax.Array, p: float, shape: tuple[int, ...]) -> jax.Array:
        keys.append(jax.random.key_data(key))
        return jnp.ones(shape, bool)

    def used(rng: jax.Array | None) -> list[jax.Array]:
        keys.clear()
        model.hidden(params, tokens, **arrays, rng=rng)
        return list(keys)

    monkeypatch.setattr(jax.random, "bernoulli", record)
    found = [tuple(key.tolist()) for seed in (1, 2) for key in jax.jit(used)(jax.random.key(seed))]
    assert len(found) == len(set(found)) == 2 * places
    assert jax.eval_shape(used, None) == []


def test_an_encoder_with_its_norms_first_ends_with_one() -> None:
    model, arrays = models.build(tiny("bert", norm_order="pre", head="none")), batch("bert")
    params, apply = draw(model), jax.jit(model.apply)
    doubled = params | {"norm": jax.tree.map(lambda leaf: 2 * leaf, params["norm"])}
    np.testing.assert_allclose(apply(doubled, arrays["tokens"]), 2 * apply(params, arrays["tokens"]), rtol=1e-6)


@pytest.mark.parametrize("family", ["gpt", "llama", "bert"])
def test_classes_have_a_kernel_of_their_own(family: str) -> None:
    """Also where the head for tokens is the embedding."""
    for head in ("classify", "tag"):
        model = models.build(tiny(family, head=head, classes=3))
        assert abstract(model)["head"]["kernel"].shape == (3, 16)
        tokens = jax.ShapeDtypeStruct((2, 5), jnp.int32)
        assert jax.eval_shape(model.apply, abstract(model), tokens).shape == (2, 5, 3)


@pytest.mark.parametrize(
    ("switches", "words"),
    [
        ({"name": "t5", "head": "classify", "classes": 2}, "model.head = 'classify' with model.name = 't5'.\n  Accepted: lm"),
        ({"name": "gpt", "head": "none"}, "model.head = 'none' with model.name = 'gpt'"),
        ({"name": "bert", "head": "tag"}, "model.classes = 0 when a model with model.head = 'tag' is built"),
        ({"name": "bert", "window_tokens": 4}, "model.window_tokens = 4 with model.name = 'bert'"),
        ({"name": "t5", "relative_buckets": 32, "relative_max_tokens": 16}, "model.relative_max_tokens = 16"),
    ],
)
def test_what_an_architecture_cannot_be(switches: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        models.build(tiny("gpt", **switches))


def test_a_window_over_a_prefix_is_refused() -> None:
    config = tiny("llama", window_tokens=3)
    config.train.objective = "prefix_lm"
    with pytest.raises(ValueError, match="model.window_tokens = 3 with train.objective = 'prefix_lm'"):
        models.build(config)


def test_only_one_of_the_two_segments_is_refused() -> None:
    model, arrays = models.build(tiny("t5")), batch("t5")
    with pytest.raises(ValueError, match="only one of segments and input_segments"):
        jax.eval_shape(model.apply, abstract(model), arrays["tokens"], inputs=arrays["inputs"], segments=arrays["segments"])


def test_t5_refuses_float16() -> None:
    config = tiny("t5")
    config.precision.compute = "float16"
    with pytest.raises(ValueError, match="whose activations overflow it.\n  Accepted: bfloat16, float32"):
        models.build(config)
