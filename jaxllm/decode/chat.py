"""Answers of a model: the prompt that fits its context, and the answer piece by piece. data/chat/ makes ids of conversations."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxllm.data.chat import encoding
from jaxllm.data.documents import Message
from jaxllm.decode import generate, text
from jaxllm.decode.kept import Kept
from jaxllm.ops import sampling
from jaxllm.types import Model, Params, Tokenizer


class Prompt(NamedTuple):
    """ids of a conversation and how many of its oldest messages they leave out."""

    ids: list[int]
    dropped: int


def fit(tokenizer: Tokenizer, messages: Sequence[Message], context_tokens: int, answer_tokens: int) -> Prompt:
    """The prompt, without as many of the oldest messages as must go so that an answer fits into the context behind it.

    A system message at the beginning stays, and what follows it begins with a user's message. If the last message alone leaves
    less room than `answer_tokens` that is given, as long as there is any; else ValueError.
    """
    head = list(messages[:1]) if messages and messages[0]["role"] == "system" else []
    rest, dropped = list(messages[len(head) :]), 0
    while True:
        ids = encoding.encode(tokenizer, [*head, *rest])
        later = next((index for index in range(1, len(rest)) if rest[index]["role"] == "user"), None)
        if len(ids) + answer_tokens <= context_tokens or later is None:
            break
        rest, dropped = rest[later:], dropped + later
    if len(ids) >= context_tokens:
        raise ValueError(
            f"the last message and what goes with it are {len(ids)} tokens.\n  Accepted: up to {context_tokens - 1}, as the context of"
            f" the model is {context_tokens}.\n  Shorten the message."
        )
    return Prompt(ids, dropped)


def stream(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    settings: sampling.Settings,
    *,
    max_new_tokens: int,
    seed: int,
    kept: Kept | None = None,
) -> Iterator[str]:
    """Pieces of the answer as soon as they are final, without space at its beginning. Bad requests fail at once.

    kept: of the conversation so far, whose beginning then is not read again.
    """
    growing = generate.stream(
        model,
        params,
        prompt_ids,
        settings,
        max_new_tokens=max_new_tokens,
        stop_ids=encoding.answer_stop_ids(tokenizer),
        vocab_size=tokenizer.vocab_size,
        seed=seed,
        chunk_tokens=text.CHUNK_TOKENS,
        kept=kept,
    )
    return _begun(text.pieces(text.Detokenizer(tokenizer, prompt_ids), growing))


def _begun(pieces: Iterator[str]) -> Iterator[str]:
    begun = False
    for piece in pieces:
        shown = piece if begun else piece.lstrip()
        begun = begun or bool(shown)
        if shown:
            yield shown
