"""Conversations: messages become the prompt that the model was trained to answer, by the chat template of its tokenizer.

A template is a Jinja program that came with the weights, so it runs in a sandbox. What it writes is the whole prompt: nothing is put
before it, as most templates write bos themselves. Its special tokens are encoded as such; a message that spells one is refused,
because it could end its own turn and speak for another role.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple, NoReturn, Protocol

from jaxllm.data import tokenize
from jaxllm.data.tokenizers.chat_template import ChatTemplate
from jaxllm.decode import generate, text
from jaxllm.decode.kept import Kept
from jaxllm.ops import sampling
from jaxllm.types import Model, Params, Tokenizer

# {"role": "system", "user" or "assistant", "content": text}
Message = Mapping[str, str]
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


class Prompt(NamedTuple):
    """ids of a conversation and how many of its oldest messages they leave out."""

    ids: list[int]
    dropped: int


def render(template: ChatTemplate, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
    """The conversation as one text, with the beginning of the next answer unless `add_generation_prompt` is False.

    As transformers renders it: same settings of Jinja, same functions. ValueError for messages that are none, and for what the
    template refuses.
    """
    _check_messages(messages)
    environment = _environment()
    try:
        program = environment.from_string(template.text)
        # Templates ask whether there are tools and documents, some of them by `is not none`.
        options = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        return program.render(messages=messages, **options, **template.names)
    except Exception as error:
        # A template is a program of somebody else: what it raises is not known beforehand.
        raise ValueError(
            f"the chat template of the model does not accept this conversation: {error}.\n  Accepted: what its authors meant, mostly an"
            " optional system message, then user and assistant in turn.\n  Change the messages; a model without system messages"
            " wants them in the first user message."
        ) from error


def _environment() -> Any:
    """Jinja as templates expect it."""
    try:
        import jinja2  # noqa: PLC0415
        from jinja2 import ext, sandbox  # noqa: PLC0415
    except ImportError as error:
        raise ValueError(
            "a chat template needs the package jinja2, which is not installed.\n  Accepted: generating text without one.\n"
            "  Run: pip install 'jaxllm[hf]'"
        ) from error

    class Generation(ext.Extension):
        """{% generation %} marks for training what the assistant said; it changes no text."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda layout: datetime.now().strftime(layout)}
    return environment


def _check_messages(messages: Sequence[Message]) -> None:
    for message in messages:
        texts = isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        if not texts:
            raise ValueError(
                f"{message!r} is no message.\n  Accepted: {{'role': 'user', 'content': 'text'}}; roles are system, user and assistant."
                "\n  Write the conversation as a list of these."
            )
    if not messages:
        raise ValueError("no message.\n  Accepted: a list of one or more.\n  Begin with {'role': 'user', 'content': 'text'}.")


def require(tokenizer: Tokenizer) -> ChatTokenizer:
    """The same tokenizer; ValueError if it has no chat template."""
    if getattr(tokenizer, "template", None) is None:
        raise ValueError(
            "the tokenizer of this model has no chat template.\n  Accepted: a model that was tuned for conversations, opened from its"
            " GGUF file or Hugging Face directory, a run converted from one, or a run of train.objective = 'sft', which keeps its"
            " template.\n  Use python -m jaxllm.generate without --chat to continue a text."
        )
    return tokenizer  # type: ignore[return-value]


def check(tokenizer: Tokenizer, messages: Sequence[Message]) -> None:
    """ValueError for a tokenizer without a chat template, for what is no message and for a message that spells a special token."""
    talker = require(tokenizer)
    _check_messages(messages)
    tokens = {**talker.special_tokens, **_end(talker)}
    for message in messages:
        for part in ("role", "content"):
            spelled = [token for token in tokens if token in message[part]]
            if spelled:
                raise ValueError(
                    f"a message of the {message['role']} contains {', '.join(map(repr, spelled))}, which would end the message for the"
                    " model.\n  Accepted: text without the special tokens of the model.\n  Spell it differently, such as with a space"
                    " inside."
                )


def encode(tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
    """The ids of the conversation, without anything before what the template writes. ValueError as `check` and `render` raise it."""
    check(tokenizer, messages)
    talker = require(tokenizer)
    return talker.encode_with_specials(render(talker.template, messages, add_generation_prompt=add_generation_prompt))


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids that end an answer: those that end a text, and the token that the template writes behind an answer."""
    return tuple(sorted({*tokenize.stop_ids(tokenizer), *_end(require(tokenizer)).values()}))


def _end(talker: ChatTokenizer) -> dict[str, int]:
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


def fit(tokenizer: Tokenizer, messages: Sequence[Message], context_tokens: int, answer_tokens: int) -> Prompt:
    """The prompt, without as many of the oldest messages as must go so that an answer fits into the context behind it.

    A system message at the beginning stays, and what follows it begins with a user's message. If the last message alone leaves
    less room than `answer_tokens` that is given, as long as there is any; else ValueError.
    """
    head = list(messages[:1]) if messages and messages[0]["role"] == "system" else []
    rest, dropped = list(messages[len(head) :]), 0
    while True:
        ids = encode(tokenizer, [*head, *rest])
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
        stop_ids=stop_ids(tokenizer),
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
