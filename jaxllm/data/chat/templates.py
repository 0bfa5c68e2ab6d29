"""Chat templates by name, for tokenizers that have none, or that are to use another one.

Each begins with bos where the tokenizer begins a text with it, and marks by {% generation %} what the assistant writes: the answer and
the token that ends it. `add_generation_prompt` ends the text where an answer begins. Behind a question stands a newline or a special
token, so that the beginning of an answer does not become one token with what stands before it.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import logging
from ml_collections import ConfigDict

from jaxllm import registry
from jaxllm.data.chat.render import render
from jaxllm.data.documents import Message
from jaxllm.data.tokenizers.chat_template import ChatTemplate

if TYPE_CHECKING:
    from jaxllm.types import Tokenizer

# The value of chat.template for the template that the tokenizer came with.
OWN = "tokenizer"

CHATML = """{{ bos_token }}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""

LLAMA3 = """{{ bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content | trim + '<|eot_id|>' }}{% endgeneration %}
    {%- else %}
        {{- message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""

# The sentence is part of the format (Taori et al. 2023, Stanford Alpaca, prompt without input): models were trained behind it.
ALPACA = """{{ bos_token }}
{%- if messages[0].role != 'system' %}
    {{- 'Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '### Response:\n' }}
        {%- generation %}{{ message.content + eos_token }}{% endgeneration %}
        {{- '\n\n' if not loop.last }}
    {%- elif message.role == 'system' %}
        {{- message.content + '\n\n' if message.content }}
    {%- else %}
        {{- '### Instruction:\n' + message.content + '\n\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '### Response:\n' }}
{%- endif %}"""

PLAIN = """{{ bos_token }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content + eos_token }}{% endgeneration %}
    {%- else %}
        {{- message.content + '\n' if message.content }}
    {%- endif %}
{%- endfor %}"""


class Named(NamedTuple):
    """text: the Jinja program. tokens: special tokens that it writes besides bos and eos. end: what it ends an answer with, if not eos."""

    text: str
    tokens: tuple[str, ...] = ()
    end: str = ""


def chatml() -> Named:
    """Role and text between <|im_start|> and <|im_end|>."""
    return Named(CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>")


def llama3() -> Named:
    """The role in a header, <|eot_id|> at the end (Grattafiori et al. 2024, arXiv:2407.21783); without its lines about dates and tools."""
    return Named(LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>")


def alpaca() -> Named:
    """Text headings, eos behind an answer."""
    return Named(ALPACA)


def plain() -> Named:
    """No marks: each text on a line of its own, eos behind an answer."""
    return Named(PLAIN)


def tokens(config: ConfigDict) -> tuple[str, ...]:
    """The special tokens that the template in chat.template needs."""
    return () if config.chat.template == OWN else named(config.chat.template).tokens


def named(name: str) -> Named:
    """The template of this name."""
    found: Named = registry.resolve("chat_template", name)()
    return found


def end(config: ConfigDict) -> str:
    """What the template in chat.template ends an answer with, if that is neither eos nor known to the tokenizer by itself."""
    return "" if config.chat.template == OWN else named(config.chat.template).end


def choose(config: ConfigDict, tokenizer: "Tokenizer") -> ChatTemplate:
    """The template that chat.template names, for this tokenizer; ValueError if that is its own and it has none."""
    own = getattr(tokenizer, "template", None)
    if config.chat.template == OWN:
        if own is None:
            raise ValueError(
                f"chat.template = '{OWN}', but {_which(config)} has no chat template.\n  Accepted:"
                f" {', '.join(registry.names('chat_template'))}; '{OWN}' for a tokenizer file of a model that was tuned for"
                " conversations.\n  Set chat.template=chatml, or another of these."
            )
        return own
    text, names = named(config.chat.template).text, _names(tokenizer)
    if own is not None and own.text != text:
        logging.warning(
            "chat.template = '%s' is not the template that the tokenizer came with: a model that was tuned with that one has to learn"
            " anew where a turn ends. chat.template=%s keeps it.",
            config.chat.template,
            OWN,
        )
    return ChatTemplate(text, names)


def _which(config: ConfigDict) -> str:
    """A tokenizer that was not made here, as its user knows it."""
    path, start = config.tokenizer.path, config.train.start
    if start and Path(path).is_relative_to(Path(start).expanduser().absolute()):
        return f"the tokenizer of train.start = '{start}'"
    return f"tokenizer.path = '{path}'"


def spell(config: ConfigDict, messages: Sequence[Message]) -> list[str]:
    """What the template in chat.template, a named one, writes of a conversation between its special tokens."""
    template = named(config.chat.template)
    text = render(ChatTemplate(template.text, {"bos_token": "", "eos_token": ""}), messages, add_generation_prompt=False)
    pattern = "|".join(map(re.escape, template.tokens))
    return [part for part in re.split(pattern, text) if part] if pattern else [text]


def _names(tokenizer: Any) -> dict[str, str]:
    """bos_token, if the tokenizer begins texts with one, and eos_token."""
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    spelled = {index: token for token, index in tokenizer.added_tokens.items()}
    return {name: spelled[index] for name, index in ids.items() if index in spelled}
