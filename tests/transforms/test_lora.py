"""LoRA and DoRA beside their papers' formulas in NumPy float64, at kernels of every shape and in models of every family."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parallel import combinations

from jaxllm import config as configs
from jaxllm import models
from jaxllm.transforms import adapt, dora, leaf, lora, product, tree
from jaxllm.transforms.quantized import Quantized
from jaxllm.types import Transform

# What it is, product, shape of x, shape of the kernel, axes that are summed over.
KERNELS = {
    "q": ("BTD,DHK->BTHK", (2, 5, 8), (8, 4, 6), 1),
    "k of fewer heads": ("BTD,DHK->BTHK", (2, 5, 8), (8, 2, 6), 1),
    "v of a longer memory": ("BTD,DHK->BTHK", (2, 9, 8), (8, 4, 6), 1),
    "o": ("BTHK,HKD->BTD", (2, 5, 4, 6), (4, 6, 8), 2),
    "up": ("BTD,DF->BTF", (2, 5, 8), (8, 12), 1),
    "down": ("BTF,FD->BTD", (2, 5, 12), (12, 8), 1),
    "square": ("BTD,DE->BTE", (2, 5, 8), (8, 8), 1),
}
RANK, SCALE = 3, 1.75
KINDS = {"lora": lora.Lora, "dora": dora.Dora}


def settings(**fields: Any) -> Any:
    config = configs.base()
    config.lora.update({"rank": RANK, "alpha": SCALE * RANK, **fields})
    return config


def draw(shape: tuple[int, ...], inputs: int, kind: str, dropout_frac: float = 0.0, seed: int = 0) -> Any:
    """A leaf of random numbers; nothing is zero, and the magnitudes are not the norms."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=shape).astype(np.float32)
    a = rng.normal(size=(*shape[:inputs], RANK)).astype(np.float32)
    b = rng.normal(size=(RANK, *shape[inputs:])).astype(np.float32)
    beside = {"magnitude": rng.uniform(1, 3, shape[inputs:]).astype(np.float32)} if kind == "dora" else {}
    return KINDS[kind](base, a, b, SCALE, dropout_frac, **beside)


def matrices(node: Any, inputs: int) -> tuple[np.ndarray, ...]:
    """W [I, O], A [I, R], B [R, O], m [O] (None in LoRA) in float64."""
    rows = math.prod(node.base.shape[:inputs])
    w, a, b = (np.asarray(x, np.float64) for x in (node.base, node.a, node.b))
    m = np.asarray(node.magnitude, np.float64).ravel() if isinstance(node, dora.Dora) else None
    return w.reshape(rows, -1), a.reshape(rows, RANK), b.reshape(RANK, -1), m


def flat(x: Any, columns: int) -> np.ndarray:
    return np.asarray(x, np.float64).reshape(-1, columns)


def close(found: Any, expected: np.ndarray, share: float = 2e-6) -> None:
    """Float32 sums of some tens of products are within 2e-6 of the largest number."""
    np.testing.assert_allclose(np.asarray(found).reshape(expected.shape), expected, rtol=0, atol=share * np.abs(expected).max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_product_and_its_gradients_are_those_of_the_paper(kernel: str, kind: str) -> None:
    """Hu et al. 2021, eq. 3; Liu et al. 2024, eq. 5 and 11: in DoRA's gradients the norm is a constant."""
    spec, x_shape, shape, inputs = KERNELS[kernel]
    node = draw(shape, inputs, kind)
    w, a, b, m = matrices(node, inputs)
    x = np.random.default_rng(1).normal(size=x_shape).astype(np.float32)
    x_NI, v = flat(x, len(w)), w + SCALE * a @ b
    norm = np.sqrt((v**2).sum(0))
    factor = np.ones(len(norm)) if m is None else m / norm
    y, backward = jax.vjp(partial(leaf.einsum, spec), x, node)
    close(y, factor * (x_NI @ v))
    g = np.random.default_rng(2).normal(size=y.shape).astype(np.float32)
    dx, dnode = backward(g)
    dv = x_NI.T @ flat(g, len(norm)) * factor
    close(dx, (flat(g, len(norm)) * factor) @ v.T)
    close(dnode.a, SCALE * dv @ b.T)
    close(dnode.b, SCALE * a.T @ dv)
    if m is not None:
        close(dnode.magnitude, (flat(g, len(norm)) * (x_NI @ v)).sum(0) / norm)
        through_norm = dv - v * (v * dv).sum(0) / norm**2  # what it would be if the norm moved too
        whole = SCALE * a.T @ through_norm
        assert np.abs(dnode.b.reshape(whole.shape) - whole).max() > 0.05 * np.abs(whole).max()
    close(leaf.dense(node), factor * v)
    assert node.shape == shape


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_new_adapter_changes_no_bit(kind: str, dtype: str) -> None:
    """Where the compiler has no say. In a whole model it may round in another place; see below."""
    for spec, x_shape, shape, inputs in KERNELS.values():
        rng = np.random.default_rng(0)
        w, x = (jnp.asarray(rng.normal(size=size), dtype) for size in (shape, x_shape))
        make = {"lora": lora.make, "dora": dora.make}[kind](settings())
        node = make.apply(w.astype(jnp.float32), inputs, jax.random.key(3))
        assert (node.a != 0).all() and node.a.shape == (*shape[:inputs], RANK) and not node.b.any()
        # Drawn from the whole of +-1 / sqrt(inputs): of 24 numbers or more, some lie in the last third on either side.
        bound = math.prod(shape[:inputs]) ** -0.5
        assert -bound <= node.a.min() < -bound * 2 / 3 and bound * 2 / 3 < node.a.max() <= bound
        found = leaf.einsum(spec, x, node)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, product.product(spec, x, w))
        np.testing.assert_array_equal(leaf.dense(node), w)


def test_an_output_of_zeros_stays_one() -> None:
    """DoRA divides by its length."""
    w = np.ones((8, 4), np.float32) * [1, 0, 1, 1]
    node = dora.make(settings()).apply(jnp.asarray(w, jnp.float32), 1, jax.random.key(0))
    y, backward = jax.vjp(partial(leaf.einsum, "BTD,DE->BTE"), np.ones((1, 1, 8), np.float32), node)
    np.testing.assert_array_equal(y, [[[8, 0, 8, 8]]])
    assert all(np.isfinite(array).all() for array in jax.tree.leaves(backward(y)))


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_falls_on_what_the_adapter_reads(kind: str) -> None:
    """In DoRA also on what it adds to x W, as in PEFT: y = x W + (m / norm - 1) d W + m / norm s d A B, d = drop(x)."""
    x, frac = np.random.default_rng(1).normal(size=(40, 50, 12)).astype(np.float32), 0.25
    seen = lora.Lora(jnp.zeros((12, 12)), jnp.eye(12), jnp.eye(12), 1.0, frac)  # shows what is left of x

    def left(key: int) -> np.ndarray:
        return np.asarray(leaf.einsum("BTD,DE->BTE", x, seen, jax.random.key(key)), np.float64)

    d = left(0)
    np.testing.assert_array_equal(d, left(0))
    assert (d != left(1)).any() and 0.74 < (d != 0).mean() < 0.76
    np.testing.assert_allclose(d[d != 0], x[d != 0] / (1 - frac), rtol=1e-6)
    np.testing.assert_array_equal(leaf.einsum("BTD,DE->BTE", x, seen), x)  # without a key
    spec, _, shape, inputs = KERNELS["down"]
    node = draw(shape, inputs, kind, frac)
    w, a, b, m = matrices(node, inputs)
    factor = np.ones(8) if m is None else m / np.sqrt(((w + SCALE * a @ b) ** 2).sum(0))
    close(leaf.einsum(spec, x, node, jax.random.key(0)), x @ w + factor * SCALE * (d @ a @ b) + (factor - 1) * (d @ w), 4e-6)


def test_the_scale() -> None:
    for fields, expected in (({}, SCALE), ({"rslora": True}, SCALE * RANK / math.sqrt(RANK))):
        assert lora.scale(settings(**fields).lora) == pytest.approx(expected)
        node = lora.make(settings(**fields)).apply(jnp.ones((8, 12)), 1, jax.random.key(0))
        node = dataclasses.replace(node, b=jnp.ones((RANK, 12)))
        close(leaf.dense(node), 1 + expected * np.asarray(node.a, np.float64).sum(1, keepdims=True) * np.ones((8, 12)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", ["q", "o", "up"])
def test_pissa_begins_with_the_best_approximation(kernel: str, kind: str) -> None:
    """Meng et al. 2024, eq. 2-4. No matrix of rank R is nearer to W (Eckart and Young), and the model is what it was."""
    _, _, shape, inputs = KERNELS[kernel]
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    node = {"lora": lora.make, "dora": dora.make}[kind](settings(init="pissa")).apply(w, inputs, jax.random.key(0))
    rest, a, b, _ = matrices(node, inputs)
    assert np.abs(leaf.dense(node) - w).max() < 1e-6 * np.abs(w).max()
    values = np.linalg.svd(w.reshape(len(rest), -1).astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(np.linalg.norm(rest), np.linalg.norm(values[RANK:]), rtol=1e-6)
    np.testing.assert_allclose(np.linalg.svd(SCALE * a @ b, compute_uv=False)[:RANK], values[:RANK], rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1), rtol=1e-6)  # shared out evenly


def test_pissa_refuses_a_rank_that_the_kernel_has_not() -> None:
    with pytest.raises(ValueError, match=r"lora.rank = 9 .* 8 x 12.\n  Accepted: up to 8"):
        lora.make(settings(init="pissa", rank=9)).apply(jnp.ones((8, 12)), 1, jax.random.key(0))


@partial(jax.tree_util.register_dataclass, data_fields=("codes",), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Eighths(Quantized):
    """Whole numbers of eighths."""

    codes: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def multiply(self, spec: str, x: jax.Array) -> jax.Array:
        return product.product(spec, x, self.dense())

    def dense(self) -> jax.Array:
        return self.codes.astype(jnp.float32) / 8


EIGHTHS = Transform(
    "layers/.*", lambda kernel, inputs, rng: Eighths(jnp.round(8 * kernel).astype(jnp.int8)), lambda axes, inputs: Eighths(axes)
)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("make", [lora.make, dora.make])
def test_frozen_forms_stand_inside_an_adapter(make: Any, stacked: bool) -> None:
    """In both orders; what PiSSA leaves is quantized, and what was quantized is not decomposed."""
    one, kernel = ("heads", "head_dim", "embed"), np.random.default_rng(0).normal(size=(2, 4, 6, 8)).astype(np.float32)
    axes = {"layers": {"o": ("layers", *one)} if stacked else [{"o": one}] * 2}
    params = {"layers": {"o": kernel} if stacked else [{"o": kernel[0]}, {"o": kernel[1]}]}

    def first(transforms: tuple[Transform, ...]) -> Any:
        found = adapt.Adaptation(axes, transforms)
        tree_of_axes, made = found.axes(), found.params(params, jax.random.key(0))
        flat_axes = jax.tree.leaves(tree_of_axes, is_leaf=adapt.is_axes)
        assert [len(names) for names in flat_axes] == [array.ndim for array in jax.tree.leaves(made)]
        assert jax.tree.structure(tree_of_axes, is_leaf=adapt.is_axes) == jax.tree.structure(made)
        return jax.tree.map(lambda array: array[0], made["layers"]["o"]) if stacked else made["layers"][0]["o"]

    for init in ("zero", "pissa"):
        adapter = make(settings(init=init, targets="layers/.*"))
        alone, inside = first((adapter,)), first((adapter, EIGHTHS))
        assert isinstance(inside, lora.Lora) and isinstance(inside.base, Eighths)
        np.testing.assert_array_equal(inside.base.codes, np.round(8 * np.asarray(alone.base)))
        np.testing.assert_array_equal(inside.a, alone.a)
    around = first((EIGHTHS, make(settings(targets="layers/.*"))))
    assert isinstance(around, lora.Lora) and isinstance(around.base, Eighths) and around.a.shape == (4, 6, RANK)
    np.testing.assert_array_equal(around.base.codes, np.round(8 * kernel[0]))
    np.testing.assert_allclose(leaf.dense(around), around.base.dense(), atol=1e-6)
    with pytest.raises(ValueError, match="Accepted: train.transforms with the adapter first"):
        first((EIGHTHS, make(settings(init="pissa", targets="layers/.*"))))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", combinations.OBJECTIVES)
def test_a_model_is_what_it_was_and_what_it_is_merged_into(family: str, kind: str) -> None:
    """A new LoRA moves no bit of the logits, a new DoRA moves them by rounding; drawn at random they do what the merged weights do.

    Narrower matrices, 32 wide, are multiplied in loops that XLA fuses with what stands around them, which rounds otherwise.
    """
    form = "scan" if kind == "lora" else "unrolled"
    wide = {"model__width": 64, "model__mlp_width": 256}
    config = combinations.config_of(family, model__layers=2, model__layers_as=form, train__batch_seqs=2, **wide)
    batch = combinations.batch_of(family, rows=4)
    beside = {name: batch[name] for name in ("inputs", "token_types") if name in batch}
    plain = models.build(config)
    config.train.transforms = (kind,)
    config.lora.rank, config.lora.alpha = 4, 4.0
    model = models.build(config)
    run, run_plain = (jax.jit(partial(each.apply, **beside)) for each in (model, plain))

    def check(params: Any, dense: Any, most: float) -> np.ndarray:
        found, expected = run(params, batch["tokens"]), run_plain(dense, batch["tokens"])
        assert np.abs(found - expected).max() <= most * np.abs(expected).max()
        return expected

    begun, dense = model.init(jax.random.key(0)), plain.init(jax.random.key(0))
    at_first = check(begun, dense, 0.0 if kind == "lora" else 2e-6)
    drawn = combinations.parameters(model)
    merged = adapt.merged(drawn)
    later = check(drawn, merged, 1e-5)
    assert np.abs(later - at_first).max() > 0.1 * np.abs(later).max()
    assert jax.tree.structure(merged) == jax.tree.structure(dense)
    bases = [array for name, array in tree.named_leaves(begun) if not name.endswith(("/a", "/b", "/magnitude"))]
    jax.tree.map(np.testing.assert_array_equal, bases, jax.tree.leaves(dense))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_what_was_trained_beside_codes_is_merged_into_what_they_stand_for(form: str, kind: str) -> None:
    """qlora#28, unsloth-zoo#810: merged into the kernels that were quantized it is another model, by the error of the codes."""
    layers = {"model__layers": 2, "model__layers_as": "scan" if kind == "lora" else "unrolled"}
    config = combinations.config_of("llama", model__width=64, model__mlp_width=128, **layers)
    plain, tokens = models.build(config), combinations.batch_of("llama", rows=4)["tokens"]
    config.train.transforms, config.lora.rank, config.lora.alpha = (form, kind), 4, 4.0
    model = models.build(config)
    begun, adapters, rng = model.init(jax.random.key(0)), adapt.adapters(model.axes), np.random.default_rng(0)

    def move(path: Any, array: jax.Array) -> jax.Array:
        return array + rng.normal(0, 0.1, array.shape).astype(np.float32) if tree.path_name(path) in adapters else array

    trained, dense = jax.tree.map_with_path(move, begun), plain.init(jax.random.key(0))
    run, run_plain = jax.jit(model.apply), jax.jit(plain.apply)
    before, after = run(begun, tokens), run(trained, tokens)
    most = np.abs(after).max()
    assert np.abs(run_plain(adapt.merged(trained), tokens) - after).max() <= 1e-5 * most
    # Both are seen at all: what was learned, and the error of the codes.
    for other in (after, run_plain(dense, tokens)):
        assert np.abs(other - before).max() > 1e-2 * most


def test_a_model_drops_with_a_key_alone() -> None:
    config = combinations.config_of("llama", model__layers=2, train__transforms=("lora",), lora__dropout_frac=0.3)
    model, tokens = models.build(config), combinations.batch_of("llama", rows=4, tokens=16)["tokens"]
    params = combinations.parameters(model)
    apply = jax.jit(lambda key: model.apply(params, tokens, rng=key))
    one, again, other = (apply(jax.random.key(seed)) for seed in (0, 0, 1))
    none = jax.jit(model.apply)(params, tokens)
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.01 * np.abs(none).max() < np.abs(one - none).max() * 10
