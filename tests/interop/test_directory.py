"""Directories as users have them: names of several versions, what travels along, and what is wrong with them."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from foreign_models import MODELS, llama_tensors, make, write_llama
from safetensors.numpy import load_file, save_file

from jaxllm.data import tokenize
from jaxllm.data.tokenizers.added import Added
from jaxllm.data.tokenizers.byte import ByteTokenizer
from jaxllm.data.tokenizers.char import CharTokenizer
from jaxllm.interop import directory, weights


def load(path: Path) -> weights.Loaded:
    return weights.load(directory.read(path))


def test_a_hand_written_directory(tmp_path: Path) -> None:
    """The values, once without a name table: each kernel maps a vector as its tensor does."""
    tensors = llama_tensors()
    loaded = load(write_llama(tmp_path))
    layer, name = loaded.params["layers"][1], "model.layers.1"
    x_D, x_HK, x_F = (np.random.default_rng(2).normal(size=shape) for shape in ((8,), (4, 2), (12,)))
    attention = layer["attention"]
    for part, heads in (("q", 4), ("k", 2), ("v", 2)):
        found = np.einsum("D,DHK->HK", x_D, attention[part]["kernel"])
        np.testing.assert_allclose(
            found, (tensors[f"{name}.self_attn.{part}_proj.weight"] @ x_D).reshape(heads, 2), rtol=1e-6, atol=1e-6
        )
    found = np.einsum("HK,HKD->D", x_HK, attention["o"]["kernel"])
    np.testing.assert_allclose(found, tensors[f"{name}.self_attn.o_proj.weight"] @ x_HK.reshape(-1), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        x_F @ layer["mlp"]["down"]["kernel"], tensors[f"{name}.mlp.down_proj.weight"] @ x_F, rtol=1e-6, atol=1e-6
    )
    np.testing.assert_array_equal(layer["mlp"]["norm"]["scale"], tensors[f"{name}.post_attention_layernorm.weight"])
    np.testing.assert_array_equal(loaded.params["embed"]["tokens"], tensors["model.embed_tokens.weight"])


def test_gpt2_keeps_q_k_and_v_side_by_side(tmp_path: Path) -> None:
    _, model, params = make(MODELS["gpt2"][1])
    directory.write(tmp_path, params, model.config, None, {})
    stored = load_file(tmp_path / "model.safetensors")
    attention = params["layers"][0]["attention"]
    joined = np.concatenate([np.asarray(attention[part]["kernel"]).reshape(8, 8) for part in "qkv"], axis=1)
    np.testing.assert_array_equal(stored["transformer.h.0.attn.c_attn.weight"], joined)
    np.testing.assert_array_equal(stored["transformer.h.0.attn.c_attn.bias"][8:16], np.asarray(attention["k"]["bias"]).reshape(-1))
    np.testing.assert_array_equal(stored["transformer.h.0.mlp.c_fc.weight"], params["layers"][0]["mlp"]["up"]["kernel"])


def renamed(source: Path, target: Path, change: Any, **more: np.ndarray) -> Path:
    """A copy of the directory whose tensors have other names, and some more tensors."""
    target.mkdir()
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = {change(name): tensor for name, tensor in load_file(source / "model.safetensors").items()}
    save_file({name: tensor for name, tensor in tensors.items() if name} | more, target / "model.safetensors")
    return target


@pytest.mark.parametrize(
    ("case", "change", "more"),
    [
        ("gpt2", lambda name: name.removeprefix("transformer."), {"h.0.attn.bias": (1, 1), "h.1.attn.masked_bias": ()}),
        ("gpt2", lambda name: name.replace("transformer.wte.weight", "lm_head.weight"), {}),
        ("llama", lambda name: name.removeprefix("model."), {"layers.0.self_attn.rotary_emb.inv_freq": (3,)}),
        (
            "bert",
            lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"),
            {"bert.embeddings.position_ids": (1, 16), "bert.pooler.dense.bias": (8,), "cls.seq_relationship.weight": (2, 8)},
        ),
        ("bert", lambda name: name.replace("cls.predictions.bias", "cls.predictions.decoder.bias"), {}),
        ("bert alone", lambda name: name.removeprefix("bert."), {}),
        ("t5", lambda name: name, {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": (32, 4)}),
    ],
)
def test_names_of_other_versions(case: str, change: Any, more: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    """Prefixes left out, older names, buffers and heads that are not used."""
    _, model, params = make(MODELS[case][1])
    directory.write(tmp_path / "one", params, model.config, None, {})
    loaded = load(
        renamed(tmp_path / "one", tmp_path / "two", change, **{name: np.ones(shape, np.float32) for name, shape in more.items()})
    )
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    assert set(loaded.unused) == set(more)


@pytest.mark.parametrize(
    ("case", "copy"), [("gpt2", "lm_head.weight"), ("t5", "encoder.embed_tokens.weight"), ("t5", "lm_head.weight")]
)
def test_tied_tensors_that_are_stored_twice(case: str, copy: str, tmp_path: Path) -> None:
    _, model, params = make(MODELS[case][1])
    tokens = np.asarray(params["embed"]["tokens"])
    directory.write(tmp_path / "one", params, model.config, None, {})
    loaded = load(renamed(tmp_path / "one", tmp_path / "two", lambda name: name, **{copy: tokens}))
    assert loaded.unused == (copy,)
    name = "transformer.wte.weight" if case == "gpt2" else "shared.weight"
    with pytest.raises(ValueError, match=rf"copies that differ \(1\): {copy} is not {name}"):
        load(renamed(tmp_path / "one", tmp_path / "three", lambda name: name, **{copy: tokens + 1}))


def test_t5_of_transformers_5_leaves_out_a_head_that_is_the_embedding(tmp_path: Path) -> None:
    _, model, params = make(MODELS["t5 1.1"][1])
    directory.write(tmp_path / "one", params, model.config, None, {})
    loaded = load(renamed(tmp_path / "one", tmp_path / "two", lambda name: "" if name == "lm_head.weight" else name))
    np.testing.assert_array_equal(loaded.params["head"]["kernel"], params["embed"]["tokens"])


def test_everything_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    tensors = llama_tensors()
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.k_proj.weight"] = np.zeros((8, 8), np.float32)
    tensors |= {f"model.extra.{index}": np.zeros(1, np.float32) for index in range(30)}
    with pytest.raises(ValueError) as caught:
        load(write_llama(tmp_path, tensors))
    text = str(caught.value)
    assert "\n  missing (1): model.norm.weight [8]\n" in text
    assert "\n  unexpected (30): model.extra.0 [1], " in text and ", and 10 more\n" in text
    assert "\n  of another shape (1): model.layers.0.self_attn.k_proj.weight [8, 8] instead of [4, 8]\n" in text
    assert (
        "hidden_size 8" in text and "num_key_value_heads 2" in text and "correct architectures or the sizes in config.json" in text
    )


def test_shapes_that_contradict_the_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"down_proj.weight \[8, 12\] instead of \[8, 16\][\s\S]*intermediate_size 16"):
        load(write_llama(tmp_path / "a", intermediate_size=16))
    with pytest.raises(ValueError, match=r"missing \(9\): model.layers.2.input_layernorm.weight \[8\]"):
        load(write_llama(tmp_path / "b", num_hidden_layers=3))
    with pytest.raises(ValueError, match=r"unexpected \(9\): model.layers.1.input_layernorm.weight \[8\]"):
        load(write_llama(tmp_path / "e", num_hidden_layers=1))
    tensors = llama_tensors()
    with pytest.raises(ValueError, match=r"unexpected \(1\): norm.weight \[8\]"):
        load(write_llama(tmp_path / "f", tensors | {"norm.weight": tensors["model.norm.weight"]}))
    with pytest.raises(ValueError, match=r"copies that differ \(1\): lm_head.weight is not model.embed_tokens.weight"):
        load(write_llama(tmp_path / "c", tie_word_embeddings=True))
    with pytest.raises(ValueError, match=r"model.kv_heads = 2 does not divide model.heads = 3"):
        load(write_llama(tmp_path / "d", num_attention_heads=3))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"architectures": ["GPTNeoXForCausalLM"]},
            r"architectures = \['GPTNeoXForCausalLM'\] is no architecture .* The nearest is \w+.\n",
        ),
        ({"architectures": ["LlamaForCausal"]}, r"The nearest is LlamaForCausalLM.\n  Accepted: GPT2LMHeadModel"),
        ({"architectures": ..., "model_type": "lama"}, r"model_type = 'lama' .* The nearest is llama"),
        ({"architectures": ..., "model_type": ...}, r"model_type = None is no architecture"),
        ({"rms_norm_eps": 0}, r"model.norm_eps would be 0.0 .*\n  Accepted: above 0"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, r"model.rope_factor would be 0.5 .*\n  Accepted: 1 or more"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config: quant_method = None"),
    ],
)
def test_models_that_cannot_be_read(keys: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        directory.read(write_llama(tmp_path, **keys))


def test_a_model_type_alone_is_enough(tmp_path: Path) -> None:
    assert directory.read(write_llama(tmp_path, architectures=...)).architecture == "LlamaForCausalLM"


def test_directories_without_a_readable_config(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"nowhere' does not exist.\n  Accepted: a directory with config.json and model.safetensors"
    ):
        directory.read(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no config.json.\n  Accepted"):
        directory.read(tmp_path)
    for text, words in (("{", "is not JSON"), ("[]", "holds a list")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            directory.read(tmp_path)


def test_a_tokenizer_with_more_tokens_than_rows(tmp_path: Path) -> None:
    write_llama(tmp_path)
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word in ("[UNK]", *"abcdefghijk")))
    with pytest.raises(ValueError, match=r"its tokenizer has 12 tokens, its embedding 11 rows"):
        directory.read(tmp_path)
    (tmp_path / "vocab.txt").write_text("[UNK]\na\n[MASK]\n")
    imported = directory.read(tmp_path)
    assert imported.tokenizer is not None and imported.tokenizer.mask_id == 2
    assert (imported.config.tokenizer.kind, imported.config.tokenizer.path) == ("file", str(tmp_path))


@pytest.mark.parametrize("pads", [True, False])
def test_what_a_decoder_behind_an_encoder_begins_with(pads: bool, tmp_path: Path) -> None:
    """T5 begins with its padding, models that were trained here with bos; neither stands before what the encoder reads."""
    _, model, params = make(MODELS["t5"][1], vocab_size=300)
    tokenizer = ByteTokenizer(Added(sentinels=2))
    directory.write(tmp_path, params, model.config, tokenizer, {})
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["decoder_start_token_id"] == tokenizer.bos_id
    if pads:
        (tmp_path / "config.json").write_text(json.dumps(values | {"decoder_start_token_id": tokenizer.pad_id}))
    found = directory.read(tmp_path).tokenizer
    assert found is not None
    assert (found.bos_id, tokenize.start_id(found)) == ((None, tokenizer.pad_id) if pads else (tokenizer.bos_id, tokenizer.bos_id))


def sum_each(path: Any, host: weights.OnHost) -> list[float]:
    """Takes the layers of a stack one after the other, as start.py does."""
    del path
    return [float(array.sum()) for array in host.arrays]


@pytest.mark.parametrize(("layers_as", "place"), [("unrolled", weights.on_device), ("scan", sum_each)])
def test_loading_holds_a_few_tensors_beside_the_result(layers_as: str, place: weights.Place, tmp_path: Path) -> None:
    config, model, params = make(MODELS["llama"][1], width=256, mlp_width=1024, layers=24)
    del config
    directory.write(tmp_path, params, model.config, None, {}, dtype="bfloat16")
    imported = directory.read(tmp_path)
    imported.config.model.layers_as = layers_as
    weights.load(imported, place)  # What is traced and compiled stays in memory.
    tracemalloc.start()
    try:
        weights.load(imported, place)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Arrays of JAX are not counted here. The tensor as it is stored and in float32, and some that JAX has copied and not yet let go.
    tensor_bytes = 4 * 256 * 1024
    assert peak_bytes < 20 * tensor_bytes < sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 3


def test_labels_and_ids_travel_along(tmp_path: Path) -> None:
    _, model, params = make(MODELS["bert classes"][1])
    directory.write(tmp_path / "one", params, model.config, None, {}, classes=("bad", "so so", "good"))
    values = json.loads((tmp_path / "one" / "config.json").read_text())
    assert values["id2label"] == {"0": "bad", "1": "so so", "2": "good"} and values["label2id"]["good"] == 2
    (tmp_path / "one" / "config.json").write_text(json.dumps(values | {"pad_token_id": 3, "eos_token_id": [4, 5]}))
    (tmp_path / "one" / "generation_config.json").unlink()
    imported = directory.read(tmp_path / "one")
    assert directory.classes_of(imported.files) == ("bad", "so so", "good")
    many = {str(index): f"LABEL_{index}" for index in range(11)}
    assert directory.classes_of({"config.json": json.dumps({"id2label": many}).encode()}) == tuple(many.values())
    directory.write(tmp_path / "two", params, model.config, None, imported.files)
    again = json.loads((tmp_path / "two" / "config.json").read_text())
    assert (again["pad_token_id"], again["eos_token_id"]) == (3, [4, 5])
    assert json.loads((tmp_path / "two" / "generation_config.json").read_text()) == {"eos_token_id": [4, 5], "pad_token_id": 3}


@pytest.mark.parametrize("case", ["t5", "llama"])
def test_a_model_of_ours_has_the_ids_of_its_tokenizer(case: str, tmp_path: Path) -> None:
    """A decoder behind an encoder begins with bos, as in training; the pad id of a char tokenizer is that of a letter, so none is named."""
    _, model, params = make(MODELS[case][1], vocab_size=272)
    starts = {"decoder_start_token_id": 256} if case == "t5" else {}
    for tokenizer, expected in (
        (ByteTokenizer(), {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258, **starts}),
        (CharTokenizer("ab", Added(borders=True)), {"bos_token_id": 2, "eos_token_id": 3, **dict.fromkeys(starts, 2)}),
    ):
        directory.write(tmp_path, params, model.config, tokenizer, {})
        values = json.loads((tmp_path / "config.json").read_text())
        assert {key: value for key, value in values.items() if key.endswith("token_id") and value is not None} == expected
        assert json.loads((tmp_path / "generation_config.json").read_text()) == expected
