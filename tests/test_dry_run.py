"""The sharding report of a dry run, as text, for a mesh that is larger than this machine."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from jaxllm import config as schema
from jaxllm import dry_run
from jaxllm.engine.session import build_session
from jaxllm.parallel import plan

ROOT = Path(__file__).resolve().parent.parent
# To freeze it again: print the text of `report` below.
GOLDEN = ROOT / "tests" / "golden" / "sharding_report.txt"


def report(config: object) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(dry_run.sharding(build_session(config, plan.make_abstract(config))))
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()).rstrip() + "\n"


def small() -> object:
    config = schema.base()
    config.model.update({"name": "gpt", "layers": 4, "width": 256, "heads": 4, "vocab_size": 4096, "context_tokens": 128})
    config.parallel.update({"data": 2, "fsdp": 8, "tensor": 2, "zero_stage": 2})
    config.train.batch_seqs, config.train.microbatches = 64, 2
    return config


def test_report() -> None:
    assert report(small()) == GOLDEN.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["llama_70b", "bert_base", "t5_base"])
def test_reports_of_shipped_configs_fit_100_columns(name: str) -> None:
    config = schema.with_vocabulary(schema.load(ROOT / "configs" / f"{name}.py"), 32_768)
    text = report(config)
    assert max(map(len, text.splitlines())) <= 100 and "\u2026" not in text
