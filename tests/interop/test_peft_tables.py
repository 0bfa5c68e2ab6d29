"""Adapters of tables and heads that are not read or written, each with what is wrong, what would be right and what to do."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapted_models import adapted
from test_peft_files import GOLDEN
from test_peft_refusals import attach, edited

from jaxllm.interop import peft, peft_average, peft_params


@pytest.mark.parametrize(
    ("case", "module", "ids", "words"),
    [
        (
            "llama_lora",
            "model.embed_tokens",
            [1, 40],
            r"replaces the rows of tokens up to 40, and the base has one of \[32, 16\].\n  Acc",
        ),
        (
            "llama_lora",
            "model.embed",
            [1, 2],
            r"replaces the rows of tokens up to 2, and the base has no such table.\n  Accepted: rows",
        ),
        (
            "bert_mlm_lora",
            "bert.embeddings.word_embeddings",
            [1, 2],
            r"leaves out the bias at the output[\s\S]*\n  Accepted: modules_to",
        ),
        ("t5_v1_1_rslora", "shared", [1, 2], r"writes the embedding's rows into a head of its own with transformers 5"),
        (
            "llama_lora",
            "model.embed_tokens",
            [1],
            r"trainable_token_indices = \[1\].\n  Accepted: an id for each row of .* \[2, 16\]",
        ),
        (
            "llama_lora",
            "model.embed_tokens",
            {"lm_head": [1, 2]},
            r"trainable_token_indices = {'lm_head'.*\n  Accepted: an id for each",
        ),
        ("llama_lora", "", [1, 2], r"trainable_token_indices = \[1, 2\].\n  Accepted: tokens whose rows are in adapter_model"),
    ],
)
def test_rows_of_tokens(case: str, module: str, ids: Any, words: str, tmp_path: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if name.endswith(("embed_tokens.weight", "lm_head.weight"))]:
            del tensors[name]
        if module:
            tensors[f"base_model.model.{module}.token_adapter.trainable_tokens_delta"] = np.ones((2, 16), np.float32)

    with pytest.raises(ValueError, match=words):
        attach(edited(tmp_path, case, change, trainable_token_indices=ids, modules_to_save=None), case)


@pytest.mark.parametrize("module", ["bert.embeddings.word_embeddings", "cls.predictions.decoder"])
def test_a_product_apart_from_what_bert_ties_to_it(module: str, tmp_path: Path) -> None:
    """As PEFT leaves the other one what it was; a BERT with a head of its own there is not."""
    sizes = {"A": (2, 32), "B": (16, 2)} if "word" in module else {"A": (2, 16), "B": (32, 2)}
    part = ".lora_embedding_{}" if "word" in module else ".lora_{}.weight"

    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors.update({f"base_model.model.{module}{part.format(x)}": np.ones(sizes[x], np.float32) for x in "AB"})

    with pytest.raises(
        ValueError, match=rf"tied to it, {module} are stored, and not all alike.\n  Accepted: with model.name = 'bert'"
    ):
        attach(edited(tmp_path, "bert_mlm_lora", change), "bert_mlm_lora")


def test_no_dora_of_a_tied_table_for_peft() -> None:
    _, model, params, _ = adapted("llama tied", "dora", "embed/tokens")
    with pytest.raises(
        ValueError, match=r"a DoRA of embed/tokens, which is the output head as well[\s\S]*Accepted: LoRA of a tied table"
    ):
        peft_params.export(params, model.config)


def test_no_average_of_rows_of_tokens() -> None:
    one = peft.read(GOLDEN / "peft" / "qwen2_tokens")
    with pytest.raises(ValueError, match=r"rows of single tokens \(trainable_token_indices\), which are not averaged.\n  Accepted"):
        peft_average.average((one, one), (0.5, 0.5))
