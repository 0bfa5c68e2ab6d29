"""Models in GGUF files: the same numbers as their weights given directly, and every contradiction named."""

import math
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_gguf

from jaxllm import models
from jaxllm.interop import gguf as ours
from jaxllm.interop import gguf_file, gguf_rope, weights
from jaxllm.ops import positions

KINDS = gguf.GGMLQuantizationType
# All that the package can quantize to.
WRITTEN = (KINDS.F32, KINDS.F16, KINDS.BF16, KINDS.Q8_0, KINDS.Q4_0, KINDS.Q4_1, KINDS.Q5_0, KINDS.Q5_1)
LONGER = tiny_gguf.TOKENS + [f"<{index}>" for index in range(400 - len(tiny_gguf.TOKENS))]
VALUES = tiny_gguf.model_values() | tiny_gguf.tokenizer_values()


def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def as_read(weights: dict[str, np.ndarray], kind: KINDS) -> dict[str, np.ndarray]:
    """What is left of the weights after storing the matrices as `kind`, row by row."""
    quants = gguf.quants
    return {
        name: quants.dequantize(quants.quantize(array, kind), kind).astype(np.float32) if array.ndim == 2 else array
        for name, array in weights.items()
    }


@pytest.mark.parametrize("kind", WRITTEN, ids=lambda kind: kind.name)
def test_parameters_are_the_weights_as_stored(tmp_path: Path, kind: KINDS) -> None:
    given = tiny_gguf.tensors(rng())
    imported = ours.read(tiny_gguf.write(tmp_path / "tiny.gguf", tiny_gguf.stored(given), VALUES, kind=kind))
    loaded = weights.load(imported).params
    expected = tiny_gguf.params(as_read(given, kind))
    assert jax.tree.structure(loaded) == jax.tree.structure(expected)
    for (path, found), wanted in zip(jax.tree.leaves_with_path(loaded), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(found, wanted, err_msg=jax.tree_util.keystr(path))
    quantized = kind.name not in gguf_file.FLOATS
    assert imported.notes == ((f"weights stored as {kind.name} are read as float32",) if quantized else ())


@pytest.mark.parametrize(
    ("architecture", "bias", "tied", "name"),
    [
        ("llama", False, True, "LlamaForCausalLM"),
        ("llama", True, False, "Qwen2ForCausalLM"),
        ("qwen2", True, True, "Qwen2ForCausalLM"),
    ],
)
def test_the_model_of_a_file_is_the_model_of_its_weights(
    tmp_path: Path, architecture: str, bias: bool, tied: bool, name: str
) -> None:
    """Biases of q and k are in pairs as well; qwen2 files keep the order of transformers; an absent head is the embedding."""
    given = tiny_gguf.tensors(rng(), tied=tied, bias=bias)
    values = tiny_gguf.model_values(architecture) | tiny_gguf.tokenizer_values()
    path = tiny_gguf.write(tmp_path / "tiny.gguf", tiny_gguf.stored(given, architecture), values, architecture=architecture)
    imported = ours.read(path)
    model = models.build(imported.config)
    loaded = weights.load(imported).params
    expected = tiny_gguf.params(given)
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, expected))
    tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, tiny_gguf.VOCAB)
    np.testing.assert_array_equal(model.apply(loaded, tokens), model.apply(expected, tokens))
    assert imported.architecture == name
    assert model.config.tied_head is tied


def test_config_is_that_of_the_metadata(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"attention__sliding_window": 8, "attention__key_length": 16, "attention__value_length": 16}
    path = tiny_gguf.write(tmp_path / "tiny.gguf", tiny_gguf.tensors(rng()), tiny_gguf.model_values(**changes))
    imported = ours.read(path)
    arch = models.build(imported.config).config
    found = (
        arch.layers,
        arch.width,
        arch.heads,
        arch.kv_heads,
        arch.head_dim,
        arch.mlp_width,
        arch.vocab_size,
        arch.context_tokens,
    )
    assert found == (2, 64, 4, 2, 16, 96, 300, 64)
    assert (arch.rope_theta, arch.norm_eps, arch.window_tokens) == (50000.0, 1e-5, 8), "decimals, not their float32"
    assert imported.architecture == "MistralForCausalLM"
    assert imported.tokenizer is None


def test_pairs_of_llama_cpp_are_the_halves_of_ours() -> None:
    """Scores by the definition that llama.cpp computes (pairs 2i, 2i + 1 as complex numbers, on the rows of its files) equal
    those of our rotation on the rows that are read."""
    heads, size, length = 3, 16, 5
    rows = {x: rng().normal(size=(heads * size, 8)) * (2 if x == "q" else 1) for x in "qk"}
    x_TD = rng().normal(size=(length, 8))
    angles = np.arange(length)[:, None] * 10000.0 ** (-np.arange(size // 2) * 2 / size)

    def theirs(matrix: np.ndarray) -> np.ndarray:
        pairs = (x_TD @ matrix.T).reshape(length, heads, size // 2, 2)
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)[:, None]
        return np.stack([turned.real, turned.imag], -1).reshape(length, heads, size)

    def mine(matrix: np.ndarray) -> np.ndarray:
        x_BTHK = (x_TD @ ours.halves(matrix, heads).T).reshape(1, length, heads, size)
        return np.asarray(positions.rope(jnp.asarray(x_BTHK, jnp.float32), jnp.arange(length)[None], 10000.0))[0]

    expected = np.einsum("thk,shk->hts", theirs(rows["q"]), theirs(rows["k"]))
    np.testing.assert_allclose(np.einsum("thk,shk->hts", mine(rows["q"]), mine(rows["k"])), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(ours.halves(tiny_gguf.permute(rows["q"], heads), heads), rows["q"])


def rope_file(values: dict[str, Any], factors: np.ndarray | None = None) -> gguf_file.File:
    stored = {} if factors is None else {gguf_rope.FACTORS: gguf_file.Stored(factors.shape, "F32", factors.view(np.uint8))}
    return gguf_file.File(Path("m.gguf"), {f"llama.rope.{key}": value for key, value in values.items()}, stored)


def divisors(head_dim: int, theta: float, factor: float, low: float, high: float, original: int) -> np.ndarray:
    """What the converter of llama.cpp stores for Llama 3's scaling: the loop over wavelengths of Llama 3.1's own code."""
    out = []
    for i in range(0, head_dim, 2):
        wave = 2 * math.pi * theta ** (i / head_dim)
        share = (original / wave - low) / (high - low)
        out.append(1.0 if wave < original / high else factor if wave > original / low else 1 / ((1 - share) / factor + share))
    return np.array(out, np.float32)


@pytest.mark.parametrize(
    ("head_dim", "theta", "factor", "low", "high", "original"),
    [(128, 500000.0, 8.0, 1.0, 4.0, 8192), (64, 500000.0, 32.0, 1.0, 4.0, 8192), (128, 500000.0, 16.0, 1.0, 2.5, 4096),
     (128, 1e6, 8.0, 2.0, 8.0, 16384), (16, 10000.0, 4.0, 1.0, 4.0, 8192)],
)  # fmt: skip
def test_scaling_of_llama3_is_found_from_its_divisors(
    head_dim: int, theta: float, factor: float, low: float, high: float, original: int
) -> None:
    given = divisors(head_dim, theta, factor, low, high, original)
    fields = gguf_rope.fields(rope_file({"freq_base": theta}, given), "llama", head_dim, 131072)
    assert fields == {
        "rope_theta": theta,
        "rope_scaling": "llama3",
        "rope_factor": factor,
        "rope_original_tokens": round(original / low),
        "rope_low_freq_factor": 1.0,
        "rope_high_freq_factor": high / low,
    }


def test_other_rotary_positions() -> None:
    def fields(factors: np.ndarray | None = None, **values: Any) -> dict[str, Any]:
        return gguf_rope.fields(
            rope_file({key.replace("__", "."): value for key, value in values.items()}, factors), "llama", 16, 64
        )

    plain = {"rope_theta": 10000.0}
    assert fields() == plain
    assert fields(np.ones(8, np.float32)) == plain
    assert fields(scaling__type="none") == plain
    linear = plain | {"rope_scaling": "linear", "rope_factor": 4.0, "rope_original_tokens": 64}
    assert fields(scaling__type="linear", scaling__factor=4.0) == linear
    assert fields(scale_linear=4.0) == linear
    yarn = fields(scaling__type="yarn", scaling__factor=4.0, scaling__original_context_length=32, scaling__yarn_beta_fast=16.0)
    expected = {
        "rope_scaling": "yarn",
        "rope_factor": 4.0,
        "rope_original_tokens": 32,
        "rope_beta_fast": 16.0,
        "rope_beta_slow": 1.0,
    }
    assert yarn == plain | expected | {"context_tokens": 128}
    with pytest.raises(ValueError, match=r"rope.scaling.type = 'longrope'.\n  Accepted: none, linear, yarn"):
        fields(scaling__type="longrope", scaling__factor=4.0)
    with pytest.raises(ValueError, match=r"yarn_log_multiplier = 0.1.\n  Accepted: 0"):
        fields(scaling__type="yarn", scaling__factor=4.0, scaling__yarn_log_multiplier=0.1)
    for wrong in (np.linspace(1, 8, 8), np.ones(4), np.full(8, np.nan)):
        with pytest.raises(ValueError, match="rope_freqs.weight.* are not those of Llama 3's scaling"):
            fields(wrong.astype(np.float32))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"general.architecture": "llama4"},
            "of the architecture 'llama4'.\n  Accepted: llama, qwen2, dense.* The nearest is 'llama'",
        ),
        ({"llama.expert_count": 8}, "a mixture of 8 experts"),
        ({"llama.attention.value_length": 8}, "llama.attention.value_length = 8 with heads 16 wide"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count = 8 with heads 16 wide"),
        ({"llama.attention.head_count_kv": [2, 1]}, r"head_count_kv' = \[2, 1\], a list.\n  Accepted: one int for the whole model"),
        ({"llama.block_count": None}, "does not say 'llama.block_count'"),
        (
            {"tokenizer.ggml.tokens": LONGER, "tokenizer.ggml.token_type": [1] * 400},
            "tokenizer has 400 tokens, its embedding 300 rows",
        ),
        ({"tokenizer.ggml.merges": ["h e", "no token"]}, "the tokenizer in .* cannot be used: .*`no`"),
    ],
)
def test_metadata_without_a_counterpart_are_refused(tmp_path: Path, values: dict[str, Any], words: str) -> None:
    architecture = values.get("general.architecture", "llama")
    changed = {key: value for key, value in (VALUES | values).items() if value is not None and key != "general.architecture"}
    path = tiny_gguf.write(tmp_path / "tiny.gguf", tiny_gguf.tensors(rng()), changed, architecture=architecture)
    with pytest.raises(ValueError, match=rf"(?s){words}.*\n  "):
        ours.read(path)


def test_tensors_that_do_not_fit_are_all_named(tmp_path: Path) -> None:
    given = tiny_gguf.tensors(rng())
    del given["blk.1.ffn_up.weight"], given["output_norm.weight"]
    given["blk.0.attn_q_norm.weight"] = np.ones(16, np.float32)
    given["blk.0.ffn_down.weight"] = given["blk.0.ffn_down.weight"][:, :64]
    path = tiny_gguf.write(tmp_path / "tiny.gguf", given, VALUES)
    with pytest.raises(ValueError, match="the tensors in") as error:
        ours.read(path)
    for line in (
        "missing: output_norm.weight, blk.1.ffn_up.weight\n",
        "unexpected: blk.0.attn_q_norm.weight\n",
        "of another shape: blk.0.ffn_down.weight (64, 64) instead of (64, 96)\n",
    ):
        assert line in str(error.value)
    del given["token_embd.weight"]
    with pytest.raises(ValueError, match="has no tensor token_embd.weight"):
        ours.read(tiny_gguf.write(tmp_path / "tiny.gguf", given, VALUES))
    given = tiny_gguf.tensors(rng()) | {"blk.0.attn_q_norm.weight": np.ones(16, np.float32)}
    with pytest.raises(ValueError, match=r"describes:\n    unexpected: blk.0.attn_q_norm.weight\n  Accepted"):
        ours.read(tiny_gguf.write(tmp_path / "tiny.gguf", given, VALUES))
    given = tiny_gguf.tensors(rng()) | {"blk.0.attn_q.bias": np.zeros(64, np.float32)}
    with pytest.raises(ValueError, match="has biases for q only"):
        ours.read(tiny_gguf.write(tmp_path / "tiny.gguf", given, VALUES))
