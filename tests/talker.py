"""A small tokenizer with a chat template, as a GGUF file has it."""

from pathlib import Path
from typing import Any

import tiny_gguf

from jaxllm.interop import gguf_file, gguf_tokenizer

ASK = [{"role": "user", "content": "Hi"}]


def tokenizer(template: str | None = tiny_gguf.TEMPLATE, **changes: Any) -> Any:
    values = tiny_gguf.tokenizer_values(chat_template=template, **changes)
    found = gguf_tokenizer.read(gguf_file.File(Path("tiny.gguf"), values, {}))
    assert found is not None
    return found.tokenizer
