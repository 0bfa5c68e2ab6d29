"""Reward models and transformers' classes with one label: an export gives our rewards there, padded as its tokenizer pads, and back."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers

from jaxllm import config as schema
from jaxllm import models
from jaxllm.data import tokenize
from jaxllm.decode.reward_model import RewardModel
from jaxllm.interop import directory, weights

SIZES = {"layers": 2, "width": 16, "heads": 4, "context_tokens": 96, "head": "classify", "classes": 1, "init_std": 0.3}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2ForSequenceClassification", {"name": "gpt"}),
    "llama": ("LlamaForSequenceClassification", {"name": "llama", "kv_heads": 2}),
    "qwen2": ("Qwen2ForSequenceClassification", {"name": "llama", "bias": "qkv"}),
    "bert": ("BertForSequenceClassification", {"name": "bert"}),
}
CONVERSATIONS = [
    [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": said}] for said in ("Hello!", "No. " * 5, "")
]


def ours(fields: dict[str, Any], padding: str) -> tuple[Any, Any, Any]:
    """(model, params, tokenizer), whose pad token is a token apart, or the one that ends an answer."""
    config = schema.base()
    config.model.update(SIZES | fields)
    config.chat.template, config.tokenizer.kind, config.train.objective = "chatml", "byte", "reward"
    tokenizer: Any = tokenize.make(config, list)
    if padding != "apart":
        tokenizer.pad_id = tokenizer.special_tokens["<|im_end|>"]
    config.model.vocab_size = tokenizer.vocab_size
    model = models.build(config)
    return model, model.init(jax.random.key(3)), tokenizer


# An encoder reads at the first token, whatever is padding.
CASES = [(case, padding) for case in MODELS for padding in ("apart", "the end") if (case, padding) != ("bert", "the end")]


@pytest.mark.parametrize(("case", "padding"), CASES)
def test_transformers_gives_our_rewards(case: str, padding: str, tmp_path: Path) -> None:
    architecture, fields = MODELS[case]
    model, params, tokenizer = ours(fields, padding)
    expected = RewardModel(model, params, tokenizer).score(CONVERSATIONS)
    assert np.ptp(expected) > 0.05
    written = directory.write(tmp_path, params, model.config, tokenizer, {})
    assert any("is the pad token" in note for note in written.notes) == (padding == "the end")
    loaded = getattr(transformers, architecture).from_pretrained(tmp_path)
    assert loaded.config.num_labels == 1
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    # What the template writes behind the end of the answer is no part of it.
    texts = [their_tokenizer.apply_chat_template(each, tokenize=False).rstrip("\n") for each in CONVERSATIONS]
    for side in ("right", "left"):
        inputs = their_tokenizer(texts, return_tensors="pt", padding=True, padding_side=side, add_special_tokens=False)
        if side == "left" and case in ("gpt2", "bert"):
            continue  # GPT-2 counts positions from the first padding, BERT reads there
        with torch.no_grad():
            found = loaded.eval()(**{name: inputs[name] for name in ("input_ids", "attention_mask")}).logits[:, 0].numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    loaded.save_pretrained(tmp_path / "again")
    imported = directory.read(tmp_path / "again")
    assert imported.config.model.classes == 1 and imported.config.train.objective == "reward"
    again = RewardModel(models.build(imported.config), weights.load(imported).params, tokenizer)
    np.testing.assert_allclose(again.score(CONVERSATIONS), expected, rtol=0, atol=1e-6)
