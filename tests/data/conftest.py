"""The configuration that tests of prepare start from."""

import json
from pathlib import Path

import pytest
from corpus import document
from ml_collections import ConfigDict

from jaxllm.config import base


@pytest.fixture
def config(tmp_path: Path) -> ConfigDict:
    """40 documents of different lengths as bytes, rows of 16."""
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": document(number)}) + "\n" for number in range(40)))
    config = base()
    config.data.source = str(source)
    config.data.validation_frac = 0.2
    config.data.row_tokens = 16
    config.tokenizer.kind = "byte"
    return config
