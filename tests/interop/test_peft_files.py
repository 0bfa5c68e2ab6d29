"""Adapters as PEFT wrote them (tests/golden/peft): the same logits here, and the same bytes when they are written again."""

import json
import re
from pathlib import Path
from typing import Any

import hf_batch
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from jaxllm import models
from jaxllm.interop import directory, peft, peft_attach, peft_params, weights
from jaxllm.interop.peft_attach import Attached
from jaxllm.transforms import adapt, tree

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("peft/*/adapter_config.json"))
# In parts of the largest logit; as measured up to 2e-6.
LOGITS = 1e-5


def base_of(case: str, layers_as: str = "unrolled") -> tuple[str, ConfigDict, Any]:
    """(class, config, parameters) of the model that the adapter stands beside."""
    values = json.loads((GOLDEN / "peft" / case / peft.CONFIG).read_text())
    imported = directory.read(GOLDEN / Path(values["base_model_name_or_path"]).name)
    imported.config.model.layers_as = layers_as
    return imported.architecture, imported.config, weights.load(imported).params


def open_case(case: str, layers_as: str = "unrolled") -> Attached:
    _, config, params = base_of(case, layers_as)
    return peft_attach.attach(params, config, peft.read(GOLDEN / "peft" / case))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layers_as", ["unrolled", "scan"])
def test_logits(case: str, layers_as: str) -> None:
    architecture, config, base = base_of(case, layers_as)
    attached = peft_attach.attach(base, config, peft.read(GOLDEN / "peft" / case))
    name = json.loads((GOLDEN / "peft" / case / peft.CONFIG).read_text())["base_model_name_or_path"]
    given = {
        key.removeprefix("input/"): array
        for key, array in load_file(GOLDEN / Path(name).name / "expected.safetensors").items()
        if key.startswith("input/")
    }
    batch = hf_batch.from_arguments(architecture, given)
    expected = load_file(GOLDEN / "peft" / case / "expected.safetensors")["logits"]
    rest = {name: array for name, array in batch.items() if name not in ("tokens", "targets", "weights")}
    model = models.build(attached.config)
    run = jax.jit(model.apply, compiler_options={"xla_backend_optimization_level": 0})
    assert hf_batch.error(batch, np.asarray(run(attached.params, batch["tokens"], **rest)), expected) < LOGITS
    # The parameters are those of the model that the config describes; ranks of their own are not in it.
    assert tree.names(model.axes) == tree.names(attached.params)
    # So are the settings with which it is trained on.
    values, lora = json.loads((GOLDEN / "peft" / case / peft.CONFIG).read_text()), attached.config.lora
    settings = [values[name] for name in ("r", "lora_alpha", "use_rslora", "lora_dropout")]
    assert [lora.rank, lora.alpha, lora.rslora, lora.dropout_frac] == settings
    assert attached.config.train.transforms == ("dora" if values["use_dora"] else "lora",)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layers_as", ["unrolled", "scan"])
def test_what_is_written_again_is_the_same_file(case: str, layers_as: str, tmp_path: Path) -> None:
    attached, first = open_case(case, layers_as), peft.read(GOLDEN / "peft" / case)
    arch = models.build(attached.config).config
    whole = {name for name in tree.names(attached.params) if re.fullmatch(attached.config.lora.also, name)}
    adapter = peft_params.export(attached.params, arch, whole=whole, base=first.base, rslora=first.rslora)
    peft.write(tmp_path, adapter)
    second = peft.read(tmp_path)
    same = set(first.shapes) & set(second.shapes)
    assert all(np.array_equal(first.read(name), second.read(name)) for name in same)
    if first.tokens:
        # Rows of tokens become whole tables.
        assert same == {name for name in first.shapes if ".lora_" in name} and second.whole and not second.tokens
    elif theirs := set(first.shapes) - same:
        # They store the base's own table below an adapter of it.
        _, config, base = base_of(case)
        assert set(second.shapes) == same and theirs <= {"model.embed_tokens.weight", "lm_head.weight"}
        own = {
            "model.embed_tokens.weight": base["embed"]["tokens"],
            "lm_head.weight": base.get("head", base["embed"]).get("kernel"),
        }
        assert all(own[name] is None or np.array_equal(first.read(name), own[name]) for name in theirs)
    elif same != set(second.shapes):
        # Theirs has the embedding once, ours under all of its names.
        assert first.tied and not second.tied
    else:
        assert (tmp_path / peft.TENSORS).read_bytes() == (GOLDEN / "peft" / case / peft.TENSORS).read_bytes()
    assert second.products == first.products
    assert (second.dora, second.rslora, second.dropout_frac) == (first.dora, first.rslora, first.dropout_frac)
    assert second.fan_in_fan_out == first.fan_in_fan_out == case.startswith("gpt2")
    if first.task is not None:
        assert second.task == first.task
    # With ensure_weight_tying theirs mean the embedding alone.
    assert all(second.means(module) and (first.tied or first.means(module)) for module in first.products)


def test_the_base_is_shared() -> None:
    _, config, base = base_of("llama_lora")
    attached = peft_attach.attach(base, config, peft.read(GOLDEN / "peft" / "llama_lora"))
    old = {id(array) for array in jax.tree.leaves(base)}
    nodes = jax.tree.leaves(attached.params, is_leaf=adapt.is_adapter)
    assert sum(adapt.is_adapter(node) for node in nodes) == 4
    assert all(id(node.base) in old for node in nodes if adapt.is_adapter(node))
    new = [array for array in nodes if not adapt.is_adapter(array) and id(array) not in old]
    assert len(new) == 2, "embedding and head, which the adapter stores whole"
