"""Logits, losses and gradients of every family and switch against the installed torch and transformers: larger and on several seeds."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_batch
import jax
import make_golden
import numpy as np
import pytest
import torch
import torch_layers
from cases import BERT, CASES, LLAMA, T5, Case
from ml_collections import ConfigDict

from jaxllm import config as configs
from jaxllm import models
from jaxllm.interop import directory, weights
from jaxllm.objectives import tokens as objective
from jaxllm.types import Params

VOCAB, SEEDS = 200, (1, 2)
LOGITS, GRADIENT = 4e-6, 1e-4  # in parts of the largest logit, and of a gradient's norm
# What `Case.fields` are overwritten with, by how the class is called.
LARGER: dict[str, dict[str, Any]] = {
    "GPT2": {"n_embd": 64, "n_inner": 160, "n_layer": 3, "n_head": 8, "n_positions": 96},
    "Bert": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "max_position_embeddings": 96,
    },
    "T5": {"d_model": 48, "d_ff": 120, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 6},
    "MT5": {"d_model": 48, "d_ff": 120, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 6},
    "": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3},
}
MORE = {
    "gpt2_sequence": Case("GPT2ForSequenceClassification", {**CASES["gpt2"].fields, "num_labels": 3, "pad_token_id": 0}),
    "gpt2_relu": Case("GPT2LMHeadModel", {**CASES["gpt2"].fields, "activation_function": "relu", "tie_word_embeddings": False}),
    "llama_sequence": Case("LlamaForSequenceClassification", {**LLAMA, "num_labels": 4, "pad_token_id": 0}),
    "llama_mlp_bias": Case("LlamaForCausalLM", {**LLAMA, "mlp_bias": True}),
    "llama_multi_query": Case("LlamaForCausalLM", {**LLAMA, "num_key_value_heads": 1}),
    "qwen2_window": Case("Qwen2ForCausalLM", {**LLAMA, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}),
    "yarn_betas": Case(
        "LlamaForCausalLM",
        {
            **CASES["rope_yarn"].fields,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 4.0,
                "beta_slow": 0.5,
                "attention_factor": 1.3,
            },
        },
    ),
    "bert_relu_types": Case("BertForMaskedLM", {**BERT, "hidden_act": "relu", "type_vocab_size": 5}),
    # As transformers 5 makes a model of the v1.1 kind from nothing: tied, and yet not scaled.
    "t5_tied_unscaled": Case("T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mt5": Case("MT5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu"}),
}


def enlarge(case: Case, seed: int) -> Case:
    """The case with more of everything."""
    family = next(name for name in LARGER if case.model.startswith(name))
    fields = {**case.fields, **LARGER[family], "vocab_size": VOCAB}
    if not family:
        heads = 8 if "rope_parameters" not in fields else 4
        fields |= {"num_attention_heads": heads, "num_key_value_heads": min(fields["num_key_value_heads"], heads // 2)}
        if fields["max_position_embeddings"] == LLAMA["max_position_embeddings"]:
            fields["max_position_embeddings"] = 96
    tokens = (20, 20) if fields.get("max_position_embeddings") == 10 else (61, 40, 3)
    return dataclasses.replace(case, fields=fields, tokens=tokens, target_tokens=(45, 19, 1), seed=seed)


def read(case: Case, model: Any, path: Path) -> tuple[str, ConfigDict, Params]:
    """What transformers writes, read by us."""
    model.save_pretrained(path)
    make_golden.write_config(case, path)
    found = directory.read(path)
    return found.architecture, found.config, weights.load(found).params


def run(config: ConfigDict) -> Callable[[Params, dict[str, np.ndarray]], tuple[jax.Array, jax.Array, Params]]:
    """(params, batch) -> logits, mean loss and its gradients; compiled once for all seeds."""
    model = models.build(config)
    ours = objective.make(model, config)

    def loss(params: Params, batch: dict[str, Any]) -> jax.Array:
        mean, _ = ours(params, batch, None)
        return mean.total / mean.weight

    def everything(params: Params, batch: dict[str, Any]) -> tuple[jax.Array, jax.Array, Params]:
        rest = {name: array for name, array in batch.items() if name not in objective.LOSS_ARRAYS}
        logits = model.apply(params, batch["tokens"], **rest)
        if config.model.head == "none":
            return logits, None, None
        return logits, *jax.value_and_grad(loss)(params, batch)

    return jax.jit(everything, compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in {**CASES, **MORE}.items()])
def test_transformers(case: Case, tmp_path: Path) -> None:
    """Every seed has weights and rows of its own."""
    compiled = None
    for seed in SEEDS:
        larger = enlarge(case, seed)
        model, given = make_golden.make_model(larger), make_golden.make_inputs(larger)
        expected = {name: value.numpy() for name, value in make_golden.expect(model, given).items()}
        architecture, config, params = read(larger, model, tmp_path / str(seed))
        batch = hf_batch.from_arguments(architecture, {name: value.numpy().astype(np.int32) for name, value in given.items()})
        compiled = compiled or run(config)
        logits, loss, gradients = compiled(params, batch)
        assert hf_batch.error(batch, np.asarray(logits), expected.get("logits", expected.get("hidden"))) < LOGITS
        if loss is not None:
            assert abs(loss - expected["loss"]) < 1e-6 * expected["loss"]
            theirs = {name.removeprefix("gradient/"): value for name, value in expected.items() if name.startswith("gradient/")}
            exported = weights.export(gradients, architecture, models.build(config).config)
            found = {name: exported.make(name) for name in exported.shapes}
            if found.keys() - theirs.keys() == {"lm_head.weight"}:
                # One tensor for them, which is two here: t5_tied_unscaled, mt5.
                found["shared.weight"] = found["shared.weight"] + found.pop("lm_head.weight")
            hf_batch.check_gradients(found, theirs, GRADIENT)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "qwen2", "bert_mlm", "t5", "t5_v1_1"])
def test_bfloat16(name: str, tmp_path: Path) -> None:
    """Computed in bfloat16, ours is about as far from the float32 logits as theirs, whose weights are bfloat16, too."""
    ours, theirs = [], []
    for seed in SEEDS:
        case = enlarge(CASES[name], seed)
        model, given = make_golden.make_model(case), make_golden.make_inputs(case)
        with torch.no_grad():
            exact = model(**given).logits.numpy()
            architecture, config, params = read(case, model, tmp_path / str(seed))
            rounded = model.to(torch.bfloat16)(**given).logits.float().numpy()
        config.precision.compute = "bfloat16"
        batch = hf_batch.from_arguments(architecture, {name: value.numpy().astype(np.int32) for name, value in given.items()})
        ours.append(hf_batch.error(batch, np.asarray(run(config)(params, batch)[0]), exact))
        theirs.append(hf_batch.error(batch, rounded, exact))
    assert 0.2 * np.mean(theirs) < np.mean(ours) < 1.5 * np.mean(theirs)


@pytest.mark.parametrize("seed", SEEDS)
def test_torch_layers(seed: int) -> None:
    """The Transformer of 2017 against the layers of torch.nn."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"vocab": VOCAB, "width": 48, "heads": 6, "mlp": 100, "layers": 3}
    other = torch_layers.Transformer(**sizes)
    make_golden.fill(other, generator)
    inputs, mask = make_golden.draw((50, 21, 2), generator, VOCAB)
    labels, valid = make_golden.draw((33, 40, 1), generator, VOCAB)
    labels = torch.where(valid == 1, labels, hf_batch.IGNORED)
    given = {"input_ids": inputs, "attention_mask": mask, "labels": labels}
    batch = hf_batch.from_arguments("T5ForConditionalGeneration", {name: value.numpy() for name, value in given.items()})
    expected, expected_loss = other(inputs, mask, torch.tensor(batch["tokens"]), labels)
    expected_loss.backward()
    config = configs.base()
    config.model.update({"name": "transformer", "vocab_size": VOCAB, "width": 48, "heads": 6, "mlp_width": 100, "layers": 3})
    config.train.label_smoothing = 0.1
    template = jax.eval_shape(models.build(config).init, jax.random.key(0))

    def name(path: Any) -> str:
        return jax.tree_util.keystr(path, simple=True, separator="/")

    tensors = torch_layers.rename({name: weight.detach() for name, weight in other.named_parameters()}, sizes["heads"])
    params = jax.tree.map_with_path(lambda path, _: tensors[name(path)].numpy(), template)
    logits, loss, gradients = run(config)(params, batch)
    assert hf_batch.error(batch, np.asarray(logits), expected.detach().numpy()) < LOGITS
    assert abs(loss - expected_loss.item()) < 1e-6 * loss
    theirs = torch_layers.rename({name: weight.grad for name, weight in other.named_parameters()}, sizes["heads"])
    found = {name(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(gradients)}
    hf_batch.check_gradients(found, {name: value.numpy() for name, value in theirs.items()}, GRADIENT)
