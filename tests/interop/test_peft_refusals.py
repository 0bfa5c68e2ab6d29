"""Adapters that are not read, each with what is wrong, what would be right and what to do; and what the command averages."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_peft_files import GOLDEN, base_of

from jaxllm.interop import peft, peft_attach, peft_average
from jaxllm.transforms import adapt

QUERY = "base_model.model.model.layers.0.self_attn.q_proj"


def edited(
    tmp_path: Path,
    case: str = "llama_lora",
    change: Callable[[dict[str, np.ndarray]], Any] = lambda tensors: None,
    **settings: Any,
) -> Path:
    """The golden adapter with other settings, and with its tensors changed in place."""
    path = tmp_path / "adapter"
    shutil.copytree(GOLDEN / "peft" / case, path)
    values = json.loads((path / peft.CONFIG).read_text()) | settings
    (path / peft.CONFIG).write_text(json.dumps(values))
    tensors = load_file(path / peft.TENSORS)
    change(tensors)
    save_file(tensors, path / peft.TENSORS, {"format": "pt"})
    return path


def attach(path: Path, case: str = "llama_lora") -> peft_attach.Attached:
    _, config, params = base_of(case)
    return peft_attach.attach(params, config, peft.read(path))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"peft_type": "IA3"}, r"peft_type = 'IA3'.\n  Accepted: 'LORA'"),
        ({"bias": "lora_only"}, r"bias = 'lora_only'.\n  Accepted: 'none'"),
        (
            {"init_lora_weights": "pissa"},
            r"init_lora_weights = 'pissa', which changes the base[\s\S]*path_initial_model_for_weight",
        ),
        ({"layers_to_transform": [0]}, r"layers_to_transform = \[0\].\n  Accepted: null"),
        ({"layers_to_transform": 0}, r"layers_to_transform = 0.\n  Accepted: null"),
        ({"trainable_token_indices": [1]}, r"trainable_token_indices = \[1\]"),
        ({"use_qalora": True}, r"use_qalora = True.\n  Accepted: null, false or empty"),
        ({"a_later_kind": {"x": 1}}, r"a_later_kind = \{'x': 1\}"),
        ({"lora_alpha": 0}, r"lora_alpha = 0.\n  Accepted: a number above 0"),
        ({"r": 0}, r"r = 0.\n  Accepted: a whole number"),
        ({"rank_pattern": {"q_proj": 2.5}}, r"q_proj = 2.5.\n  Accepted: a whole number"),
        ({"target_modules": 3}, r"target_modules = 3.\n  Accepted: a list of names"),
        ({"r": 3}, r"of another rank \(8\): .*q_proj.lora_A.weight \[2, 16\] with r = 3"),
        ({"use_dora": True}, r"missing \(4\): .*lora_magnitude_vector"),
    ],
)
def test_settings(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{words}[\s\S]*"):
        peft.read(edited(tmp_path, **settings))


def test_what_is_not_said_is_what_peft_takes(tmp_path: Path) -> None:
    """r = 8 and lora_alpha = 8; and an alpha that is no whole number stays what it is."""
    path = edited(tmp_path, lora_alpha=12.05)
    values = json.loads((path / peft.CONFIG).read_text())
    read = peft.read(path)
    assert read.alpha(read.default) == pytest.approx(12.05, rel=1e-9)
    (path / peft.CONFIG).write_text(json.dumps({key: value for key, value in values.items() if key != "lora_alpha"}))
    assert peft.read(path).default == peft.Product(2, 8 / 2)
    defaults = ("use_rslora", "use_dora", "lora_dropout", "fan_in_fan_out", "ensure_weight_tying", "rank_pattern", "alpha_pattern")
    (path / peft.CONFIG).write_text(json.dumps({key: value for key, value in values.items() if key not in defaults}))
    short = peft.read(path)
    assert short.products == read.products
    assert (short.rslora, short.dora, short.dropout_frac, short.fan_in_fan_out, short.tied) == (False, False, 0, False, False)
    (path / peft.CONFIG).write_text(json.dumps({key: value for key, value in values.items() if key != "r"}))
    with pytest.raises(ValueError, match=r"of another rank \(8\): .*\[2, 16\] with r = 8"):
        peft.read(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{QUERY}.lora_B.weight"), r"missing \(1\): model.layers.0.self_attn.q_proj.lora_B.weight"),
        (lambda t: t.update({f"{QUERY}.lora_B.bias": np.ones(3)}), r"unexpected \(1\): .*lora_B.bias"),
        (
            lambda t: t.update({"base_model.model.x.lora_embedding_A": np.ones((2, 3))}),
            r"missing \(1\): x.lora_embedding_B\n  Accepted: [\s\S]*an embedding has lora_embedding_A and",
        ),
        (lambda t: t.clear(), r"missing \(1\): lora_A and lora_B of any module"),
    ],
)
def test_tensors(change: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"its tensors are not those of its adapter_config.json[\s\S]*{words}"):
        peft.read(edited(tmp_path, change=change))


def drop_query(tensors: dict[str, np.ndarray]) -> None:
    for part in "AB":
        tensors.pop(f"{QUERY}.lora_{part}.weight")


@pytest.mark.parametrize(
    ("case", "base", "change", "words"),
    [
        ("llama_lora", "llama_lora", drop_query, r"missing \(1\): model.layers.0.self_attn.q_proj\n"),
        ("gpt2_lora", "llama_lora", None, r"unexpected \(2\): transformer.h.0.attn.c_attn"),
        ("bert_mlm_lora", "bert_sequence_dora", None, r"unexpected \(1\): cls.predictions.transform.dense"),
        (
            "llama_lora",
            "llama_lora",
            lambda t: t.update({"base_model.model.score.weight": np.ones((2, 3))}),
            r"unexpected \(1\): score",
        ),
        (
            "llama_lora",
            "llama_lora",
            lambda t: t.update({f"{QUERY}.lora_A.weight": np.ones((2, 5), np.float32)}),
            r"of another shape \(1\): model.layers.0.self_attn.q_proj.lora_A.weight \[2, 5\] instead of \[2, 16\]",
        ),
        (
            "llama_lora",
            "llama_lora",
            lambda t: t.update({"base_model.model.lm_head.weight": np.ones((33, 16), np.float32)}),
            r"of another shape \(1\): lm_head.weight \[33, 16\] instead of \[32, 16\]",
        ),
    ],
)
def test_another_base(case: str, base: str, change: Any, words: str, tmp_path: Path) -> None:
    path = edited(tmp_path, case, change or (lambda tensors: None))
    with pytest.raises(
        ValueError, match=rf"does not fit this base; nothing was loaded.\n[\s\S]*{words}[\s\S]*Accepted: [\s\S]*\n  Give"
    ):
        attach(path, base)


def test_layers_that_differ(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"layers of layers/attention/q/kernel have adapters of different ranks or scales \(2 with"
    ):
        attach(edited(tmp_path, alpha_pattern={"layers.0.self_attn.q_proj": 9}))
    shutil.rmtree(tmp_path / "adapter")
    path = edited(tmp_path, change=drop_query, target_modules=["v_proj", "layers.1.self_attn.q_proj"])
    with pytest.raises(ValueError, match=r"different ranks or scales \((none, 2|2 with scale 2.5, none)"):
        attach(path)


def test_an_adapter_on_an_adapter() -> None:
    attached = attach(GOLDEN / "peft" / "llama_dora")
    with pytest.raises(ValueError, match=r"the base has an adapter already.\n  Accepted: a base without one"):
        peft_attach.attach(*attached, peft.read(GOLDEN / "peft" / "llama_lora"))


def test_an_embedding_apart_from_what_t5_ties_to_it(tmp_path: Path) -> None:
    def add(tensors: dict[str, np.ndarray]) -> None:
        tensors["base_model.model.shared.weight"] = np.ones((32, 12), np.float32)

    with pytest.raises(ValueError, match=r"shared.weight are stored, and not all alike.\n  Accepted: with model.name = 't5'"):
        attach(edited(tmp_path, "t5_lora", add, modules_to_save=["shared"]), "t5_lora")
    # Where it is no module of its own it is put into the base's place, and the others stay tied.
    shutil.rmtree(tmp_path / "adapter")
    attached = attach(edited(tmp_path, "t5_lora", add), "t5_lora")
    np.testing.assert_array_equal(attached.params["embed"]["tokens"], np.ones((32, 12)))
    assert attached.config.model.tied_head != "off"


def test_what_is_tied_may_be_stored_once(tmp_path: Path) -> None:
    """With ensure_weight_tying the head follows its embedding, which is not that of the base."""
    path = edited(tmp_path, "qwen2_tied", lambda tensors: tensors.pop("base_model.model.lm_head.weight"))
    once, both = (attach(each, "qwen2_tied") for each in (path, GOLDEN / "peft" / "qwen2_tied"))
    assert once.config.model.tied_head == both.config.model.tied_head != "off"
    jax.tree.map(np.testing.assert_array_equal, once.params, both.params)


def test_a_vocabulary_that_grew_in_peft(tmp_path: Path) -> None:
    """Each module of modules_to_save is there three times."""
    rng = np.random.default_rng(0)
    tables = {name: rng.normal(size=(34, 16)).astype(np.float32) for name in ("model.embed_tokens", "lm_head")}

    def change(tensors: dict[str, np.ndarray]) -> None:
        for name, table in tables.items():
            stored = {"": table, "modules_to_save.": table.copy(), "original_module.": np.zeros_like(table)}
            tensors.update({f"base_model.model.{name}.{part}weight": array for part, array in stored.items()})

    attached = attach(edited(tmp_path, change=change))
    np.testing.assert_array_equal(attached.params["embed"]["tokens"], tables["model.embed_tokens"])
    np.testing.assert_array_equal(attached.params["head"]["kernel"], tables["lm_head"])
    assert attached.config.model.vocab_size == 34


@pytest.mark.parametrize(
    ("rows", "head_rows", "words"),
    [
        (
            34,
            0,
            r"its embedding has 34 rows, the base's 32; lm_head.weight should have as many, and is not stored.\n  Accepted: adap",
        ),
        (34, 32, r"of another shape \(1\): lm_head.weight \[32, 16\] instead of \[34, 16\]"),
        (30, 30, r"of another shape \(2\): .*embed_tokens.weight \[30, 16\] instead of \[32, 16\]"),
    ],
)
def test_a_vocabulary_that_grew_in_part_or_shrank(rows: int, head_rows: int, words: str, tmp_path: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["base_model.model.model.embed_tokens.weight"] = np.ones((rows, 16), np.float32)
        tensors["base_model.model.lm_head.weight"] = np.ones((head_rows, 16), np.float32)
        if not head_rows:
            del tensors["base_model.model.lm_head.weight"]

    with pytest.raises(ValueError, match=words):
        attach(edited(tmp_path, change=change))


def test_files_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not exist.\n  Accepted: a directory with adapter_config.json"):
        peft.read(tmp_path / "none")
    path = edited(tmp_path)
    (path / peft.TENSORS).rename(path / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"has no adapter_model.safetensors.\n  Accepted[\s\S]*\.bin file can run code"):
        peft.read(path)
    (path / peft.CONFIG).write_text("{")
    with pytest.raises(ValueError, match=r"is not JSON[\s\S]*Fetch it again"):
        peft.read(path)


def delta(adapter: peft.Adapter, module: str) -> np.ndarray:
    """What it adds to the weight, in float64."""
    if module not in adapter.products:
        return np.zeros(())
    found = adapter.factors(module)
    return found.scale * found.b.astype(np.float64) @ found.a


def test_the_average_is_that_of_the_products(tmp_path: Path) -> None:
    """Of adapters of other modules, ranks and scales; not that of A and B, which is far from it."""
    adapters = [peft.read(GOLDEN / "peft" / case) for case in ("llama_pissa", "llama_rslora")]
    shares = (0.3, 1.2)
    peft.write(tmp_path, peft_average.average(adapters, shares).adapter)
    found = peft.read(tmp_path)
    assert found.products.keys() == {module for adapter in adapters for module in adapter.products}
    for module in found.products:
        exact = sum(share * delta(adapter, module) for share, adapter in zip(shares, adapters, strict=True))
        np.testing.assert_allclose(delta(found, module), exact, atol=1e-6)
    both = "model.layers.0.mlp.gate_proj"
    assert found.products[both].rank == sum(adapter.products[both].rank for adapter in adapters)
    means = [sum(s * getattr(x.factors(both), part) for s, x in zip(shares, adapters[:1] * 2, strict=True)) for part in "ba"]
    assert np.abs(means[0] @ means[1] - delta(found, both)).max() > 0.1
    assert all(found.means(module) for module in found.products)
    # The result stands beside the base like any other.
    attach(tmp_path)


@pytest.mark.parametrize("case", ["bert_base_lora", "gpt2_lora", "qwen2_tied", "llama_tables", "gpt2_look_up"])
def test_the_average_of_an_adapter_with_itself_is_that_one(case: str, tmp_path: Path) -> None:
    """Also where target_modules mean more than is adapted, as there are exclude_modules."""
    one = peft.read(GOLDEN / "peft" / case)
    peft.write(tmp_path, peft_average.average((one, one), (0.5, 0.5)).adapter)
    found = peft.read(tmp_path)
    assert (found.base, found.task, found.fan_in_fan_out, found.tied) == (one.base, one.task, one.fan_in_fan_out, one.tied)
    for module in one.products:
        np.testing.assert_allclose(delta(found, module), delta(one, module), atol=1e-6)
    assert adapt.adapters(attach(tmp_path, case).params) == adapt.adapters(attach(GOLDEN / "peft" / case, case).params)


@pytest.mark.parametrize("rank", [1, 3, 50])
def test_a_smaller_rank_is_the_best_one(rank: int) -> None:
    adapters = [peft.read(GOLDEN / "peft" / case) for case in ("llama_pissa", "llama_rslora")]
    exact = peft_average.average(adapters, (0.5, 0.5)).adapter
    found = peft_average.average(adapters, (0.5, 0.5), rank)
    left, whole = 0.0, 0.0
    for module in exact.products:
        u, values, v = np.linalg.svd(delta(exact, module), full_matrices=False)
        best = (u[:, :rank] * values[:rank]) @ v[:rank]
        np.testing.assert_allclose(delta(found.adapter, module), best, atol=1e-5)
        assert found.errors[module] == pytest.approx(np.linalg.norm(values[rank:]) / np.linalg.norm(values), abs=1e-6)
        left, whole = left + np.sum(values[rank:] ** 2), whole + np.sum(values**2)
    assert found.error == pytest.approx((left / whole) ** 0.5, abs=1e-6)
    assert (found.error < 1e-6) == (rank == 50)


def test_whole_tensors_are_averaged_with_shares_of_1(tmp_path: Path) -> None:
    first = peft.read(GOLDEN / "peft" / "llama_lora")
    second = peft.read(
        edited(tmp_path, change=lambda t: t.update({"base_model.model.lm_head.weight": np.ones((32, 16), np.float32)}))
    )
    found = peft_average.average((first, second), (0.25, 0.75)).adapter
    np.testing.assert_allclose(found.read("lm_head.weight"), 0.25 * first.read("lm_head.weight") + 0.75, rtol=1e-6)
    with pytest.raises(
        ValueError, match=r"shares 1, 1 add up to 2, and lm_head.weight, model.embed_tokens.weight are stored whole"
    ):
        peft_average.average((first, second), (1, 1))
    with pytest.raises(ValueError, match=r"only one of them stores lm_head.weight, model.embed_tokens.weight whole.\n  Accepted"):
        peft_average.average((first, peft.read(GOLDEN / "peft" / "llama_pissa")), (0.5, 0.5))


@pytest.mark.parametrize(
    ("cases", "words"),
    [
        (("llama_lora", "llama_dora"), r"llama_dora: DoRA, which scales each output[\s\S]*Accepted: LoRA"),
        (("t5_lora", "t5_v1_1_rslora"), r"only one of them stores lm_head.weight whole"),
    ],
)
def test_no_average(cases: tuple[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        peft_average.average([peft.read(GOLDEN / "peft" / case) for case in cases], (0.5, 0.5))


def test_no_average_of_tied_and_untied(tmp_path: Path) -> None:
    both = [peft.read(GOLDEN / "peft" / "qwen2_tied"), peft.read(edited(tmp_path, "qwen2_tied", ensure_weight_tying=False))]
    with pytest.raises(ValueError, match=r"only one of them has ensure_weight_tying.\n  Accepted: both, or none"):
        peft_average.average(both, (0.5, 0.5))


def test_no_average_of_other_shapes(tmp_path: Path) -> None:
    path = edited(tmp_path, change=lambda t: t.update({f"{QUERY}.lora_A.weight": np.ones((2, 5), np.float32)}))
    with pytest.raises(ValueError, match=r"modules of different shapes: model.layers.0.self_attn.q_proj.lora_A.weight \[2, "):
        peft_average.average([peft.read(GOLDEN / "peft" / "llama_lora"), peft.read(path)], (0.5, 0.5))


def test_an_untied_head_is_a_model_of_its_own() -> None:
    """GPT-2's head is its embedding, until an adapter brings another one: then the model has both."""
    _, config, base = base_of("gpt2_head")
    attached = peft_attach.attach(base, config, peft.read(GOLDEN / "peft" / "gpt2_head"))
    assert config.model.tied_head != "off" and attached.config.model.tied_head == "off"
    assert attached.params["embed"]["tokens"] is base["embed"]["tokens"]
    assert not np.array_equal(attached.params["head"]["kernel"], base["embed"]["tokens"])
    tied = peft_attach.attach(base, config, peft.read(GOLDEN / "peft" / "gpt2_whole"))
    assert tied.config.model.tied_head == config.model.tied_head and "head" not in tied.params
    assert jax.tree.structure(tied.params["norm"]) == jax.tree.structure(base["norm"])


def test_fan_in_fan_out_is_what_the_layers_of_the_base_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As in PEFT, which says so, too."""
    right, wrong = (
        attach(GOLDEN / "peft" / "gpt2_lora", "gpt2_lora"),
        attach(edited(tmp_path, "gpt2_lora", fan_in_fan_out=False), "gpt2_lora"),
    )
    assert "fan_in_fan_out = False is not that of the base's layers, which decide" in caplog.text
    jax.tree.map(np.testing.assert_array_equal, right.params, wrong.params)
