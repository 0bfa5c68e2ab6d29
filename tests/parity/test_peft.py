"""PEFT loads the adapters that are written and gives our logits; ours are those of the adapters that it writes. For `make parity`."""

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peft as library
import pytest
import torch
import transformers
from ml_collections import ConfigDict

from jaxllm import models
from jaxllm.interop import directory, peft, peft_attach, peft_params
from jaxllm.transforms import adapt, leaf, tree
from jaxllm.types import Params

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "interop"))

from foreign_models import MODELS, make  # noqa: E402
from test_exports import INPUTS_BS, TOKENS_BT, ours, theirs  # noqa: E402

# Kernels of every kind, of one kind, of one side, and of a part of what GPT-2 holds side by side.
EVERY, Q_V, ONLY_Q, MLP, DECODER = (
    ".*layers/.*/kernel|pooler/kernel|head/dense/kernel",
    ".*attention/(q|v)/kernel",
    ".*attention/q/kernel",
    ".*mlp/.*/kernel",
    "decoder/layers/.*/kernel",
)
DECODER_Q = "decoder/layers/attention/q/kernel"
LAYERS = ".*layers/.*/kernel"
LOGITS = 1e-4


def config_of(fields: dict[str, Any], kind: str, targets: str, **settings: Any) -> ConfigDict:
    config, _, _ = make(fields)
    config.train.transforms = ("dora" if kind == "dora" else "lora",)
    config.lora.update({"rank": 3, "alpha": 7.0, "targets": targets, "rslora": kind == "rslora"} | settings)
    return config


def adapted(config: ConfigDict) -> tuple[Any, Params]:
    """Random numbers in every array, also in B."""
    model = models.build(config)
    rng = np.random.default_rng(0)
    template = jax.eval_shape(model.init, jax.random.key(0))

    def draw(path: Any, like: Any) -> jax.Array:
        name = tree.path_name(path)
        # Small factors: with large ones attention is so sharp that rounding is seen.
        value = rng.normal(size=like.shape) * (0.3 if name in adapt.adapters(template) else 1)
        return jax.numpy.asarray(np.abs(value) + 0.5 if name.endswith("/magnitude") else value, "float32")

    return model, jax.tree.map_with_path(draw, template)


def dense(params: Params) -> Params:
    return jax.tree.map(leaf.dense, params, is_leaf=leaf.is_type)


def base_of(params: Params) -> Params:
    return jax.tree.map(lambda node: node.base if adapt.is_adapter(node) else node, params, is_leaf=adapt.is_adapter)


def write_base(path: Path, model: Any, params: Params, architecture: str) -> Any:
    carried = {"config.json": b'{"pad_token_id": 10}'} if architecture.endswith("ForSequenceClassification") else {}
    directory.write(path, params, model.config, None, carried)
    return getattr(transformers, architecture).from_pretrained(path)


CASES = [
    ("gpt2", "lora", EVERY, ""),
    ("gpt2", "lora", Q_V, "embed/.*|.*norm/.*"),
    ("gpt2", "dora", ONLY_Q, ""),
    ("gpt2", "dora", EVERY, ""),
    ("gpt2", "rslora", MLP, "norm/scale"),
    ("gpt2", "rslora", EVERY, ""),
    ("gpt2 untied", "lora", LAYERS, "head/kernel"),
    ("gpt2 classes", "lora", Q_V, ""),
    ("llama", "lora", EVERY, "embed/tokens|head/kernel|.*norm/scale"),
    ("llama", "dora", EVERY, ""),
    ("llama tied", "rslora", Q_V, "embed/tokens"),
    ("llama biases", "dora", Q_V, "norm/scale"),
    ("llama classes", "lora", MLP, "head/.*"),
    ("mistral", "lora", EVERY, ""),
    ("qwen2", "dora", Q_V, ""),
    ("bert", "lora", EVERY, ""),
    ("bert", "dora", LAYERS, "embed/tokens|head/bias"),
    ("bert", "rslora", Q_V, "head/.*|.*norm/.*"),
    ("bert classes", "lora", EVERY, ""),
    ("bert tags", "dora", ".*mlp/down/kernel", "pooler/.*|embed/.*"),
    ("bert alone", "lora", ".*attention/o/kernel", ""),
    ("t5", "lora", DECODER_Q, ""),
    ("t5", "dora", DECODER, "embed/tokens"),
    ("t5", "rslora", ".*cross/(k|v)/kernel", ".*norm/scale|.*relative/table"),
    ("t5 1.1", "lora", MLP, "head/kernel"),
    ("t5 1.1", "dora", EVERY, "embed/tokens"),
]
CASES = [case for case in CASES if case[0] != "bert tags"] + [("bert tags", "dora", ".*mlp/down/kernel", "embed/.*")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layers_as", ["unrolled", "scan"])
@pytest.mark.parametrize(("case", "kind", "targets", "also"), CASES)
def test_peft_loads_ours(case: str, kind: str, targets: str, also: str, layers_as: str, tmp_path: Path) -> None:
    architecture, given = MODELS[case]
    config = config_of(given | {"layers_as": layers_as}, kind, targets)
    model, params = adapted(config)
    whole = tree.matches(also, model.axes) if also else set()
    trained = params
    base = jax.tree.map_with_path(
        lambda path, x: (
            x + 0.1 if tree.path_name(path) in whole or (tree.path_name(path).startswith("head/") and "classes" in given) else x
        ),
        base_of(params),
    )
    # The base that PEFT gets has other numbers where ours are trained whole.
    theirs_base = write_base(tmp_path / "base", model, base, architecture)
    adapter = peft_params.export(params, model.config, whole=whole, base=str(tmp_path / "base"), rslora=kind == "rslora")
    peft.write(tmp_path / "adapter", adapter)
    loaded = library.PeftModel.from_pretrained(theirs_base, tmp_path / "adapter")
    expected = ours(model, trained)
    np.testing.assert_allclose(theirs_of(loaded), expected, atol=LOGITS)
    again = peft.read(tmp_path / "adapter")
    attached = peft_attach.attach(base, config_dense(config), again)
    np.testing.assert_allclose(ours(models.build(attached.config), attached.params), expected, atol=LOGITS)
    np.testing.assert_allclose(theirs(loaded.merge_and_unload()), expected, atol=LOGITS)


def config_dense(config: ConfigDict) -> ConfigDict:
    config = config.copy_and_resolve_references()
    config.train.transforms = ()
    return config


def theirs_of(model: Any) -> np.ndarray:
    tokens = torch.tensor(TOKENS_BT)
    inputs = {"input_ids": tokens}
    if "T5" in type(model.get_base_model()).__name__:
        inputs = {"input_ids": torch.tensor(INPUTS_BS), "decoder_input_ids": tokens}
    with torch.no_grad():
        found = model.eval()(**inputs)
    return (found.last_hidden_state if isinstance(model.get_base_model(), transformers.BertModel) else found.logits).numpy()
