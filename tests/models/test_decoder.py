"""The decoder against float64 NumPy written from the papers; its sizes; what may and may not influence a logit."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxllm import models, registry
from jaxllm.config import base
from jaxllm.transforms import tree
from jaxllm.types import Model, Params

VOCAB, TOKENS = 23, 12


def tiny(**model: Any) -> ConfigDict:
    """A config of 2 layers, 16 wide."""
    config = base()
    config.model.update({"vocab_size": VOCAB, "layers": 2, "width": 16, "heads": 4, "context_tokens": 16, **model})
    return config


def draw(model: Model, std: float = 0.3) -> Params:
    """Normal parameters, so that no bias is 0 and no scale is 1. NumPy's, because compiling `init` costs seconds."""
    rng = np.random.default_rng(0)

    def one(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        return (rng.normal(size=leaf.shape) * std + tree.path_name(path).endswith("scale")).astype(np.float32)

    return jax.tree.map_with_path(one, abstract(model))


def abstract(model: Model) -> Params:
    return jax.eval_shape(model.init, jax.random.key(0))


def packed(rows: int = 2) -> dict[str, np.ndarray]:
    """Tokens of two documents a row, and padding behind the second one."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, VOCAB, (rows, TOKENS)).astype(np.int32)
    segments = np.array([1] * 5 + [2] * 4 + [0] * 3, np.int32)
    positions = np.array([*range(5), *range(4), 0, 0, 0], np.int32)
    return {"tokens": tokens, "segments": np.tile(segments, (rows, 1)), "positions": np.tile(positions, (rows, 1))}


# --- The oracles: one row, loops instead of tricks. ---------------------------------------------------------------------


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """Vaswani et al. 2017, eq. 1, with query head h on key/value head h // (H / G) (Ainslie et al. 2023)."""
    tokens, heads, width = q.shape
    out = np.zeros_like(q)
    for h in range(heads):
        g = h // (heads // k.shape[1])
        for t in range(tokens):
            seen = [s for s in range(t + 1) if segments[s] == segments[t]]
            out[t, h] = softmax(k[seen, g] @ q[t, h] / math.sqrt(width)) @ v[seen, g]
    return out


def rotate(x: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    """Su et al. 2021, eq. 34, in the half layout: feature i pairs with i + K/2."""
    half = x.shape[-1] // 2
    out = np.zeros_like(x)
    for i in range(half):
        angle = positions * theta ** (-2 * i / x.shape[-1])
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        out[..., i] = x[..., i] * cos - x[..., i + half] * sin
        out[..., i + half] = x[..., i + half] * cos + x[..., i] * sin
    return out


def llama(p: Params, tokens: np.ndarray, segments: np.ndarray, positions: np.ndarray, eps: float, theta: float) -> np.ndarray:
    def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale

    x = p["embed"]["tokens"][tokens]
    for layer in p["layers"]:
        a, m = layer["attention"], layer["mlp"]
        y = norm(x, a["norm"]["scale"])
        q, k, v = (np.tensordot(y, a[name]["kernel"], 1) for name in "qkv")
        y = attend(rotate(q, positions, theta), rotate(k, positions, theta), v, segments)
        x = x + np.tensordot(y, a["o"]["kernel"], 2)
        y = norm(x, m["norm"]["scale"])
        gate = y @ m["gate"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ m["up"]["kernel"])) @ m["down"]["kernel"]
    head = p["head"]["kernel"] if "head" in p else p["embed"]["tokens"]
    return norm(x, p["norm"]["scale"]) @ head.T


def gpt2(p: Params, tokens: np.ndarray, segments: np.ndarray, positions: np.ndarray, eps: float, theta: float) -> np.ndarray:
    def norm(x: np.ndarray, n: Params) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * n["scale"] + n.get("bias", 0)

    def attention(y: np.ndarray, a: Params) -> np.ndarray:
        q, k, v = (np.tensordot(y, a[name]["kernel"], 1) + a[name].get("bias", 0) for name in "qkv")
        return np.tensordot(attend(q, k, v, segments), a["o"]["kernel"], 2) + a["o"].get("bias", 0)

    def mlp(y: np.ndarray, m: Params) -> np.ndarray:
        y = y @ m["up"]["kernel"] + m["up"].get("bias", 0)
        y = 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        return y @ m["down"]["kernel"] + m["down"].get("bias", 0)

    x = p["embed"]["tokens"][tokens] + p["embed"]["positions"][positions]
    for layer in p["layers"]:
        for part, run in (("attention", attention), ("mlp", mlp)):
            own = layer[part]
            # GPT-2 has the norms first, and one behind the last layer; Vaswani et al. 2017, section 3.1, behind each sum.
            x = x + run(norm(x, own["norm"]), own) if "norm" in p else norm(x + run(x, own), own["norm"])
    head = p["head"]["kernel"] if "head" in p else p["embed"]["tokens"]
    return (norm(x, p["norm"]) if "norm" in p else x) @ head.T


# --- Numbers. -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "switches",
    [
        {"name": "llama", "kv_heads": 2, "rope_theta": 50.0},
        {"name": "llama", "kv_heads": 1, "tied_head": "on", "head_dim": 6, "mlp_width": 20, "layers_as": "scan"},
        {"name": "gpt"},
        {"name": "gpt", "norm_order": "post"},
        {"name": "gpt", "kv_heads": 2, "bias": "off", "tied_head": "off", "attention": "plain", "layers_as": "scan"},
    ],
    ids=lambda switches: "-".join(map(str, switches.values())),
)
def test_logits_are_those_of_the_paper(switches: dict) -> None:
    config = tiny(attention_block_tokens=4, **switches)
    model, batch = models.build(config), packed()
    params = draw(model)
    logits = jax.jit(model.apply)(params, batch["tokens"], segments=batch["segments"], positions=batch["positions"])
    assert logits.dtype == jnp.float32
    unrolled = tree.unstack_like(params, {**params, "layers": [params["layers"]] * 2}) if "layers_as" in switches else params
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), unrolled)
    oracle = {"llama": llama, "gpt": gpt2}[config.model.name]
    for row, (tokens, segments, positions) in enumerate(zip(*batch.values(), strict=True)):
        expected = oracle(exact, tokens, segments, positions, model.config.norm_eps, model.config.rope_theta)
        assert np.abs(expected).max() > 1
        # Padding attends to padding in whatever way; nobody reads it.
        np.testing.assert_allclose(logits[row][segments > 0], expected[segments > 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "sizes", "count"),
    [
        # GPT-2 small as counted by its published checkpoint; Llama as counted by the weight files of Meta's releases.
        ("gpt", {"layers": 12, "width": 768, "heads": 12, "context_tokens": 1024, "vocab_size": 50257}, 124_439_808),
        (
            "llama",
            {"layers": 16, "width": 2048, "heads": 32, "kv_heads": 8, "head_dim": 64, "mlp_width": 8192, "tied_head": "on"},
            1_235_814_400,
        ),
        ("llama", {"layers": 32, "width": 4096, "heads": 32, "kv_heads": 8, "mlp_width": 14336}, 8_030_261_248),
        ("llama", {"layers": 80, "width": 8192, "heads": 64, "kv_heads": 8, "mlp_width": 28672}, 70_553_706_496),
    ],
    ids=["gpt2", "1b", "8b", "70b"],
)
def test_parameter_counts(name: str, sizes: dict, count: int) -> None:
    model = models.build(tiny(name=name, **{"vocab_size": 128_256, **sizes}))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(model))) == count


# A deviation of 0 stands for 1 / sqrt(width), here 1 / 8.
@pytest.mark.parametrize(
    ("switches", "expected"),
    [
        ({"name": "gpt"}, 0.125),
        ({"name": "t5", "activation": "geglu", "tied_head": "off", "layers_as": "scan", "init_std": 0.02}, 0.02),
    ],
    ids=["gpt", "t5"],
)
def test_parameters_are_declared_once(switches: dict, expected: float) -> None:
    """Axes and arrays have one structure; arrays are plain float32 with the deviation of their role."""
    model = models.build(tiny(width=64, **switches))
    params = model.init(jax.random.key(0))
    is_axes = lambda node: isinstance(node, tuple)  # noqa: E731
    assert jax.tree.structure(params) == jax.tree.structure(model.axes, is_leaf=is_axes)
    for (path, leaf), axes in zip(tree.named_leaves(params), jax.tree.leaves(model.axes, is_leaf=is_axes), strict=True):
        assert len(axes) == leaf.ndim and leaf.dtype == jnp.float32 and type(leaf) is type(jnp.zeros(1))
        if path.endswith(("scale", "bias")):
            assert jnp.all(leaf == float(path.endswith("scale")))
            continue
        std = expected / math.sqrt(2 * 2) if path.endswith(("o/kernel", "down/kernel")) else expected
        if model.name == "t5" and path.endswith("q/kernel"):  # its scores are not divided by sqrt(K), here 4
            std /= 4
        # The deviation of n normal numbers is off by std / sqrt(2 n).
        assert abs(float(leaf.std()) - std) < 5 * std / math.sqrt(2 * leaf.size), path


def test_width_of_the_mlp_follows_the_family() -> None:
    assert models.build(tiny(name="gpt", width=100)).config.mlp_width == 400
    # 8/3 of 4096 is 10922.7, and LLaMA 7B has 11008; 8/3 of 24 is exactly 64 and is not rounded up further.
    assert models.build(tiny(name="llama", width=4096)).config.mlp_width == 10944
    assert models.build(tiny(name="llama", width=24)).config.mlp_width == 64


def test_bfloat16_computes_near_float32() -> None:
    """Activations are bfloat16, parameters and logits are not; 2 layers lose a few of bfloat16's 8 bits."""
    config = tiny(name="llama")
    exact, batch = models.build(config), packed()
    config.precision.compute = "bfloat16"
    rounded, params = models.build(config), draw(exact)
    hidden = jax.jit(rounded.hidden)(params, batch["tokens"])
    logits, expected = jax.jit(rounded.apply)(params, batch["tokens"]), jax.jit(exact.apply)(params, batch["tokens"])
    assert hidden.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    error = float(jnp.abs(logits - expected).max() / jnp.abs(expected).max())
    assert 1e-4 < error < 0.05
    assert rounded.init_cache(1, 8)["layers"][0]["k"].dtype == jnp.bfloat16


# --- What may influence what. -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", [name for name in registry.names("attention") if name != "splash"])
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_documents_and_the_future_are_invisible(name: str, attention: str) -> None:
    """Bit-equal: no logit changes with a later token or with another document; it does with its own past."""
    model, batch = models.build(tiny(name=name, attention=attention, attention_block_tokens=4)), packed()
    params, beside = draw(model), {key: batch[key] for key in ("segments", "positions")}
    apply = jax.jit(model.apply)
    before = np.asarray(apply(params, batch["tokens"], **beside))
    for changed in (0, 4, 6, 8):
        tokens = batch["tokens"].copy()
        tokens[:, changed] = (tokens[:, changed] + 1) % VOCAB
        same = (np.asarray(apply(params, tokens, **beside)) == before).all((0, 2))
        document = batch["segments"][0]
        influenced = (document == document[changed]) & (np.arange(TOKENS) >= changed)
        np.testing.assert_array_equal(same, ~influenced)


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_a_packed_document_is_as_if_alone(name: str) -> None:
    model, batch = models.build(tiny(name=name)), packed()
    params = draw(model)
    logits = jax.jit(model.apply)(params, batch["tokens"], segments=batch["segments"], positions=batch["positions"])
    for start, stop in ((0, 5), (5, 9)):
        alone = jax.jit(model.apply)(params, batch["tokens"][:, start:stop])
        np.testing.assert_allclose(logits[:, start:stop], alone, rtol=1e-5, atol=1e-5)


def test_dropout_scales_what_it_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were nothing dropped, each place would be divided by 1 - frac: as if the embeddings, v, o and down of the MLP were."""
    frac, asked = 0.25, []

    def keep(key: jax.Array, p: float, shape: tuple[int, ...]) -> jax.Array:
        asked.append(p)
        return jnp.ones(shape, bool)

    def enlarge(path: Any, leaf: np.ndarray) -> np.ndarray:
        part = tree.path_name(path)
        return leaf / (1 - frac) if part.startswith("embed") or part.split("/")[-2] in ("v", "o", "down") else leaf

    monkeypatch.setattr(jax.random, "bernoulli", keep)
    model, tokens = models.build(tiny(name="gpt", dropout_frac=frac, attention="plain")), packed()["tokens"]
    params = draw(model)
    found = jax.jit(model.hidden)(params, tokens, rng=jax.random.key(1))
    expected = jax.jit(model.hidden)(jax.tree.map_with_path(enlarge, params), tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert asked == [1 - frac] * (1 + 3 * 2)


# --- Misuse. ------------------------------------------------------------------------------------------------------------


def change(params: Params, path: str, value: Any) -> Params:
    """A copy of `params` with another leaf at `path`; None removes it. Lists are entered at layer 1."""
    copied = jax.tree.map(lambda leaf: leaf, params)
    node, parts = copied, path.split("/")
    for part in parts[:-1]:
        node = node[part][1] if isinstance(node[part], list) else node[part]
    if value is None:
        del node[parts[-1]]
    else:
        node[parts[-1]] = value
    return copied


@pytest.mark.parametrize("layers_as", ["unrolled", "scan"])
@pytest.mark.parametrize(
    ("path", "shape", "words"),
    [
        ("layers/mlp/up/kernel", (16, 60), r"'layers/mlp/up/kernel' has shape \(16, 60\).\n  Accepted: \(16, 64\), which is"),
        ("embed/tokens", (VOCAB + 1, 16), r"'embed/tokens' has shape \(24, 16\)"),
        ("head/kernel", (VOCAB, 8), r"'head/kernel' has shape \(23, 8\)"),
        ("norm/scale", None, "'norm/scale' is missing"),
        ("layers/attention/q/kernel", None, "'layers/attention/q/kernel' is missing"),
    ],
)
def test_parameters_of_another_config_are_named(layers_as: str, path: str, shape: tuple | None, words: str) -> None:
    model = models.build(tiny(name="llama", layers_as=layers_as))
    stacked = (2,) if path.startswith("layers") and layers_as == "scan" else ()
    params = change(abstract(model), path, None if shape is None else jax.ShapeDtypeStruct((*stacked, *shape), jnp.float32))
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(model.apply, params, jnp.zeros((1, 4), jnp.int32))


def test_a_whole_missing_head_is_named() -> None:
    model = models.build(tiny(name="llama"))
    params = {key: value for key, value in abstract(model).items() if key != "head"}
    with pytest.raises(ValueError, match="'head/kernel' is missing"):
        model.head(params)


@pytest.mark.parametrize(
    ("switches", "words"),
    [
        ({"vocab_size": 0}, "model.vocab_size = 0 when the model is built"),
        ({"heads": 3}, r"model.heads = 3 does not divide model.width = 16.\n  Accepted: 1, 2, 4, 8, 16"),
        ({"kv_heads": 3}, "model.kv_heads = 3 does not divide model.heads = 4"),
        ({"head_dim": 5}, "head width 5 is odd"),
        (
            {"rope_factor": 4.0},
            "model.rope_factor = 4 with model.rope_scaling = 'none', which has no use for it.\n  Accepted: linear, ",
        ),
        (
            {"rope_scaling": "yarn", "positions": "learned"},
            "model.rope_scaling = 'yarn' with model.positions = 'learned', which do not",
        ),
        (
            {"rope_scaling": "llama3", "rope_low_freq_factor": 4.0, "rope_high_freq_factor": 4.0},
            "model.rope_low_freq_factor = 4 with model.rope_high_freq_factor = 4.\n  Accepted: less than the other",
        ),
    ],
)
def test_impossible_sizes(switches: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        models.build(tiny(name="llama", **switches))


@pytest.mark.parametrize(
    ("tokens", "beside", "words"),
    [
        (np.zeros((1, 17), np.int32), {}, "17 tokens in a row.\n  Accepted: up to model.context_tokens = 16"),
        (np.zeros(4, np.int32), {}, r"int32 of shape \(4,\).\n  Accepted: integers of shape \[batch, length\]"),
        (np.zeros((1, 4), np.float32), {}, "tokens are float32"),
        (np.zeros((2, 4), np.int32), {"positions": np.arange(4)}, r"positions has shape \(4,\)"),
        (np.zeros((2, 4), np.int32), {"segments": np.ones((2, 3), np.int32)}, r"segments has shape \(2, 3\)"),
    ],
)
def test_bad_input(tokens: np.ndarray, beside: dict, words: str) -> None:
    model = models.build(tiny(name="llama"))
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(model.apply, abstract(model), tokens, **beside)


def test_every_switch_reaches_the_architecture() -> None:
    """Setting each switch of config.model away from the family's choice changes exactly that field."""
    plain = models.build(tiny(name="llama")).config
    assert plain.norm_eps == 1e-5, "that of Llama 2 and 3"
    others = {"norm": "layernorm", "norm_order": "post", "activation": "gelu", "positions": "learned", "norm_eps": 1e-3}
    for switch, value in others.items():
        assert models.build(tiny(name="llama", **{switch: value})).config == dataclasses.replace(plain, **{switch: value})
    assert models.build(tiny(name="llama", tied_head="on")).config == dataclasses.replace(plain, tied_head=True)


@pytest.mark.parametrize(
    ("bias", "parts"),
    [("on", "q k v o up gate down norm"), ("off", ""), ("qkv", "q k v"), ("attention", "q k v o"), ("mlp", "up gate down")],
)
def test_biases_are_where_the_switch_says(bias: str, parts: str) -> None:
    """Of a model whose norms may have one."""
    params = abstract(models.build(tiny(name="llama", norm="layernorm", bias=bias)))
    assert {path.split("/")[-2] for path, _ in tree.named_leaves(params) if path.endswith("/bias")} == {*parts.split()}
