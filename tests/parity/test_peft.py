"""PEFT loads what is written and gives our logits, and what it writes gives its logits here. Part of `make parity`."""

import sys
from pathlib import Path
from typing import Any

import jax
import make_golden
import make_peft
import numpy as np
import peft as library
import pytest
import torch
import transformers
from cases import CASES as BASES

from jaxllm import models
from jaxllm.interop import directory, peft, peft_attach, peft_params, weights
from jaxllm.transforms import tree
from jaxllm.types import Params

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "interop"))

import hf_batch  # noqa: E402
import test_models  # noqa: E402
from adapted_models import CASES, GROWN, Q_V, START_ROWS, adapted, before_it_grew, dense, without_transforms  # noqa: E402
from foreign_models import MODELS  # noqa: E402
from test_exports import ours, theirs  # noqa: E402
from test_peft_params import peft_base, whole_names  # noqa: E402

LOGITS = 1e-4
# Their remarks on tied embeddings and on Conv1D.
pytestmark = pytest.mark.filterwarnings("ignore")


def moved(base: Params, whole: set[str]) -> Params:
    """The base with other numbers where the adapter brings its own."""
    return jax.tree.map_with_path(lambda path, array: array + 0.1 if tree.path_name(path) in whole else array, base)


@pytest.mark.parametrize(
    ("case", "kind", "targets", "also", "layers_as"),
    [(*case, ("unrolled", "scan")[index % 2]) for index, case in enumerate(CASES)],
)
def test_ours(case: str, kind: str, targets: str, also: str, layers_as: str, tmp_path: Path) -> None:
    """With the adapter beside the base, merged into it, and read here again."""
    architecture = MODELS[case][0]
    config, model, params, base = adapted(case, kind, targets, layers_as)
    # A classifier's head always is a part of the adapter.
    whole = whole_names(f"{also}|head/.*" if model.config.head in ("classify", "tag") else also, params)
    begun = moved(base if kind == "pissa" else peft_base(params), whole)
    # Padding that is no id of the batch: a classifier of GPT-2 or LLaMA looks for a row's last token that is none.
    carried = {"config.json": b'{"pad_token_id": 10}'} if architecture.endswith("ForSequenceClassification") else {}
    directory.write(tmp_path / "base", begun, model.config, None, carried)
    options = {"whole": whole_names(also, params), "base": str(tmp_path / "base"), "rslora": kind == "rslora"}
    adapter = peft_params.export(params, model.config, **options, original=base if kind == "pissa" else None)
    peft.write(tmp_path / "adapter", adapter)
    loaded = library.PeftModel.from_pretrained(
        getattr(transformers, architecture).from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    expected = ours(model, params)
    again = peft_attach.attach(begun, without_transforms(config), peft.read(tmp_path / "adapter"))
    found = [
        theirs(loaded.eval().base_model.model),
        ours(models.build(again.config), again.params),
    ]
    tied = peft_params.copied(architecture, weights.export(base, architecture, model.config))
    if "embed/tokens/a" not in tree.names(params) or not tied:
        # PEFT adds to one array what each of the modules that share it has.
        found.append(theirs(loaded.merge_and_unload()))
    for logits in found:
        np.testing.assert_allclose(logits, expected, atol=LOGITS)
    print(f"{case}, {kind}: {max(np.abs(logits - expected).max() for logits in found):.1e} of {np.abs(expected).max():.1f}")


def grown_base(case: str, path: Path) -> Any:
    """A function that opens the base of this model whose vocabulary grew, with as many rows as that has."""
    config, _, params, _ = adapted(case, "lora", Q_V, start_rows=START_ROWS)
    base_config, base = before_it_grew(config, params)
    architecture = MODELS[case][0]
    carried = {"config.json": b'{"pad_token_id": 8}'} if architecture.endswith("ForSequenceClassification") else {}
    directory.write(path, base, models.build(base_config).config, None, carried)

    def load() -> Any:
        loaded = getattr(transformers, architecture).from_pretrained(path)
        loaded.resize_token_embeddings(config.model.vocab_size)
        return loaded

    return load


@pytest.mark.parametrize("case", GROWN)
def test_ours_with_new_tokens(case: str, tmp_path: Path) -> None:
    _, model, params, _ = adapted(case, "lora", Q_V, start_rows=START_ROWS)
    load = grown_base(case, tmp_path / "base")
    peft.write(tmp_path / "adapter", peft_params.export(params, model.config, base=str(tmp_path / "base")))
    loaded, expected = library.PeftModel.from_pretrained(load(), tmp_path / "adapter"), ours(model, params)
    for logits in (theirs(loaded.eval().base_model.model), theirs(loaded.merge_and_unload())):
        np.testing.assert_allclose(logits, expected, atol=LOGITS)
        print(f"{case}: {np.abs(logits - expected).max():.1e} of {np.abs(expected).max():.1f}")


TABLES = ["embed_tokens", "lm_head"]


@pytest.mark.parametrize(
    ("case", "options"),
    [
        *((case, {}) for case in GROWN if case != "bert classes"),
        ("llama", {"modules_to_save": TABLES}),
        ("llama tied", {"modules_to_save": TABLES}),
        ("llama tied", {"modules_to_save": TABLES[:1]}),
        ("llama tied", {"modules_to_save": TABLES[:1], "ensure_weight_tying": True}),
        ("gpt2", {"modules_to_save": ["wte", "lm_head"]}),
        ("gpt2", {"target_modules": ["wte"]}),
        ("llama", {"target_modules": TABLES}),
        ("llama tied", {"target_modules": TABLES[:1]}),
        ("llama tied", {"target_modules": TABLES[:1], "ensure_weight_tying": True}),
        ("llama tied", {"target_modules": TABLES}),
        ("llama", {"trainable_token_indices": [1, 10]}),
        ("llama tied", {"trainable_token_indices": [1, 10]}),
    ],
)
def test_theirs_with_new_tokens(case: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Trained by PEFT: what it does not name in modules_to_save it stores as well, and trains as little as the rest of the base."""
    load = grown_base(case, tmp_path / "base")
    targets = {"gpt2": "c_attn", "bert": "query", "t5": "q"}.get(case, "q_proj")
    torch.manual_seed(0)
    given = library.get_peft_model(load(), library.LoraConfig(r=2, **{"target_modules": [targets], **options}))
    for weight in given.parameters():
        if weight.requires_grad:
            weight.data += 0.2 * torch.randn_like(weight)
    given.save_pretrained(tmp_path / "adapter")
    expected = theirs(library.PeftModel.from_pretrained(load(), tmp_path / "adapter").base_model.model)
    np.testing.assert_allclose(theirs(given.base_model.model), expected, atol=LOGITS)
    base = directory.read(tmp_path / "base")
    attached = peft_attach.attach(weights.load(base).params, base.config, peft.read(tmp_path / "adapter"))
    np.testing.assert_allclose(ours(models.build(attached.config), attached.params), expected, atol=LOGITS)


# Beside those that are frozen: what a tied head does in each case, and rows that it has, too, or alone.
MORE = {
    "qwen2 tied, dora": make_peft.Case(
        "qwen2", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True, "use_dora": True}
    ),
    "qwen2 both": make_peft.Case("qwen2", {"target_modules": TABLES}),
    "qwen2 head": make_peft.Case("qwen2", {"target_modules": TABLES[1:]}),
    "qwen2 rows of the head": make_peft.Case("qwen2", {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [2]}}),
    "qwen2 other rows": make_peft.Case(
        "qwen2", {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [2]}}
    ),
    "qwen2 same rows": make_peft.Case(
        "qwen2", {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [1, 5]}}
    ),
    "t5 rows": make_peft.Case("t5", {"target_modules": ["q"], "trainable_token_indices": [1, 5]}),
    "t5 1.1 head": make_peft.Case("t5_v1_1", {"target_modules": ["lm_head"], "use_dora": True}),
    "bert classes": make_peft.Case("bert_sequence", {"target_modules": ["word_embeddings"], "task_type": "SEQ_CLS"}),
    "bert classes, rows": make_peft.Case(
        "bert_sequence", {"target_modules": ["query"], "trainable_token_indices": [1, 5], "task_type": "SEQ_CLS"}
    ),
}


@pytest.mark.parametrize("name", [*make_peft.CASES, *MORE])
def test_theirs(name: str, tmp_path: Path) -> None:
    """Larger than the frozen ones; merged weights too."""
    case = (make_peft.CASES | MORE)[name]
    larger = test_models.enlarge(BASES[case.base], 3)
    model, given = make_golden.make_model(larger), make_golden.make_inputs(larger)
    architecture, config, params = test_models.read(larger, model, tmp_path / "base")
    make_peft.write(case, tmp_path / "base", tmp_path / "adapter", 7)
    expected = make_peft.expect(tmp_path / "base", tmp_path / "adapter", given).numpy()
    attached = peft_attach.attach(params, config, peft.read(tmp_path / "adapter"))
    batch = hf_batch.from_arguments(architecture, {key: value.numpy().astype(np.int32) for key, value in given.items()})
    rest = {key: array for key, array in batch.items() if key not in ("tokens", "targets", "weights")}
    built = models.build(attached.config)
    logits = np.asarray(built.apply(attached.params, batch["tokens"], **rest))
    difference = hf_batch.error(batch, logits, expected) * np.abs(expected).max()
    print(f"{name}: {difference:.1e} of {np.abs(expected).max():.1f}")
    assert difference < LOGITS
    loaded = getattr(transformers, architecture).from_pretrained(tmp_path / "base")
    # Merged, PEFT leaves nothing apart, and adds to a table what each of the modules that share it has.
    untied = "head" in attached.params and "head" not in params
    follows = name == "qwen2_follows"
    if not (untied or follows or set(case.options.get("modules_to_save", ())) & {"lm_head"}):
        merged = library.PeftModel.from_pretrained(loaded, tmp_path / "adapter").merge_and_unload()
        tensors = {name: value.detach().numpy() for name, value in merged.state_dict().items()}
        exported = weights.export(dense(attached.params), architecture, built.config)
        for key in exported.shapes:
            theirs_key = key if key in tensors else key.partition(".")[2]
            np.testing.assert_allclose(exported.make(key), tensors[theirs_key], atol=1e-5, err_msg=key)
