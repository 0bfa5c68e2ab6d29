"""The package in a notebook.

model, params, tokenizer = jaxllm.load("runs/quickstart")                 # jaxllm.load("adapter", base="runs/quickstart")
logits = model.apply(params, inputs)                                      # int32 [B, T] -> float32 [B, T, V]
text = jaxllm.generate(model, params, tokenizer, "The ", temperature=0.8)
answer = jaxllm.chat(model, params, tokenizer, "Who are you?")            # of a model with a chat template
guesses = jaxllm.fill_mask(model, params, tokenizer, "The [MASK] sat.")   # of a model of masked text
rewards = jaxllm.reward(model, params, tokenizer, "Who are you?", ["A model.", "Guess."])   # of a reward model
labels = jaxllm.classify(model, params, tokenizer, "Good, but long.")     # of a model with a head for classes
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxllm import models, runs
from jaxllm.data.chat import encoding
from jaxllm.data.documents import Message
from jaxllm.decode import beam, masks, text
from jaxllm.decode import chat as conversations
from jaxllm.decode import classes as labels
from jaxllm.decode.reward_model import RewardModel
from jaxllm.ops import sampling
from jaxllm.parallel.plan import Plan
from jaxllm.types import Model, Params, Tokenizer, Unconstrained


def load(
    directory: str | Path, step: int | None = None, *, base: str | Path = "", cache: str = ""
) -> tuple[Model, Params, Tokenizer]:
    """(model, params, tokenizer) of a run directory, at checkpoint `step` (None: the newest); of a directory of transformers with
    config.json and safetensors; of a GGUF file; or of an adapter of PEFT beside its base, which is any of these.

    base: of an adapter, the path of that model; "" is the one that the adapter names. cache: of the keys and values that are kept while
    text is written, "int8", or "compute" for the dtype of the computation; "" is what the run's config says.

    The averaged weights if the run keeps them. On one device, whatever mesh the run was trained on. On a CPU the model computes in
    float32 with unrolled layers, whatever the run did, because that decodes faster. `model.apply` is compiled for each new shape.
    """
    run = runs.load(directory, step, base=base, for_decoding=True, cache=cache)
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
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
) -> str | list[str]:
    """What the model writes behind the prompt, which is not repeated: a text, or a list of texts for a list of prompts.

    Up to `max_new_tokens` tokens, fewer at the end of a document or of the context. `temperature` 0 is greedy; the other
    settings are explained in `ops.sampling.Settings`. The same seed gives the same text, whatever other prompts are in the
    list; equal prompts get different texts. With `num_beams` above 1 nothing is drawn, but the likeliest text is searched
    for, as `decode.beam.Settings` says. The first call compiles, later ones with similar sizes do not.
    """
    drawn = sampling.Settings(temperature, top_k, top_p, min_p, repetition_penalty)
    settings = drawn if num_beams == 1 else beam.Settings(num_beams, length_penalty, early_stopping)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    texts = text.complete(model, params, tokenizer, prompts, settings, max_new_tokens=max_new_tokens, seed=seed)
    return texts[0] if isinstance(prompt, str) else texts


def chat(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    messages: str | Sequence[Message],
    max_new_tokens: int = 512,
    seed: int = 0,
    *,
    temperature: float = 0.7,
    top_k: int = 0,
    top_p: float = 0.95,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> str:
    """The model's answer to a conversation: a list of {"role": "system", "user" or "assistant", "content": text}, or one question.

    For a model whose tokenizer has a chat template; ValueError for another one, for a conversation that the template refuses or that
    spells a special token, and for one that leaves no room for an answer in the context.
    """
    asked = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    prompt_ids = encoding.encode(tokenizer, asked)
    settings = sampling.Settings(temperature, top_k, top_p, min_p, repetition_penalty)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": seed}
    return "".join(conversations.stream(model, params, tokenizer, prompt_ids, settings, **options)).rstrip()


def fill_mask(
    model: Model, params: Params, tokenizer: Tokenizer, text: str | list[str], top_k: int = 5
) -> list[list[masks.Guess]] | list[list[list[masks.Guess]]]:
    """For each mask of the text its `top_k` likeliest tokens, as (text, id, probability); of a list of texts a list of such lists.

    A mask is written [MASK], <mask>, or as the tokenizer spells it. For a model that was trained on masked text (bert).
    """
    found = masks.fill(model, params, tokenizer, [text] if isinstance(text, str) else text, top_k)
    return found[0] if isinstance(text, str) else found


def classify(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    text: str | list[str],
    pairs: str | list[str] | None = None,
    *,
    classes: Sequence[str] = (),
    top_k: int = 5,
) -> list[labels.Label] | list[labels.Word] | list[list[labels.Label]] | list[list[labels.Word]]:
    """The classes of a text, or of a text and its pair, as (name, id, probability), likeliest first; with a head 'tag' each word of the
    text as (text, classes). Of a list of texts, with a list of pairs or none, a list of such lists. At most `top_k` classes each.

    `classes` are their names by number. A model does not know them: those of a run are `jaxllm.runs.load(DIR).classes`. Without them a
    class's name is its number. What is longer than the context is cut as in training, and a line says so; a word that the model did not
    read has no classes. A run with `data.row_tokens` cut there already, which only the command does as well.
    """
    texts = [text] if isinstance(text, str) else list(text)
    seconds = [pairs] if isinstance(pairs, str) else pairs
    found: list[list[labels.Label]] | list[list[labels.Word]]
    if model.config.head == "tag" and seconds is None:
        found = labels.of_words(model, params, tokenizer, texts, names=classes, top_k=top_k)
    else:
        found = labels.of_texts(model, params, tokenizer, texts, seconds, names=classes, top_k=top_k)
    return found[0] if isinstance(text, str) else found


def reward(
    model: Model, params: Params, tokenizer: Tokenizer, prompt: str | Sequence[Message], answers: str | Sequence[str]
) -> np.ndarray:
    """float32, what a reward model thinks of the answer to the prompt, a question or a conversation; of a list of answers a number each.

    Only differences mean something: 1 / (1 + exp(r2 - r1)) is the probability that the first of two answers is the better one. ValueError
    for a model that gives no reward, and for an answer that does not fit into the context behind its prompt. For many prompts at once, and
    on several devices, see `reward_model`.
    """
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    each = [answers] if isinstance(answers, str) else list(answers)
    scorer = RewardModel(model, params, tokenizer)
    found = scorer([""] * len(each), each, {"messages": [asked] * len(each)})
    return found[0] if isinstance(answers, str) else found


def reward_model(directory: str | Path, step: int | None = None, *, base: str | Path = "", plan: Plan | None = None) -> RewardModel:
    """The reward model of a run, or of what else `load` opens, for many answers: reward_model(DIR)(prompts, answers) -> float32 [N].

    plan: a mesh, each of whose devices then holds a copy of the parameters and scores a part of the rows.
    """
    run = runs.load(directory, step, base=base, for_decoding=True)
    if plan is None:
        return RewardModel(run.model, run.params, run.tokenizer)
    model = models.build(run.config, Unconstrained("the compiler alone decides where the arrays of rewards lie"))
    return RewardModel(model, jax.device_put(jax.device_get(run.params), plan.replicated), run.tokenizer, plan)
