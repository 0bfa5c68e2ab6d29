"""Adapters of ours in PEFT's terms: each weight, put together in NumPy as PEFT's layers define it, is the kernel of ours multiplied out."""

import dataclasses
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapted_models import CASES, EVERY, GROWN, Q_V, START_ROWS, adapted, before_it_grew, dense, without_transforms
from foreign_models import MODELS, make

from jaxllm import models
from jaxllm.interop import families, peft, peft_attach, peft_modules, peft_params, weights
from jaxllm.transforms import adapt, grown, leaf, tree
from jaxllm.transforms.quantized import Quantized
from jaxllm.types import Params

# Part of the largest weight: roundings of sums of a dozen products, and of PiSSA's W - s A0 B0.
WEIGHT = 1e-5


def merged(adapter: peft.Adapter, module: str, weight: np.ndarray) -> np.ndarray:
    """W + s B A of a Linear [outputs, inputs], transposed of a Conv1D or an Embedding; with DoRA each output has its length (Liu et al.,
    eq. 5)."""
    found = adapter.factors(module)
    transposed = module + peft.EMBEDDING_A in adapter.shapes or (adapter.fan_in_fan_out and module != "lm_head")
    weight = weight.T if transposed else weight
    whole = weight.astype(np.float64) + found.scale * found.b.astype(np.float64) @ found.a
    if found.magnitude is not None:
        whole *= (found.magnitude / np.linalg.norm(whole, axis=1))[:, None]
    return whole.T if transposed else whole


def whole_names(also: str, params: Params) -> set[str]:
    return {name for name in tree.names(params) if also and re.fullmatch(also, name)}


@pytest.mark.parametrize(
    ("case", "kind", "targets", "also", "layers_as"),
    [(*case, ("unrolled", "scan")[index % 2]) for index, case in enumerate(CASES)],
)
def test_weights(case: str, kind: str, targets: str, also: str, layers_as: str, tmp_path: Path) -> None:
    config, model, params, base = adapted(case, kind, targets, layers_as)
    # The original has the other form of the stack, which must not matter.
    other = tree.stack_layers(base) if layers_as == "unrolled" else tree.unstack_like(base, make(MODELS[case][1])[2])
    original = other if kind == "pissa" else None
    whole = whole_names(also, params)
    adapter = peft_params.export(params, model.config, whole=whole, base="there", rslora=kind == "rslora", original=original)
    peft.write(tmp_path, adapter)
    read = peft.read(tmp_path)
    assert (read.base, read.rslora, read.dora) == ("there", kind == "rslora", kind == "dora")
    architecture = families.choose(model.config)
    expected = weights.export(dense(params), architecture, model.config)
    begun = weights.export(base if kind == "pissa" else peft_base(params), architecture, model.config)
    canonical = families.find(architecture).canonical
    changed = set()
    copies = peft_params.copied(architecture, expected)
    for module in read.products:
        # All that is tied to an adapted table has an adapter, and becomes what the table becomes.
        name = copies.get(canonical(f"{module}.weight"), canonical(f"{module}.weight"))
        found, exact = merged(read, module, begun.make(name)), expected.make(name)
        np.testing.assert_allclose(found, exact, atol=WEIGHT * np.abs(exact).max())
        changed.add(name)
    selected = {name for name in tree.names(base) if re.fullmatch(targets, name)}
    rules = families.find(architecture).rules(architecture, model.config)
    wanted = {rule.name for rule in rules if rule.path in selected}
    tied = {copy for copy, name in copies.items() if name in changed and model.config.head == "lm"}
    assert tied <= {canonical(f"{module}.weight") for module in read.products}
    assert changed == {name for name in expected.shapes if any(re.fullmatch(_pattern(name_), name) for name_ in wanted)}
    # PEFT makes a new head for a classifier, random where the files have none.
    heads = {rule.name for rule in rules if rule.path.startswith("head/") and config.model.head in ("classify", "tag")}
    assert heads <= {canonical(name) for name in read.whole}
    # Attached to the base again, the kernels are the same.
    again = peft_attach.attach(base if kind == "pissa" else peft_base(params), without_transforms(config), read)
    for found, exact in zip(jax.tree.leaves(dense(again.params)), jax.tree.leaves(dense(params)), strict=True):
        np.testing.assert_allclose(found, exact, atol=WEIGHT * max(1, np.abs(exact).max()))
    assert whole <= set(tree.names(again.params))
    assert whole_names(again.config.lora.also, params) >= whole


@pytest.mark.parametrize("case", GROWN)
def test_a_vocabulary_that_grew(case: str, tmp_path: Path) -> None:
    config, model, params, _ = adapted(case, "lora", Q_V, start_rows=START_ROWS)
    peft.write(tmp_path, peft_params.export(params, model.config))
    read = peft.read(tmp_path)
    tables = [array for name, array in tree.named_leaves(dense(params)) if name in grown.tables(config.model.head)]
    assert {read.shapes[name] for name in read.whole} >= {table.shape for table in tables}
    base_config, base = before_it_grew(config, params)
    again = peft_attach.attach(base, base_config, read)
    assert (again.config.model.vocab_size, again.config.model.start_rows) == (config.model.vocab_size, 0)
    for (name, found), exact in zip(tree.named_leaves(dense(again.params)), jax.tree.leaves(dense(params)), strict=True):
        # q, k and v of GPT-2 are one product of a larger rank.
        np.testing.assert_allclose(found, exact, rtol=0, atol=0 if name in grown.TABLES else 1e-6, err_msg=name)
    tokens = np.array([[START_ROWS, 1, config.model.vocab_size - 1, 2]])
    arguments = {"inputs": tokens} if case == "t5" else {}
    both = ((again.config, again.params), (config, params))
    logits = [models.build(each).apply(numbers, tokens, **arguments) for each, numbers in both]
    np.testing.assert_allclose(*logits, atol=1e-4)


def peft_base(params: Params) -> Params:
    return jax.tree.map(lambda node: node.base if adapt.is_adapter(node) else node, params, is_leaf=adapt.is_adapter)


def _pattern(name: str) -> str:
    return re.escape(name).replace(r"\{layer\}", r"\d+")


@pytest.mark.parametrize("case", ["gpt2", "llama", "bert", "t5", "bert alone"])
def test_modules_are_named_as_shortly_as_can_be(case: str) -> None:
    """Any choice of kernels, read as PEFT reads target_modules: an ending behind a dot, or a whole regular expression."""
    _, model, _, base = adapted(case, "lora", EVERY)
    architecture = families.choose(model.config)
    exported = weights.export(base, architecture, model.config)
    every = peft_modules.universe({name.rpartition(".")[0] for name in exported.shapes})
    kernels = sorted(rule.name for rule in families.find(architecture).rules(architecture, model.config) if rule.inputs)
    rng = np.random.default_rng(0)
    for _ in range(40):
        patterns = rng.choice(kernels, size=rng.integers(1, len(kernels)), replace=False)
        chosen = {name for name in every if any(re.fullmatch(_pattern(each), f"{name}.weight") for each in patterns)}
        if not chosen:
            continue
        found = peft_modules.targets(chosen, every)
        if isinstance(found, str):
            assert {name for name in every if re.fullmatch(found, name)} == chosen
        else:
            assert {name for name in every if any(name == end or name.endswith("." + end) for end in found)} == chosen
        ends = peft_modules.saved(chosen, every)
        assert {name for name in every if any(name.endswith(end) for end in ends)} == chosen


@pytest.mark.parametrize(
    ("case", "targets", "expected"),
    [
        ("gpt2", ".*layers/.*/kernel", ("c_attn", "c_fc", "c_proj")),
        ("gpt2", ".*attention/q/kernel|.*down/kernel", ("c_attn", "mlp.c_proj")),
        ("llama", Q_V, ("q_proj", "v_proj")),
        ("bert", ".*attention/(q|o)/kernel", ("attention.output.dense", "query")),
        ("bert", ".*mlp/down/kernel", r"bert\.encoder\.layer\.\d+\.output\.dense"),
        ("t5", ".*/(attention|cross)/q/kernel", ("q",)),
        ("t5", "decoder/layers/cross/q/kernel", ("EncDecAttention.q",)),
        ("t5", "encoder/layers/attention/q/kernel", r"encoder\.block\.\d+\.layer\.\d+\.SelfAttention\.q"),
    ],
)
def test_target_modules(case: str, targets: str, expected: Any) -> None:
    _, model, params, _ = adapted(case, "lora", targets)
    assert peft_params.export(params, model.config).targets == expected


@pytest.mark.parametrize(
    ("several", "meant", "not_meant"),
    [
        ([("q", "v"), r".*\.(o|down)"], ("q", "x.q", "x.v", "x.down"), ("x.seq", "down", "x.k")),
        ([("q",), ("mlp.up", "q")], ("x.q", "x.mlp.up"), ("x.up", "mlp.up.x")),
        ([("q",), "all-linear"], ("x.q", "anything"), ()),
        ([r"x\.q|x\.k", r"y\.v"], ("x.q", "x.k", "y.v"), ("y.q", "x.v")),
    ],
)
def test_the_union_of_target_modules(several: Any, meant: tuple[str, ...], not_meant: tuple[str, ...]) -> None:
    for each in (several, several[::-1]):
        found = peft_modules.union(each)
        assert all(peft_modules.matches(found, name) for name in meant), found
        assert not any(peft_modules.matches(found, name) for name in not_meant), found


@pytest.mark.parametrize(
    ("targets", "ranks"),
    [
        (("o", "wo"), {"x.0.o": 4, "x.1.o": 4, "x.0.wo": 2, "x.1.wo": 2, "x.2.wo": 2}),
        (r"x\.\d\.w?o", {"x.0.o": 4, "x.1.o": 2, "x.0.wo": 2, "x.1.wo": 2, "x.2.wo": 1}),
    ],
)
def test_ranks_are_read_for_the_modules_for_which_they_were_written(targets: Any, ranks: dict[str, int], tmp_path: Path) -> None:
    _, model, params, _ = adapted("llama", "lora", Q_V)
    shapes = {name + peft.A: (rank, 3) for name, rank in ranks.items()} | {name + peft.B: (5, rank) for name, rank in ranks.items()}
    products = {name: peft.Product(rank, 3.5 if rank == 4 else 2.0) for name, rank in ranks.items()}
    given = dataclasses.replace(
        peft_params.export(params, model.config),
        targets=targets,
        products=products,
        shapes=shapes,
        read=lambda name: np.zeros(shapes[name], np.float32),
    )
    peft.write(tmp_path, given)
    assert peft.read(tmp_path).products == products


def test_ranks_of_gpt2_are_those_of_its_kernels_side_by_side(tmp_path: Path) -> None:
    _, model, params, _ = adapted("gpt2", "rslora", ".*layers/.*/kernel")
    peft.write(tmp_path, peft_params.export(params, model.config, rslora=True))
    values = json.loads((tmp_path / peft.CONFIG).read_text())
    assert (values["r"], values["lora_alpha"], values["rank_pattern"]) == (3, 7, {"c_attn": 9})
    assert values["alpha_pattern"]["c_attn"] == pytest.approx(7 * 3**0.5)
    assert values["fan_in_fan_out"] is True


def test_a_module_that_is_missing_where_names_have_no_prefix() -> None:
    """target_modules are then a pattern for the names of a class without a head."""
    config, model, params, base = adapted("bert alone", "lora", ".*(attention/o|mlp/down)/kernel")
    whole = peft_params.export(params, model.config)
    kept = {name: shape for name, shape in whole.shapes.items() if ".attention." in name}
    products = {name: product for name, product in whole.products.items() if ".attention." in name}
    part = dataclasses.replace(whole, targets=r"encoder\..*output\.dense", products=products, shapes=kept)
    with pytest.raises(ValueError, match=r"missing \(2\): bert.encoder.layer.0.output.dense, bert.encoder.layer.1.output.dense"):
        peft_attach.attach(base, without_transforms(config), part)


def test_kernels_of_a_module_need_not_be_alike(tmp_path: Path) -> None:
    """Of GPT-2's c_attn q and k may read the same and v not, and each may have a scale of its own."""
    _, model, params, _ = adapted("gpt2", "lora", ".*attention/(q|k|v)/kernel")
    for layer in params["layers"]:
        q, k = (layer["attention"][part] for part in "qk")
        k["kernel"] = dataclasses.replace(k["kernel"], a=q["kernel"].a, scale=3 * q["kernel"].scale)
    peft.write(tmp_path, peft_params.export(params, model.config))
    read, name = peft.read(tmp_path), "transformer.h.1.attn.c_attn"
    both = (weights.export(each, "GPT2LMHeadModel", model.config) for each in (peft_base(params), dense(params)))
    begun, expected = (each.make(f"{name}.weight") for each in both)
    np.testing.assert_allclose(merged(read, name, begun), expected, atol=WEIGHT * np.abs(expected).max())


@partial(jax.tree_util.register_dataclass, data_fields=("codes", "factor"), meta_fields=("kind",))
@dataclasses.dataclass(frozen=True)
class Halves(Quantized):
    """Whole numbers of halves: a quantized form that is exact for the numbers of the test."""

    codes: Any
    factor: Any
    kind: str = "halves"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def multiply(self, spec: str, x: jax.Array) -> jax.Array:
        return jnp.einsum(spec, x, self.dense())

    def dense(self) -> jax.Array:
        return self.codes.astype(jnp.float32) * 0.5


@pytest.mark.parametrize("layers_as", ["unrolled", "scan"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_quantized_base(kind: str, layers_as: str, tmp_path: Path) -> None:
    """Written without what it stands beside, and attached to it as to an array."""
    config, model, params, base = adapted("gpt2", kind, ".*(q|up)/kernel", layers_as)

    def quantize(kernel: Any) -> Any:
        factor = jnp.full(kernel.shape[:1] if layers_as == "scan" else (), 0.5)
        return Halves(jnp.round(2 * kernel).astype(jnp.int8), factor)

    coded = jax.tree.map_with_path(
        lambda path, node: quantize(node) if re.fullmatch(".*layers/.*/kernel", tree.path_name(path)) else node, base
    )
    attached = jax.tree.map_with_path(
        lambda path, node, code: dataclasses.replace(node, base=code) if adapt.is_adapter(node) else code,
        params,
        jax.tree.unflatten(jax.tree.structure(params, is_leaf=leaf.is_type), jax.tree.leaves(coded, is_leaf=leaf.is_type)),
        is_leaf=leaf.is_type,
    )
    peft.write(tmp_path, peft_params.export(attached, model.config))
    coded_config = without_transforms(config)
    coded_config.train.transforms, coded_config.lora.init = ("int8",), "pissa"
    again, described = peft_attach.attach(coded, coded_config, peft.read(tmp_path))
    assert (described.train.transforms, described.lora.init) == (("int8", kind), "zero")
    assert sum(isinstance(getattr(node, "base", None), Halves) for node in jax.tree.leaves(again, is_leaf=leaf.is_type)) == (
        4 if layers_as == "scan" else 8
    )
    for found, exact in zip(jax.tree.leaves(dense(again)), jax.tree.leaves(dense(attached)), strict=True):
        np.testing.assert_allclose(found, exact, atol=1e-5)


def test_pissa_needs_the_model_that_it_began_with() -> None:
    _, model, params, base = adapted("llama", "pissa", EVERY)
    other = jax.tree.map(lambda array: array + 0.01 * jnp.sin(jnp.arange(array.size).reshape(array.shape)), base)
    adapter = peft_params.export(params, model.config, original=other)
    with pytest.raises(ValueError, match=r"differ in more than the rank 3 that PiSSA took out[\s\S]*\n  Accepted: [\s\S]*--base"):
        adapter.factors("model.layers.0.mlp.up_proj")
    # In bfloat16, as frozen kernels may be kept, their rounding is no other base.
    rounded = jax.tree.map(
        lambda node: dataclasses.replace(node, base=node.base.astype("bfloat16")) if adapt.is_adapter(node) else node,
        params,
        is_leaf=adapt.is_adapter,
    )
    adapter = peft_params.export(rounded, model.config, original=base)
    name = "model.layers.0.mlp.up_proj"
    exact = weights.export(dense(rounded), "LlamaForCausalLM", model.config).make(f"{name}.weight")
    begun = weights.export(base, "LlamaForCausalLM", model.config).make(f"{name}.weight")
    np.testing.assert_allclose(merged(adapter, name, begun), exact, atol=2.0**-7 * np.abs(exact).max())


@pytest.mark.parametrize(
    ("case", "targets", "whole", "words"),
    [
        (
            "gpt2",
            ".*attention/q/kernel",
            {"layers/attention/v/bias"},
            r"same module: transformer.h.0.attn.c_attn, transformer.h.1.attn",
        ),
        ("bert", ".*mlp/up/kernel", {"layers/mlp/up/bias"}, r"same module: bert.encoder.layer.0.intermediate.dense, bert"),
    ],
)
def test_a_bias_beside_an_adapter_has_no_place(case: str, targets: str, whole: set[str], words: str) -> None:
    _, model, params, _ = adapted(case, "lora", targets)
    with pytest.raises(ValueError, match=rf"{words}[\s\S]*\n  Accepted: in PEFT a module has an adapter, or it is stored whole"):
        peft_params.export(params, model.config, whole=whole)


def test_what_is_no_adapter() -> None:
    _, model, params, base = adapted("llama", "lora", EVERY)
    with pytest.raises(ValueError, match=r"hold no adapter.\n  Accepted: either lora or dora"):
        peft_params.export(base, model.config)
    inside = jax.tree.map(
        lambda node: dataclasses.replace(node, base=node) if adapt.is_adapter(node) else node, params, is_leaf=adapt.is_adapter
    )
    with pytest.raises(ValueError, match=r"hold an adapter inside of an adapter.\n  Accepted: "):
        peft_params.export(inside, model.config)
