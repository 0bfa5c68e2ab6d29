"""A real BERT, all-MiniLM-L6-v2 (6 layers, width 384), from its own directory: ids and hidden states as transformers has them.

`make parity` fetches the directory and sets JAXLLM_MINILM.
"""

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers

from jaxllm import runs
from jaxllm.decode import masks

DIRECTORY = Path(os.environ.get("JAXLLM_MINILM", "set JAXLLM_MINILM to the directory of the model"))
TEXTS = [
    "The capital of France is Paris, and 1234567 people don't live there.",
    "Straße, café, naïve, Ångström; 東京 and 日本語 🙂",
    "  two  spaces,\ttabs\r\n\n\nlines, a zero\u200bwidth space and a soft\u00adhyphen",
    "[MASK] [CLS] as text, and supercalifragilisticexpialidocious",
]


@pytest.fixture(scope="module")
def run() -> runs.Run:
    return runs.load(DIRECTORY)


@pytest.fixture(scope="module")
def their_tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(DIRECTORY)


@pytest.mark.parametrize("text", TEXTS)
def test_ids(run: runs.Run, their_tokenizer: Any, text: str) -> None:
    """Text only: transformers takes what spells a special token for that token unless it is told not to."""
    found = [run.tokenizer.bos_id, *run.tokenizer.encode(text), run.tokenizer.eos_id]
    assert found == their_tokenizer(text, split_special_tokens=True)["input_ids"]


def test_hidden_states_of_a_padded_batch(run: runs.Run, their_tokenizer: Any) -> None:
    """Differences of float32: hidden states go up to 6, and 6 layers add their roundings."""
    batch = their_tokenizer(TEXTS, padding=True, return_tensors="pt")
    model = transformers.AutoModel.from_pretrained(DIRECTORY).eval()
    with torch.no_grad():
        expected_BTD = model(**batch).last_hidden_state.numpy()
    tokens_BT, segments_BT = (batch[name].numpy().astype(np.int32) for name in ("input_ids", "attention_mask"))
    found_BTD = np.asarray(jax.jit(run.model.apply)(run.params, tokens_BT, segments=segments_BT))
    real_BT = segments_BT > 0
    assert not real_BT.all()
    largest = float(np.abs(found_BTD - expected_BTD)[real_BT].max())
    print(f"largest value {np.abs(expected_BTD).max():.2f}, largest difference {largest:.2e}")
    assert largest <= 1e-5


def test_it_fills_no_masks(run: runs.Run) -> None:
    with pytest.raises(ValueError, match=r"no head for tokens \(model.head = 'none'\)"):
        masks.check(run.model, run.tokenizer)
