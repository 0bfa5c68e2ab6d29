"""Text that a model writes behind a prompt.

A prompt is encoded as training documents are: bos first, if the tokenizer has one, then the text. Generation stops at eos.
"""

from collections.abc import Iterable, Iterator, Sequence

from jaxllm.decode import generate
from jaxllm.ops import sampling
from jaxllm.types import Model, Params, Tokenizer

CHUNK_TOKENS = 4
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


def check_prompts(model: Model, tokenizer: Tokenizer, prompts: Sequence[str]) -> None:
    """ValueError for a prompt that `complete` would refuse, to be told before a long training and not at its first samples."""
    generate.check_prompts(model, [[*_bos(tokenizer), *tokenizer.encode(prompt)] for prompt in prompts])


def complete(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    settings: sampling.Settings,
    *,
    max_new_tokens: int,
    seed: int,
) -> list[str]:
    """The continuation of each prompt, without the prompt."""
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    found = generate.generate(
        model,
        params,
        [[*_bos(tokenizer), *ids] for ids in encoded],
        settings,
        max_new_tokens=max_new_tokens,
        stop_ids=_eos(tokenizer),
        vocab_size=tokenizer.vocab_size,
        seed=seed,
    )
    return [Detokenizer(tokenizer, ids).text(new) for ids, new in zip(encoded, found, strict=True)]


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
    """Pieces of the continuation as soon as they are final; joined they are what `complete` gives. Bad requests fail at once."""
    ids = tokenizer.encode(prompt)
    growing = generate.stream(
        model,
        params,
        [*_bos(tokenizer), *ids],
        settings,
        max_new_tokens=max_new_tokens,
        stop_ids=_eos(tokenizer),
        vocab_size=tokenizer.vocab_size,
        seed=seed,
        chunk_tokens=CHUNK_TOKENS,
    )
    return _pieces(Detokenizer(tokenizer, ids), growing)


def _pieces(detokenizer: Detokenizer, growing: Iterable[list[int]]) -> Iterator[str]:
    sent, new = 0, []
    for new in growing:
        settled = detokenizer.settled(new)
        if len(settled) > sent:
            yield settled[sent:]
            sent = len(settled)
    if rest := detokenizer.text(new)[sent:]:
        yield rest


def _bos(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.bos_id is None else [tokenizer.bos_id]


def _eos(tokenizer: Tokenizer) -> tuple[int, ...]:
    return () if tokenizer.eos_id is None else (tokenizer.eos_id,)
