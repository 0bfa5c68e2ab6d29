"""The samples of a training run: what the model makes of `sample.prompts` so far, whatever its objective."""

from collections.abc import Callable
from typing import NamedTuple

from ml_collections import ConfigDict

from jaxllm import models
from jaxllm.decode import masks, text
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
        return (_make_filler if model.decode is None else _make_writer)(config, model, tokenizer, say)
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


def _make_filler(config: ConfigDict, model: Model, tokenizer: Tokenizer, say: Callable[[str], None]) -> Sampler | None:
    prompts = tuple(prompt for prompt in config.sample.prompts if masks.has_mask(tokenizer, prompt))
    if left_out := len(config.sample.prompts) - len(prompts):
        say(f"samples: {left_out} of sample.prompts left out, as there is no [MASK] in it for this model to fill")
    masks.check_texts(model, tokenizer, prompts)

    def generate(params: Params, step: int) -> list[str]:
        del step
        return [f"{text.ARROW}{filled}" for filled in masks.complete(model, params, tokenizer, prompts)]

    return Sampler(prompts, generate) if prompts else None
