"""transformers loads what is exported, with no missing and no unexpected key, and gives our logits. Part of `make parity`."""

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers

from jaxllm import config as schema
from jaxllm import models
from jaxllm.data.tokenizers import byte, sentencepiece
from jaxllm.interop import directory, families, tokenizer_files, weights
from jaxllm.interop.family import Settings
from jaxllm.types import Model, Params

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "interop"))

from foreign_models import MODELS, make  # noqa: E402

TOKENS_BT, INPUTS_BS = np.random.default_rng(0).integers(0, 10, (2, 2, 12))


def ours(model: Model, params: Params) -> np.ndarray:
    beside = {"inputs": INPUTS_BS} if model.encode is not None else {}
    logits = np.asarray(jax.jit(model.apply)(params, TOKENS_BT, **beside))
    if model.config.head != "classify":
        return logits
    return logits[:, 0 if model.name == "bert" else -1]


def theirs(model: Any) -> np.ndarray:
    tokens = torch.tensor(TOKENS_BT)
    inputs = (
        {"input_ids": torch.tensor(INPUTS_BS), "decoder_input_ids": tokens}
        if "T5" in type(model).__name__
        else {"input_ids": tokens}
    )
    with torch.no_grad():
        found = model.eval()(**inputs)
    return (found.last_hidden_state if isinstance(model, transformers.BertModel) else found.logits).numpy()


@pytest.mark.parametrize("case", MODELS)
def test_transformers_loads_the_export(case: str, tmp_path: Path) -> None:
    architecture, fields = MODELS[case]
    _, model, params = make(fields)
    # Padding that is no id of the batch: a classifier of GPT-2 or LLaMA looks for a row's last token that is none.
    carried = {"config.json": b'{"pad_token_id": 10}'} if architecture.endswith("ForSequenceClassification") else {}
    directory.write(tmp_path, params, model.config, None, carried)
    loaded, info = getattr(transformers, architecture).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    np.testing.assert_allclose(theirs(loaded), ours(model, params), atol=1e-4)
    # What transformers writes itself is the same model, too.
    loaded.save_pretrained(tmp_path / "again")
    imported = directory.read(tmp_path / "again")
    assert imported.architecture == architecture
    jax.tree.map(np.testing.assert_array_equal, weights.load(imported).params, params)
    assert models.build(imported.config).config == model.config


@pytest.mark.parametrize(
    "architecture", [name for family in families.FAMILIES for name in family.classes if hasattr(transformers, name)]
)
def test_what_a_config_leaves_out_is_what_transformers_takes_for_it(architecture: str) -> None:
    family, theirs = families.find(architecture), getattr(transformers, architecture).config_class().to_dict()
    assert family.read(Settings({}, ""), architecture) == family.read(Settings(theirs, ""), architecture)


@pytest.mark.parametrize("train", [sentencepiece.train_bpe, sentencepiece.train_unigram, byte.train])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert", "t5"])
def test_auto_tokenizer_gives_the_same_ids(train: Any, model_type: str, tmp_path: Path) -> None:
    """Whatever class transformers takes for this type of model."""
    config = schema.base()
    config.tokenizer.vocab_size = 500
    texts = (ROOT.parent / "docs" / "architecture.md").read_text(encoding="utf-8").split("\n\n")
    tokenizer = train(config, lambda: texts)
    kind = {"bert": "encoder", "t5": "encoder_decoder"}.get(model_type, "decoder")
    for name, data in tokenizer_files.make(tokenizer, 4096, kind).files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    found = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    for text in [*texts, "  Grüße aus Köln \n\t日本語 🙂", " ", ""]:
        ids = tokenizer.encode(text)
        assert found.encode(text, add_special_tokens=False) == ids
        before, after = [tokenizer.bos_id] * (kind != "encoder_decoder"), [tokenizer.eos_id] * (kind != "decoder")
        assert found(text)["input_ids"] == [*before, *ids, *after]
        assert found.decode(tokenizer.encode(text)) == text
