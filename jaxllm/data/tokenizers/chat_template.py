"""The chat template of a tokenizer: the Jinja program that writes a conversation as one text. Kept here, run in data/chat/render.py."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.data.tokenizers import files

FILE = "chat_template.json"
TEXT_FILE = "chat_template.jinja"


class ChatTemplate(NamedTuple):
    """text: the program. names: special tokens as templates call them, such as {"bos_token": "<s>", "eos_token": "</s>"}."""

    text: str
    names: dict[str, str]


def contents(template: ChatTemplate | None) -> dict[str, bytes]:
    """What a saved tokenizer keeps of it: one file, or none."""
    return {} if template is None else {FILE: (json.dumps(template._asdict(), indent=2) + "\n").encode()}


def restore(saved: files.Saved) -> ChatTemplate | None:
    """The inverse of `contents`."""
    return ChatTemplate(**json.loads(saved.files[FILE])) if FILE in saved.files else None


def find(directory: Path, settings: Mapping[str, Any]) -> ChatTemplate | None:
    """That of a Hugging Face directory whose tokenizer_config.json holds `settings`; None if it has none.

    It is a file of its own, or in the settings: alone or, under the name "default", among others.
    """
    text = settings.get("chat_template")
    if (directory / TEXT_FILE).is_file():
        text = (directory / TEXT_FILE).read_text(encoding="utf-8")
    if isinstance(text, list):
        text = {entry["name"]: entry["template"] for entry in text}.get("default")
    if not isinstance(text, str):
        return None
    return ChatTemplate(text, names(settings))


def names(settings: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens in a tokenizer_config.json: {"bos_token": "<s>", ...}."""
    return {name: _content(token) for name, token in settings.items() if name.endswith("_token") and _content(token)}


def _content(token: Any) -> str:
    """A special token in tokenizer_config.json is a text, or an object with its text."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""
