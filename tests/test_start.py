"""Training that begins with a model: from every kind of source its weights to the bit, and what does not fit is said."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_gguf
from begun import BYTES, begin, config_of, equal, save, write_sources
from random_run import write_run

from jaxllm import config as schema
from jaxllm import logits, models, runs, start
from jaxllm.transforms import adapt, tree
from jaxllm.transforms.affine import Affine
from jaxllm.transforms.lora import Lora


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def sources(folder: Path) -> dict[str, Path]:
    return write_sources(folder)


@pytest.mark.parametrize("form", ["scan", "unrolled"])
@pytest.mark.parametrize("name", ["unrolled", "scan", "adapted", "hf", "gguf", "peft_unrolled", "peft_hf"])
def test_a_model_begins_with_the_weights_of_its_source(sources: dict[str, Path], tmp_path: Path, name: str, form: str) -> None:
    """To the bit, dense and beneath adapters; so are the logits, which the same program makes of the same numbers."""
    source = runs.load(sources[name])
    merged = tree.stack_layers(adapt.merged(source.params))
    session, params, said = begin(config_of(sources[name], model__layers_as=form), tmp_path)
    base = name.removeprefix("peft_")
    assert said == f"begins with {sources[name]}" + (f" merged into {sources[base]}" if base != name else "")
    equal(tree.stack_layers(params), merged)
    state = session.create(params)  # which takes the arrays
    source.config.model.layers_as, source.config.train.transforms = form, ()
    expected = logits.of(source.config, tree.unstack_like(merged, models_like(session)))
    np.testing.assert_array_equal(logits.of(session.config, state.params), expected)
    config = config_of(sources[name], model__layers_as=form, train__transforms=("lora",), lora__rank=2)
    session, params, said = begin(config, tmp_path)
    equal(tree.stack_layers(adapt.merged(params)), merged)
    drawn = [array for name, array in tree.named_leaves(params) if name.endswith("/a")]
    random = [array for name, array in tree.named_leaves(session.create().params) if name.endswith("/a")]
    equal(drawn, random)  # what a start draws does not hang on where the kernels come from, and no two layers draw alike


CODED = {"train__transforms": ("int4",), "quant__group": 8, "quant__symmetric": False, "quant__targets": ".*mlp/.*/kernel"}


@pytest.fixture(scope="module")
def coded(folder: Path, sources: dict[str, Path]) -> Path:
    """A run whose kernels are codes that rounding their dense kernels to the nearest would not find."""
    path = write_run(folder / "coded", model__name="llama", **CODED)
    run = runs.load(sources["unrolled"])
    config = schema.load(path / "config.json")
    model = models.build(schema.with_vocabulary(config, run.tokenizer.vocab_size))
    params = adapt.Adaptation(run.model.axes, model.config.transforms).params(run.params, jax.random.key(0))

    def wider(node: Any) -> Any:
        return dataclasses.replace(node, scale=node.scale * 1.25) if isinstance(node, Affine) else node

    save(path, jax.tree.map(wider, params, is_leaf=lambda node: isinstance(node, Affine)))
    return path


@pytest.mark.parametrize("form", ["scan", "unrolled"])
def test_codes_are_taken_over_as_they_are(sources: dict[str, Path], coded: Path, tmp_path: Path, form: str) -> None:
    """The model brings its form: adapters stand beside its own codes, and what is trained leaves them."""
    source = runs.load(coded)
    config = config_of(coded, model__layers_as=form, train__transforms=("lora",), lora__rank=2)
    session, params, _ = begin(config, tmp_path)
    assert session.config.train.transforms == ("int4", "lora") and session.config.quant.group == 8
    layers = tree.stack_layers(params)["layers"]
    for name in ("gate", "up", "down"):
        kernel = layers["mlp"][name]["kernel"]
        assert isinstance(kernel, Lora) and isinstance(kernel.base, Affine)
        equal(kernel.base, tree.stack_layers(source.params)["layers"]["mlp"][name]["kernel"])
    assert isinstance(layers["attention"]["q"]["kernel"].base, jax.Array)
    again = adapt.Adaptation(runs.load(sources["unrolled"]).model.axes, source.model.config.transforms)
    rounded = tree.stack_layers(again.params(adapt.merged(source.params), jax.random.key(0)))["layers"]["mlp"]["up"]["kernel"]
    assert not np.array_equal(rounded.dense(), layers["mlp"]["up"]["kernel"].base.dense())
    state = session.create(params)
    assert {name for name, _ in tree.named_leaves(state.params)} == adapt.adapters(session.model.axes)
    for fields in ({"quant__group": 4}, {"train__transforms": ("nf4", "lora")}):
        with pytest.raises(ValueError, match=r"contradicts the codes of the model[\s\S]*Accepted: its own form"):
            begin(config_of(coded, **fields), tmp_path / "other")


def models_like(session: Any) -> Any:
    return jax.eval_shape(session.model.init, jax.random.key(0))


def test_a_stack_is_transformed_layer_by_layer(sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No whole stack is dense on a device: what the transforms are given when a model is read is one layer."""
    given, kernel = dict[str, tuple[int, ...]](), adapt.Adaptation.kernel

    def watched(self: Any, name: str, stacked: bool, array: Any, rng: Any, layer: Any) -> Any:
        if isinstance(layer, jax.core.Tracer):  # in shapes of a whole model it is a number
            given[name] = array.shape
        return kernel(self, name, stacked, array, rng, layer)

    monkeypatch.setattr(adapt.Adaptation, "kernel", watched)
    config = config_of(sources["hf"], model__layers_as="scan", train__transforms=("int8", "lora"), lora__rank=2)
    session, params, _ = begin(config, tmp_path)
    whole = {name: node.shape for name, node in tree.named_leaves(params, is_leaf=adapt.is_adapter)}
    assert session.config.model.layers > 1 and any("layers" in name for name in given)
    assert given == {name: shape[1:] if "layers" in name else shape for name, shape in whole.items()}


def test_the_config_takes_what_the_model_says(sources: dict[str, Path], tmp_path: Path) -> None:
    config = start.resolve(config_of(sources["gguf"], model__dropout_frac=0.1), tmp_path)
    model = config.model
    assert (model.name, model.layers, model.width, model.kv_heads) == (
        "llama",
        tiny_gguf.LAYERS,
        tiny_gguf.WIDTH,
        tiny_gguf.KV_HEADS,
    )
    assert model.rope_theta == tiny_gguf.THETA and model.start_rows == tiny_gguf.VOCAB and model.dropout_frac == 0.1
    assert config.tokenizer.kind == "gguf" and Path(config.tokenizer.path) == sources["gguf"]
    tokenizers = {"hf": sources["hf"], "scan": sources["scan"] / "tokenizer"}
    tokenizers |= {"peft_hf": tokenizers["hf"], "peft_unrolled": sources["unrolled"] / "tokenizer"}
    for name, path in tokenizers.items():
        config = start.resolve(config_of(sources[name]), tmp_path)
        assert (config.tokenizer.kind, config.tokenizer.path) == ("file", str(path))
    own = config_of(sources["hf"], tokenizer__kind="file", tokenizer__path="elsewhere")
    assert start.resolve(own, tmp_path).tokenizer.path == "elsewhere"
    assert start.resolve(config_of(""), tmp_path) == config_of("")


def test_what_contradicts_the_model_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    path = sources["gguf"]
    start.resolve(config_of(path, model__layers=tiny_gguf.LAYERS), tmp_path)  # repeats it
    with pytest.raises(
        ValueError, match="contradicts .*model.layers = 3, there 2; model.width = 32, there 64.\n  Accepted"
    ) as error:
        start.resolve(config_of(path, model__layers=3, model__width=32), tmp_path)
    assert len(str(error.value).splitlines()) == 3
    with pytest.raises(ValueError, match="tokenizer.kind = 'char' with train.start"):
        start.resolve(config_of(path, tokenizer__kind="char"), tmp_path)
    with pytest.raises(ValueError, match="model.vocab_size = 200 .*\n  Accepted: 0, or 300 or more"):
        start.resolve(config_of(path, model__vocab_size=200), tmp_path)
    # A default that is asked for is no default.
    for field, words in (("tokenizer.kind", "tokenizer.kind = 'bpe' with"), ("model.layers", "model.layers = 6, there 2")):
        with pytest.raises(ValueError, match=words):
            start.resolve(config_of(path), tmp_path, {field})
    bare = tmp_path / "bare.gguf"
    tiny_gguf.write(bare, tiny_gguf.stored(tiny_gguf.tensors(np.random.default_rng(5))), tiny_gguf.model_values())
    with pytest.raises(ValueError, match="has no tokenizer.\n  Accepted: .*tokenizer.path.\n  "):
        start.resolve(config_of(bare), tmp_path)


def test_a_start_that_is_gone(sources: dict[str, Path], tmp_path: Path) -> None:
    """Is missed by a first start, and not by a run that has begun."""
    gone = config_of(tmp_path / "gone")
    with pytest.raises(ValueError, match="no run in '.*gone': it does not exist") as error:
        start.resolve(gone, tmp_path / "new")
    assert len(str(error.value).splitlines()) == 3
    config = start.resolve(config_of(sources["gguf"]), tmp_path)
    config.train.start = str(tmp_path / "gone")
    run = sources["scan"]
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.json").write_text(schema.to_json(config))
    (begun / "checkpoints").symlink_to(run / "checkpoints")
    assert start.resolve(gone, begun) == config
    for changes, words in (({"kind": "char"}, "tokenizer.kind = 'char' with"), ({"path": "x"}, "tokenizer.path = 'x' and no")):
        other = config_of(tmp_path / "gone")
        other.tokenizer.update(changes)
        with pytest.raises(ValueError, match=words):
            start.resolve(other, begun)
    with pytest.raises(ValueError, match="it does not exist"):
        start.resolve(config_of(tmp_path / "another"), begun)


def test_new_tokens_begin_as_the_mean_of_the_others(sources: dict[str, Path], tmp_path: Path) -> None:
    """In both tables; with adapters they have rows of their own, which are trained."""
    for transforms in ((), ("lora",)):
        config = config_of(sources["gguf"], model__vocab_size=tiny_gguf.VOCAB + 2, train__transforms=transforms)
        session, params, said = begin(config, tmp_path)
        assert said.endswith("; 2 new tokens begin as the mean of the others")
        table = np.asarray(adapt.merged(params)["embed"]["tokens"], np.float64)
        np.testing.assert_allclose(table[-2:], np.broadcast_to(table[:-2].mean(0), (2, tiny_gguf.WIDTH)), atol=1e-7)
        expected = runs.load(sources["gguf"]).params["embed"]["tokens"]
        np.testing.assert_array_equal(table[:-2], expected)
        names = tree.names(session.abstract.params)
        assert ("embed/tokens/rows" in names and "embed/tokens/base" not in names) == bool(transforms)


def test_another_head_is_drawn_at_random(sources: dict[str, Path], tmp_path: Path) -> None:
    """And never made of rows that meant something else."""
    fields = {"model__head": "classify", "model__classes": 5, "train__objective": "sequence_classification"}
    _, params, said = begin(config_of(sources["gguf"], **fields), tmp_path)
    assert said.endswith("; drawn at random: head/kernel")
    assert params["head"]["kernel"].shape == (5, tiny_gguf.WIDTH)
    run = write_run(tmp_path / "classes", model__name="llama", model__layers=1)
    config = schema.load(run / "config.json")
    config.model.head, config.model.classes = "classify", 3
    (run / "config.json").write_text(schema.to_json(config))
    params = models.build(schema.with_vocabulary(config, BYTES)).init(jax.random.key(8))
    save(run, params)
    for classes, remark in ((3, ""), (5, "; drawn at random: head/kernel; not used: head/kernel")):
        _, found, said = begin(config_of(run, **(fields | {"model__classes": classes})), tmp_path)
        assert said == f"begins with {run}{remark}"
        equal(found["embed"], params["embed"])
        assert classes == 5 or np.array_equal(found["head"]["kernel"], params["head"]["kernel"])
    _, found, said = begin(config_of(run), tmp_path)
    assert said.endswith("; drawn at random: head/kernel; not used: head/kernel") and found["head"]["kernel"].shape[0] == BYTES
    with pytest.raises(ValueError, match="has no head/kernel, .*not trained.\n  Accepted: .*lora.also = 'head/.\\*'"):
        begin(config_of(run, train__transforms=("lora",)), tmp_path)
    _, found, _ = begin(config_of(run, train__transforms=("lora",), lora__also="head/.*"), tmp_path)
    assert isinstance(found["head"]["kernel"], jax.Array)


def test_a_classifier_begins_with_a_masked_language_model(tmp_path: Path) -> None:
    """Of which it has other parameters beside the layers: a pooler."""
    run = write_run(tmp_path / "bert", model__name="bert", train__objective="masked_lm")
    for form in ("scan", "unrolled"):
        fields = {"model__head": "classify", "model__classes": 2, "train__objective": "sequence_classification"}
        _, params, said = begin(config_of(run, model__layers_as=form, **fields), tmp_path)
        assert "drawn at random: head/bias, head/kernel, pooler/bias, pooler/kernel; not used: head/" in said
        equal(
            tree.stack_layers(jax.device_get(params["layers"])), tree.stack_layers(jax.device_get(runs.load(run).params["layers"]))
        )


def test_frozen_matrices_in_bfloat16(sources: dict[str, Path], tmp_path: Path) -> None:
    """Half the bytes; what is computed is that of the rounded weights, also after a checkpoint."""
    fields = {"train__transforms": ("lora",), "lora__rank": 2, "model__layers_as": "scan"}
    session, params, _ = begin(config_of(sources["scan"], **fields, precision__frozen="bfloat16"), tmp_path)
    wide, exact, _ = begin(config_of(sources["scan"], **fields), tmp_path)

    def matrices(tree_: Any) -> list[Any]:
        return [leaf for leaf in jax.tree.leaves(tree_) if leaf.ndim > 2 or (leaf.ndim == 2 and min(leaf.shape) > 2)]

    narrow = {leaf.dtype for leaf in matrices(session.abstract.frozen)}
    assert narrow == {jnp.dtype("bfloat16")} and {leaf.dtype for leaf in matrices(wide.abstract.frozen)} == {jnp.dtype("float32")}
    wide_ones = len(jax.tree.leaves(session.abstract.frozen)) - len(matrices(session.abstract.frozen))
    assert sum(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(session.abstract.frozen)) == wide_ones > 0  # vectors
    rounded = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype).astype(leaf.dtype), exact, params)
    np.testing.assert_array_equal(logits.of(session.config, params), logits.of(wide.config, rounded))
    equal(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), rounded)
    merged = adapt.merged(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype("float32")}
    equal(merged, adapt.merged(rounded))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("scan", {"model__layers_as": "scan", "train__transforms": ("lora",), "lora__rank": 2}),
        ("unrolled", {"model__layers_as": "unrolled", "train__trainable": "norm/.*|.*mlp/.*"}),
    ],
)
def test_only_what_is_frozen_is_narrowed(sources: dict[str, Path], tmp_path: Path, name: str, fields: dict[str, Any]) -> None:
    """Each array comes by itself: what is trained of it keeps all its bits."""
    session, params, _ = begin(config_of(sources[name], **fields, precision__frozen="bfloat16"), tmp_path)
    expected = tree.combine(session.abstract.params, session.abstract.frozen)
    dtypes = [(name, leaf.dtype) for name, leaf in tree.named_leaves(params)]
    assert dtypes == [(name, like.dtype) for name, like in tree.named_leaves(expected)]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(session.abstract.params)} == {"float32"}
    assert "bfloat16" in {leaf.dtype.name for leaf in jax.tree.leaves(session.abstract.frozen)}
