"""Where the chat template of a Hugging Face directory is found."""

import json
from pathlib import Path
from typing import Any

import pytest

from jaxllm.data.tokenizers import chat_template
from jaxllm.data.tokenizers.chat_template import ChatTemplate

NAMES = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "unk_token": None}
FOUND = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize(
    ("given", "file", "expected"),
    [
        ("in the settings", None, "in the settings"),
        ([{"name": "tools", "template": "t"}, {"name": "default", "template": "one of several"}], None, "one of several"),
        ("in the settings", "in a file: é", "in a file: é"),
        ([{"name": "tools", "template": "t"}], None, None),
        (None, None, None),
    ],
)
def test_places(tmp_path: Path, given: Any, file: str | None, expected: str | None) -> None:
    if file is not None:
        (tmp_path / "chat_template.jinja").write_text(file, encoding="utf-8")
    found = chat_template.find(tmp_path, json.loads(json.dumps(NAMES | {"chat_template": given})))
    assert found == (None if expected is None else ChatTemplate(expected, FOUND))
