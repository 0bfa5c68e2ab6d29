"""The samples of a training run: what the model makes of `sample.prompts` so far, whatever its objective."""

from collections.abc import Callable
from typing import NamedTuple

from ml_collections import ConfigDict

from jaxllm import models
from jaxllm.consistency import ANSWERING, rows_of
from jaxllm.data.chat import encoding
from jaxllm.decode import generate as generation
from jaxllm.decode import masks, network, text
from jaxllm.ops import sampling
from jaxllm.types import Model, Params, Tokenizer, Unconstrained


class Sampler(NamedTuple):
    """generate(params, step) -> what is shown behind each of `prompts`: its continuation, or an arrow and what the model makes of it."""

    prompts: tuple[str, ...]
    generate: Callable[[Params, int], list[str]]


def make(config: ConfigDict, tokenizer: Tokenizer, say: Callable[[str], None]) -> Sampler | None:
    """None if there is nothing to sample: a model of classes, no prompts, or none with a mask for a model that fills masks.

    model.vocab_size must be filled in. ValueError for a prompt that cannot be used, so that it is told before a long training.
    """
    sample = config.sample
    if not sample.tokens or not sample.prompts or config.model.head != "lm":
        return None
    # Without the plan's layout of activations: a few prompts do not divide over the mesh, so the compiler follows the weights.
    model = models.build(config, Unconstrained("the compiler alone decides where the arrays of a sample lie"))
    try:
        answers = rows_of(config) in ANSWERING
        make_sampler = _make_filler if model.decode is None else _make_talker if answers else _make_writer
        return make_sampler(config, model, tokenizer, say)
    except ValueError as error:
        raise ValueError(f"sample.prompts: {error}") from error


def _make_writer(config: ConfigDict, model: Model, tokenizer: Tokenizer, say: Callable[[str], None]) -> Sampler:
    del say
    sample = config.sample
    text.check_prompts(model, tokenizer, sample.prompts)
    settings = sampling.Settings(temperature=sample.temperature)

    def generate(params: Params, step: int) -> list[str]:
        seed = (config.seed + step) % 2**32
        written = text.complete(model, params, tokenizer, sample.prompts, settings, max_new_tokens=sample.tokens, seed=seed)
        return [text.join(model, each) for each in written]

    return Sampler(tuple(sample.prompts), generate)


def _make_talker(config: ConfigDict, model: Model, tokenizer: Tokenizer, say: Callable[[str], None]) -> Sampler:
    """Each prompt is a message of the user, and what is shown is the answer."""
    del say
    sample = config.sample
    prompts_ids = [encoding.encode(tokenizer, [{"role": "user", "content": prompt}]) for prompt in sample.prompts]
    network.check_prompts(model, prompts_ids)
    settings = sampling.Settings(temperature=sample.temperature)
    options = {"max_new_tokens": sample.tokens, "stop_ids": encoding.answer_stop_ids(tokenizer), "vocab_size": tokenizer.vocab_size}

    def generate(params: Params, step: int) -> list[str]:
        seed = (config.seed + step) % 2**32
        written = generation.generate(model, params, prompts_ids, settings, seed=seed, **options)
        answers = (text.Detokenizer(tokenizer, ids).text(new) for ids, new in zip(prompts_ids, written, strict=True))
        return [f"{text.ARROW}{answer}" for answer in answers]

    return Sampler(tuple(sample.prompts), generate)


def _make_filler(config: ConfigDict, model: Model, tokenizer: Tokenizer, say: Callable[[str], None]) -> Sampler | None:
    prompts = tuple(prompt for prompt in config.sample.prompts if masks.has_mask(tokenizer, prompt))
    if left_out := len(config.sample.prompts) - len(prompts):
        say(f"samples: {left_out} of sample.prompts left out, as there is no [MASK] in it for this model to fill")
    masks.check_texts(model, tokenizer, prompts)

    def generate(params: Params, step: int) -> list[str]:
        del step
        return [f"{text.ARROW}{filled}" for filled in masks.complete(model, params, tokenizer, prompts)]

    return Sampler(prompts, generate) if prompts else None
