"""GGUF files that are written: what the package gguf reads in them, what they say of a model, and what is refused."""

import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
import tiny_gguf
from ml_collections import ConfigDict
from test_gguf import divisors

from jaxllm import config as schema
from jaxllm import models
from jaxllm.data.tokenizers.byte import ByteTokenizer
from jaxllm.interop import gguf as reader
from jaxllm.interop import gguf_export, gguf_rope, gguf_write, weights
from jaxllm.interop.gguf_file import File, Stored

KINDS = gguf.GGMLQuantizationType
FIELDS: dict[str, Any] = {
    "name": "llama",
    "layers": tiny_gguf.LAYERS,
    "width": tiny_gguf.WIDTH,
    "heads": tiny_gguf.HEADS,
    "kv_heads": tiny_gguf.KV_HEADS,
    "head_dim": tiny_gguf.HEAD_DIM,
    "mlp_width": tiny_gguf.MLP,
    "vocab_size": tiny_gguf.VOCAB,
    "context_tokens": tiny_gguf.CONTEXT,
    "rope_theta": tiny_gguf.THETA,
    "norm_eps": tiny_gguf.EPS,
    "tied_head": "on",
}


def make_config(**fields: Any) -> ConfigDict:
    config = schema.base()
    config.model.update(FIELDS | fields)
    return config


def write(path: Path, config: ConfigDict, params: Any, dtype: str = "float32") -> gguf_export.Plan:
    arch = models.build(config).config
    plan = gguf_export.plan(params, arch, ByteTokenizer(), {}, dtype=dtype, name="tiny")
    gguf_write.write(path, plan.entries, plan.tensors, plan.make)
    return plan


def values_of(path: Path) -> dict[str, Any]:
    """The metadata as the package gguf reads them."""
    fields = gguf.GGUFReader(path).fields
    return {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")}


@pytest.mark.parametrize("dtype", gguf_write.KINDS)
@pytest.mark.parametrize(
    ("architecture", "bias", "tied", "fields"),
    [
        ("llama", False, True, {}),
        ("llama", True, False, {"rope_scaling": "llama3", "rope_factor": 4.0}),
        ("qwen2", True, True, {}),
    ],
)
def test_tensors_are_those_of_llama_cpps_converter(
    tmp_path: Path, dtype: str, architecture: str, bias: bool, tied: bool, fields: dict[str, Any]
) -> None:
    """Their names, order of rows and types, as another reader finds them; q and k in pairs in "llama" alone; vectors in float32."""
    given = tiny_gguf.tensors(np.random.default_rng(5), tied=tied, bias=bias)
    config = make_config(bias="qkv" if bias else "off", tied_head="on" if tied else "off", **fields)
    write(tmp_path / "tiny.gguf", config, tiny_gguf.params(given), dtype)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors}
    expected = tiny_gguf.stored(given, architecture)
    assert found.keys() == expected.keys() | ({gguf_rope.FACTORS} if fields else set())
    for name, array in expected.items():
        kind = KINDS[gguf_write.KINDS[dtype]] if array.ndim == 2 else KINDS.F32
        assert found[name].tensor_type == kind and tuple(reversed(found[name].shape.tolist())) == array.shape
        wanted = gguf.quants.quantize(array, kind)
        np.testing.assert_array_equal(np.asarray(found[name].data).reshape(-1).view(np.uint8), wanted.reshape(-1).view(np.uint8))
    values = values_of(tmp_path / "tiny.gguf")
    assert values["general.architecture"] == architecture
    assert (
        values["general.file_type"] == gguf.LlamaFileType[f"{'ALL' if dtype == 'float32' else 'MOSTLY'}_{gguf_write.KINDS[dtype]}"]
    )


def test_metadata_say_the_whole_model(tmp_path: Path) -> None:
    config = make_config(head_dim=24, window_tokens=16, rope_scaling="linear", rope_factor=2.0, rope_original_tokens=32)
    plan = write(tmp_path / "tiny.gguf", config, models.build(config).init(jax.random.key(0)))
    found = {key: value for key, value in values_of(tmp_path / "tiny.gguf").items() if not key.startswith("tokenizer.")}
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "tiny",
        "general.file_type": 0,
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "general.alignment": gguf.GGUF_DEFAULT_ALIGNMENT,
        "llama.vocab_size": 300,
        "llama.context_length": 64,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 24,
        "llama.attention.value_length": 24,
        "llama.attention.layer_norm_rms_epsilon": np.float32(1e-5),
        "llama.attention.sliding_window": 16,
        "llama.rope.dimension_count": 24,
        "llama.rope.freq_base": 50000.0,
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 2.0,
        "llama.rope.scaling.original_context_length": 32,
    }
    assert found == expected
    assert any("passes over the sliding window" in note and "up to 16 tokens" in note for note in plan.notes)


def test_names_that_llama_cpp_takes_for_another_model_are_left_out() -> None:
    config = make_config()
    arch, params = models.build(config).config, models.build(config).init(jax.random.key(0))
    for name, said in (("my-model", True), ("My-Phi-3-mini", False)):
        plan = gguf_export.plan(params, arch, ByteTokenizer(), {}, dtype="float32", name=name)
        assert (gguf_write.entry("general.name", name) in plan.entries) is said


SWITCHES: dict[str, dict[str, Any]] = {
    "multi_query": {"kv_heads": 1, "tied_head": "off"},
    "all_biases": {"bias": "on"},
    "attention_biases": {"bias": "attention", "head_dim": 8},
    "mlp_biases": {"bias": "mlp"},
    "qwen2": {"bias": "qkv", "window_tokens": 9},
    "gpt": {
        "name": "gpt", "norm": "rmsnorm", "positions": "rope", "activation": "swiglu", "bias": "off", "norm_eps": 1e-6
    },
    "stacked": {"layers_as": "scan", "tied_head": "off"},
    "linear": {"rope_scaling": "linear", "rope_factor": 3.0, "rope_original_tokens": 20},
    "yarn": {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_tokens": 16, "rope_beta_fast": 8.0},
    "yarn_amplitude": {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_tokens": 16, "rope_attention_factor": 1.3},
    "llama3_odd": {
        "rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_tokens": 32, "rope_low_freq_factor": 1.5, "head_dim": 6
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SWITCHES)
def test_what_is_written_is_read_and_written_again(tmp_path: Path, name: str) -> None:
    """The same parameters, the same model, and at the second time the same bytes."""
    config = make_config(**SWITCHES[name])
    config.model.layers = 11 if name == "stacked" else 2
    model = models.build(config)
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(1), leaf.shape), model.init(jax.random.key(0)))
    first = write(tmp_path / "tiny.gguf", config, params)
    imported = reader.read(tmp_path / "tiny.gguf")
    imported.config.model.layers_as = config.model.layers_as
    loaded, back = weights.load(imported).params, models.build(imported.config)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    tokens = jax.random.randint(jax.random.key(2), (2, 40), 0, tiny_gguf.VOCAB)
    np.testing.assert_allclose(back.apply(loaded, tokens), model.apply(params, tokens), rtol=1e-6, atol=1e-6)
    again = write(tmp_path / "again.gguf", imported.config, loaded)
    assert (again.architecture, again.tensors) == (first.architecture, first.tensors)
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "tiny.gguf").read_bytes()


@pytest.mark.parametrize(
    ("head_dim", "theta", "factor", "low", "high", "original"),
    [(128, 500000.0, 8.0, 1.0, 4.0, 8192), (64, 500000.0, 32.0, 1.0, 4.0, 8192), (16, 10000.0, 4.0, 2.0, 4.5, 77)],
)
def test_divisors_of_llama3(head_dim: int, theta: float, factor: float, low: float, high: float, original: int) -> None:
    """Those of Llama 3.1's own loop; what made them is found again, also where they do not give it away."""
    fields = {
        "rope_scaling": "llama3",
        "rope_factor": factor,
        "rope_original_tokens": original,
        "rope_low_freq_factor": low,
        "rope_high_freq_factor": high,
    }
    arch = models.build(make_config(head_dim=head_dim, rope_theta=theta, **fields)).config
    made = gguf_rope.divisors(arch)
    assert made is not None
    np.testing.assert_allclose(made, divisors(head_dim, theta, factor, low, high, original), rtol=1e-6)
    stored = {gguf_rope.FACTORS: Stored(made.shape, "F32", made.view(np.uint8))}
    file = File(Path("m.gguf"), gguf_rope.values(arch, "llama"), stored)
    assert gguf_rope.fields(file, "llama", head_dim, 64) == {"rope_theta": theta, **fields}


@pytest.mark.parametrize("dtype", ["float32", "q8_0"])
def test_one_tensor_is_in_memory(tmp_path: Path, dtype: str) -> None:
    """16 tensors of 1 MiB are written with less than 5 MiB, most of which quantizing takes."""
    tensors = {f"t{index}": gguf_write.Planned((256, 1024), gguf_write.KINDS[dtype]) for index in range(16)}
    ones = np.ones((256, 1024), np.float32)
    gguf_write.store("", ones, gguf_write.KINDS[dtype])  # imports come first
    tracemalloc.start()
    gguf_write.write(tmp_path / "x", [], tensors, lambda name: ones * int(name[1:]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * 2**20
    assert (tmp_path / "x").stat().st_size > sum(planned.size_bytes for planned in tensors.values())


@pytest.mark.parametrize(
    ("fields", "lines"),
    [
        ({"name": "gpt"}, ("model.norm = layernorm; GGUF has rmsnorm", "model.positions = learned; GGUF has rope")),
        ({"activation": "geglu"}, ("model.activation = geglu; GGUF has swiglu",)),
        ({"head": "classify", "classes": 3}, ("model.head = classify; GGUF has lm",)),
        ({"rope_scaling": "dynamic", "rope_factor": 2.0}, ("model.rope_scaling = dynamic; GGUF has none, linear, yarn, llama3",)),
        (
            {"name": "bert", "positions": "auto"},
            ("model.name = bert; GGUF has gpt, llama", "model.norm_order = post; GGUF has pre"),
        ),
        ({"bias": "mlp", "window_tokens": 8}, ("model.bias = mlp; GGUF has off, qkv",)),
    ],
)
def test_models_that_gguf_does_not_hold_are_refused(tmp_path: Path, fields: dict[str, Any], lines: tuple[str, ...]) -> None:
    config = make_config(kv_heads=0, head_dim=0, tied_head="auto", norm_eps=0.0)
    config.model.update(fields)
    arch = models.build(config).config
    with pytest.raises(ValueError, match=r"no architecture of GGUF files[\s\S]*\n  Accepted: [\s\S]*\n  Train") as error:
        gguf_export.plan({}, arch, ByteTokenizer(), {}, dtype="float32", name="tiny")
    for line in lines:
        assert f"\n  {line}" in str(error.value)


def test_numbers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    config = make_config(width=40, heads=4, kv_heads=4, head_dim=8)
    params = models.build(config).init(jax.random.key(0))
    with pytest.raises(ValueError, match=r"--dtype q8_0: rows of token_embd.weight have 40 numbers.\n  Accepted: a multiple of 32"):
        write(tmp_path / "tiny.gguf", config, params, "q8_0")
    params["embed"]["tokens"] = params["embed"]["tokens"].at[0, 0].set(1e5)
    with pytest.raises(ValueError, match=r"'token_embd.weight' has numbers up to 1e\+05, which float16 cannot hold"):
        write(tmp_path / "tiny.gguf", config, params, "float16")
