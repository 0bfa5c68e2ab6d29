"""Out to files and back, for every family: the same tensors, byte for byte, and the same model."""

from pathlib import Path

import jax
import numpy as np
import pytest
from foreign_models import MODELS, make
from safetensors import safe_open

from jaxllm import config as schema
from jaxllm import models
from jaxllm.interop import directory, weights


def tensor_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def objective(architecture: str) -> str:
    """What a model of this class is trained on."""
    kinds = {
        "ForSequence": "sequence_classification",
        "ForToken": "token_classification",
        "Bert": "masked_lm",
        "T5": "span_corruption",
    }
    return next((found for part, found in kinds.items() if part in architecture), "causal_lm")


@pytest.mark.parametrize("case", MODELS)
def test_export_import_export(case: str, tmp_path: Path) -> None:
    architecture, fields = MODELS[case]
    config, model, params = make(fields)
    written = directory.write(tmp_path / "one", params, model.config, None, {})
    assert written.architecture == architecture
    imported = directory.read(tmp_path / "one")
    assert imported.architecture == architecture and not imported.notes
    assert imported.config.train.objective == objective(architecture)
    again = models.build(imported.config).config
    # What trains and what computes it may differ; what is computed may not.
    assert again == model.config
    loaded = weights.load(imported)
    assert loaded.unused == ()
    assert jax.tree.structure(loaded.params) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    directory.write(tmp_path / "two", loaded.params, again, None, imported.files)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    with safe_open(tmp_path / "one" / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()} == dict(written.shapes)  # noqa: SIM118
    assert schema.flatten(imported.config)["tokenizer.kind"] == schema.base().tokenizer.kind


@pytest.mark.parametrize("case", ["gpt2", "t5"])
def test_stacked_layers_are_the_same_files_and_come_back(case: str, tmp_path: Path) -> None:
    _, fields = MODELS[case]
    _, model, params = make(fields)
    directory.write(tmp_path / "list", params, model.config, None, {})
    imported = directory.read(tmp_path / "list")
    imported.config.model.layers_as = "scan"
    stacked = weights.load(imported).params
    assert not any(isinstance(node, list) for node in jax.tree.leaves(stacked, is_leaf=lambda node: isinstance(node, list)))
    directory.write(tmp_path / "stack", stacked, model.config, None, {})
    assert tensor_bytes(tmp_path / "list") == tensor_bytes(tmp_path / "stack")


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 8), ("float16", 11)])
def test_narrow_types(dtype: str, bits: int, tmp_path: Path) -> None:
    """Rounded once when written, as the nearest number; then nothing changes any more."""
    _, model, params = make(MODELS["llama"][1])
    directory.write(tmp_path / "one", params, model.config, None, {}, dtype=dtype)
    imported = directory.read(tmp_path / "one")
    assert set(imported.tensors.dtypes.values()) == {dtype}
    loaded = weights.load(imported).params
    for found, exact in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
        assert found.dtype == np.float32
        assert (np.abs(found - exact) <= np.abs(exact) * 2.0**-bits + 2.0**-25).all()
    directory.write(tmp_path / "two", loaded, model.config, None, imported.files, dtype=dtype)
    assert tensor_bytes(tmp_path / "one") == tensor_bytes(tmp_path / "two")


def test_numbers_that_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    _, model, params = make(MODELS["llama"][1])
    params["norm"]["scale"] = params["norm"]["scale"].at[0].set(1e6)
    with pytest.raises(
        ValueError, match=r"'model.norm.weight' has numbers up to 1e\+06, which float16 cannot hold.\n  Accepted: --dtype"
    ):
        directory.write(tmp_path / "one", params, model.config, None, {}, dtype="float16")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "transformer"}, r"this model \(model.name = 'transformer'\). The nearest is "),
        ({"name": "llama", "norm": "layernorm"}, r"LLaMA, Mistral or Qwen2:\n  model.norm = layernorm; .* has rmsnorm\n  Accepted"),
        ({"name": "gpt", "window_tokens": 4}, r"GPT-2:\n  model.window_tokens = 4; GPT-2 has 0"),
        ({"name": "bert", "tied_head": "off"}, r"BERT:\n  model.tied_head = False; BERT has True\n"),
        ({"name": "gpt", "bias": "off"}, r"GPT-2:\n  model.bias = off; GPT-2 has mlp\+norm\+o\+qkv"),
        ({"name": "llama", "window_tokens": 4, "bias": "on"}, r"model.bias = mlp\+o\+qkv; .* has off, qkv\n"),
        ({"name": "llama", "head": "tag", "classes": 2}, r"model.head = tag; .* has lm, classify\n"),
    ],
)
def test_what_no_class_can_express_is_named(fields: dict[str, object], words: str, tmp_path: Path) -> None:
    _, model, params = make(fields)
    with pytest.raises(ValueError, match=words):
        directory.write(tmp_path / "one", params, model.config, None, {})
    assert not (tmp_path / "one").exists()
