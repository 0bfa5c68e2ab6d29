"""The package in a notebook.

model, params, tokenizer = jaxllm.load("runs/quickstart")
logits = model.apply(params, inputs)                                      # int32 [B, T] -> float32 [B, T, V]
text = jaxllm.generate(model, params, tokenizer, "The ", temperature=0.8)
"""

import dataclasses
from pathlib import Path

import jax

from jaxllm import runs
from jaxllm.decode import text
from jaxllm.ops import sampling
from jaxllm.types import Model, Params, Tokenizer


def load(directory: str | Path, step: int | None = None) -> tuple[Model, Params, Tokenizer]:
    """(model, params, tokenizer) of a run directory, at checkpoint `step` (None: the newest).

    The averaged weights if the run keeps them. On one device, whatever mesh the run was trained on. On a CPU the model computes in
    float32 with unrolled layers, whatever the run did, because that decodes faster. `model.apply` is compiled for each new shape.
    """
    run = runs.load(directory, step, for_decoding=True)
    return dataclasses.replace(run.model, apply=jax.jit(run.model.apply)), run.params, run.tokenizer


def generate(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    prompt: str | list[str],
    max_new_tokens: int = 128,
    seed: int = 0,
    *,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> str | list[str]:
    """What the model writes behind the prompt, which is not repeated: a text, or a list of texts for a list of prompts.

    Up to `max_new_tokens` tokens, fewer at the end of a document or of the context. `temperature` 0 is greedy; the other
    settings are explained in `ops.sampling.Settings`. The same seed gives the same text, whatever other prompts are in the
    list; equal prompts get different texts. The first call compiles, later ones with similar sizes do not.
    """
    settings = sampling.Settings(temperature, top_k, top_p, min_p, repetition_penalty)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    texts = text.complete(model, params, tokenizer, prompts, settings, max_new_tokens=max_new_tokens, seed=seed)
    return texts[0] if isinstance(prompt, str) else texts
