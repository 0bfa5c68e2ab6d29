"""Text that a model writes behind a prompt, or, with an encoder, for it.

A prompt is encoded as the training data was. Of a decoder: bos first, if the tokenizer has one, then the text. Of an encoder-decoder:
the text, then eos; `<extra_id_0>` in it is a sentinel if the tokenizer has any. Generation stops at eos, and at what else the
model's files say ends a text.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from jaxllm.data import tokenize
from jaxllm.decode import beam, generate, marks, network
from jaxllm.ops import sampling
from jaxllm.types import Model, Params, Tokenizer

CHUNK_TOKENS = 4
# Between a prompt and what is no continuation of it.
ARROW = " -> "
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Turns the ids behind a prompt into text.

    Decoded together with the prompt, since what an id spells may depend on what stands before it: SentencePiece drops the
    space of the very first piece only.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]):
        self._tokenizer, self._prompt_ids = tokenizer, list(prompt_ids)
        self._start = len(tokenizer.decode(self._prompt_ids))

    def text(self, ids: Sequence[int]) -> str:
        """What `ids` spell. The bytes of a character that never got complete show as U+FFFD."""
        return self._tokenizer.decode([*self._prompt_ids, *ids])[self._start :]

    def settled(self, ids: Sequence[int]) -> str:
        """As `text`, without what further ids may still change: a last character whose bytes are not all there."""
        return self.text(ids).rstrip(REPLACEMENT)


class Prompt(NamedTuple):
    """ids: what the model reads. before: ids of the text that the new ids go on from."""

    ids: list[int]
    before: list[int]


def encode(model: Model, tokenizer: Tokenizer, prompt: str) -> Prompt:
    """The prompt as the model read texts in training."""
    if model.encode is not None:
        return Prompt([*marks.encode(tokenizer, prompt, marks.sentinels(tokenizer, prompt)), *_eos(tokenizer)], [])
    before = tokenizer.encode(prompt)
    return Prompt([*_bos(tokenizer), *before], before)


def join(model: Model, written: str) -> str:
    """What is shown behind the prompt: a continuation as it is, the output of an encoder-decoder behind an arrow."""
    return written if model.encode is None else f"{ARROW}{written}"


def check_prompts(model: Model, tokenizer: Tokenizer, prompts: Sequence[str]) -> None:
    """ValueError for a prompt that `complete` would refuse, to be told before a long training and not at its first samples."""
    network.check_prompts(model, [encode(model, tokenizer, prompt).ids for prompt in prompts])


def complete(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    settings: sampling.Settings | beam.Settings,
    *,
    max_new_tokens: int,
    seed: int,
) -> list[str]:
    """What the model writes for each prompt, which is not repeated. Beam search draws nothing, so that the seed does not matter."""
    encoded = [encode(model, tokenizer, prompt) for prompt in prompts]
    ids, options = [prompt.ids for prompt in encoded], _options(model, tokenizer) | {"max_new_tokens": max_new_tokens}
    if isinstance(settings, beam.Settings):
        found = [best.ids for best in beam.search(model, params, ids, settings, **options)]
    else:
        found = generate.generate(model, params, ids, settings, seed=seed, **options)
    return [Detokenizer(tokenizer, prompt.before).text(new) for prompt, new in zip(encoded, found, strict=True)]


def stream(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    prompt: str,
    settings: sampling.Settings,
    *,
    max_new_tokens: int,
    seed: int,
) -> Iterator[str]:
    """Pieces of the text as soon as they are final; joined they are what `complete` gives. Bad requests fail at once."""
    encoded, options = encode(model, tokenizer, prompt), _options(model, tokenizer)
    growing = generate.stream(
        model, params, encoded.ids, settings, max_new_tokens=max_new_tokens, seed=seed, chunk_tokens=CHUNK_TOKENS, **options
    )
    return pieces(Detokenizer(tokenizer, encoded.before), growing)


def pieces(detokenizer: Detokenizer, growing: Iterable[list[int]]) -> Iterator[str]:
    sent, new = 0, []
    for new in growing:
        settled = detokenizer.settled(new)
        if len(settled) > sent:
            yield settled[sent:]
            sent = len(settled)
    if rest := detokenizer.text(new)[sent:]:
        yield rest


def _options(model: Model, tokenizer: Tokenizer) -> dict[str, Any]:
    """What generation has to know of the tokenizer."""
    start_id = None if model.encode is None else tokenize.start_id(tokenizer)
    return {"stop_ids": tokenize.stop_ids(tokenizer), "vocab_size": tokenizer.vocab_size, "start_id": start_id}


def _bos(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.bos_id is None else [tokenizer.bos_id]


def _eos(tokenizer: Tokenizer) -> tuple[int, ...]:
    return () if tokenizer.eos_id is None else (tokenizer.eos_id,)
