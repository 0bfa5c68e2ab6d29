"""The ids of a conversation, and where an answer ends.

Special tokens that the template writes are encoded as such. A message that spells one is refused, because it could end its own turn
and speak for another role. Nothing is put before what the template writes, as most templates write bos themselves.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from jaxllm.data import tokenize
from jaxllm.data.chat.render import render
from jaxllm.data.documents import Message
from jaxllm.data.tokenizers.chat_template import ChatTemplate
from jaxllm.data.tokenizers.located import Located
from jaxllm.types import Tokenizer

# An answer that no template contains.
MARK = "an-answer-to-look-for"


class ChatTokenizer(Tokenizer, Protocol):
    """A tokenizer that knows how conversations are written.

    added_tokens: what is one token wherever a text spells it, or, of special_tokens, where that is meant.
    """

    template: ChatTemplate
    special_tokens: Mapping[str, int]
    added_tokens: Mapping[str, int]

    def encode_with_specials(self, text: str) -> list[int]: ...

    def locate(self, text: str) -> Located: ...


def require(tokenizer: Tokenizer) -> ChatTokenizer:
    """The same tokenizer; ValueError if it has no chat template."""
    if getattr(tokenizer, "template", None) is None:
        raise ValueError(
            "the tokenizer of this model has no chat template.\n  Accepted: a model that was tuned for conversations, opened from its"
            " GGUF file or Hugging Face directory, a run converted from one, or a run of train.objective = 'sft', which keeps its"
            " template.\n  Use python -m jaxllm.generate without --chat to continue a text."
        )
    return tokenizer  # type: ignore[return-value]


def forbidden(talker: ChatTokenizer) -> dict[str, int]:
    """Tokens that no message may spell, and their ids: special ones, and what ends an answer."""
    return {**talker.special_tokens, **answer_ends(talker)}


def spelled(message: Message, tokens: Mapping[str, int]) -> list[str]:
    """Those of the tokens that the message spells."""
    return [token for token in tokens if token in message["role"] or token in message["content"]]


def encode(tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
    """The ids of the conversation, which are what chat sends to a model.

    ValueError for a tokenizer without a chat template, and as `check` and `render` raise it.
    """
    talker = require(tokenizer)
    text = render(talker.template, messages, add_generation_prompt=add_generation_prompt)
    check(tokenizer, messages)
    return talker.encode_with_specials(text)


def check(tokenizer: Tokenizer, messages: Sequence[Message]) -> None:
    """ValueError for a message that spells a special token."""
    tokens = forbidden(require(tokenizer))
    for message in messages:
        if found := spelled(message, tokens):
            raise ValueError(
                f"a message of the {message['role']} contains {', '.join(map(repr, found))}, which would end the message for the"
                " model.\n  Accepted: text without the special tokens of the model.\n  Spell it differently, such as with a space"
                " inside."
            )


def answer_ends(talker: ChatTokenizer) -> dict[str, int]:
    """Tokens that end an answer, and their ids: those that end a text, as far as one can be spelled, and the one that the template
    writes behind an answer."""
    stops = tokenize.stop_ids(talker)
    return {token: index for token, index in talker.added_tokens.items() if index in stops} | _template_end(talker)


def answer_stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids behind which a model writes no more of an answer: those of `tokenize.stop_ids`, which end any text, and of `answer_ends`."""
    return tuple(sorted({*tokenize.stop_ids(tokenizer), *answer_ends(require(tokenizer)).values()}))


def _template_end(talker: ChatTokenizer) -> dict[str, int]:
    """The token that the template writes behind an answer, and its id; none if it writes none.

    It need not be special: GGUF files have DeepSeek's <|EOT|> as a token of text. Such a one stands directly behind the answer.
    """
    exchange = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": MARK}]
    try:
        after = render(talker.template, exchange, add_generation_prompt=False).rpartition(MARK)[2]
    except ValueError:
        after = ""
    places = {token: after.index(token) for token in talker.added_tokens if token.strip() and token in after}
    places = {token: at for token, at in places.items() if token in talker.special_tokens or not after[:at].strip()}
    first = min(places, key=lambda token: (places[token], -len(token)), default=None)
    return {} if first is None else {first: talker.added_tokens[first]}
