"""Every policy gives the same gradients, keeps exactly what it names, and costs the products that it says."""

import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import config as configs
from jaxllm import models
from jaxllm.engine.session import build_session
from jaxllm.models import layers, remat
from jaxllm.parallel import plan
from jaxllm.types import Model

BATCH, LENGTH, WIDTH, HEADS, KV_HEADS, HEAD_DIM, MLP, LAYERS = 2, 64, 32, 4, 2, 8, 96, 3
TOKENS = np.random.default_rng(0).integers(0, 19, (BATCH, LENGTH)).astype(np.int32)


def configure(**switches: Any) -> Any:
    config = configs.base()
    sizes = {"vocab_size": 19, "layers": LAYERS, "width": WIDTH, "heads": HEADS, "kv_heads": KV_HEADS, "mlp_width": MLP}
    config.model.update({**sizes, "context_tokens": LENGTH, "attention_block_tokens": LENGTH, "init_std": 0.3, **switches})
    return config


def build(**switches: Any) -> Model:
    return models.build(configure(**switches))


def draw(model: Model) -> Any:
    """Large normal parameters by NumPy, because compiling `init` costs seconds."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.normal(scale=0.3, size=leaf.shape).astype(np.float32), jax.eval_shape(model.init, jax.random.key(0))
    )


def loss_of(model: Model, rng: jax.Array | None = None) -> Any:
    return lambda params: jnp.mean(jax.nn.logsumexp(model.apply(params, TOKENS, rng=rng), axis=-1) ** 2)


def flops(jaxpr: Any) -> int:
    """Of all matrix products in a jaxpr and everything inside it, the body of a loop counted once."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            summed = eqn.params["dimension_numbers"][0][0]
            total += 2 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[axis] for axis in summed)
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)  # noqa: PLW2901
            total += flops(inner) if hasattr(inner, "eqns") else 0
    return total


def backward_flops(**switches: Any) -> int:
    model = build(layers_as="unrolled", **switches)
    return flops(jax.make_jaxpr(jax.grad(loss_of(model)))(jax.eval_shape(model.init, jax.random.key(0))).jaxpr)


def residual_numbers(**switches: Any) -> int:
    """Numbers that wait for the backward pass, as JAX hands them over: before the compiler, and exact."""
    model = build(layers_as="unrolled", **switches)
    backward = jax.eval_shape(lambda params: jax.vjp(loss_of(model), params)[1], jax.eval_shape(model.init, jax.random.key(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(backward))


def test_the_schema_knows_all_policies() -> None:
    assert configs.SCHEMA["model.remat"].accept.words == ", ".join(remat.POLICIES)


def gradient(rng: jax.Array | None = None, **switches: Any) -> tuple[Any, int]:
    """(gradients, the compiler's temporary bytes)."""
    model = build(attention="plain", **switches)
    params = draw(model)
    compiled = jax.jit(jax.grad(loss_of(model, rng))).lower(params).compile()
    memory: Any = compiled.memory_analysis()
    return compiled(params), memory.temp_size_in_bytes


def test_policies_change_memory_and_no_gradient() -> None:
    """Scanned layers: over unrolled ones XLA's CPU backend keeps nearly everything alive."""
    expected, none_bytes = gradient(layers=6, layers_as="scan")
    temporaries = [none_bytes]
    for policy in ("attention", "dots", "named", "full"):
        gradients, temp_bytes = gradient(layers=6, layers_as="scan", remat=policy)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), expected, gradients)
        temporaries.append(temp_bytes)
    assert temporaries == sorted(temporaries, reverse=True)
    assert temporaries[1] < 0.8 * none_bytes
    assert temporaries[-1] < 0.3 * none_bytes


@pytest.mark.parametrize("policy", ["attention", "full"])
def test_the_backward_pass_draws_the_masks_of_the_forward_pass(policy: str) -> None:
    rng = jax.random.key(7)
    (expected, _), (gradients, _) = (gradient(rng, layers=1, dropout_frac=0.3, remat=remat) for remat in ("none", policy))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), expected, gradients)


# Products of one layer: queries, as large as the output; keys and values; the three of the MLP; scores, or what is read with them.
QUERY = 2 * BATCH * LENGTH * WIDTH * HEADS * HEAD_DIM
KV = 2 * 2 * BATCH * LENGTH * WIDTH * KV_HEADS * HEAD_DIM
WIDE = 2 * BATCH * LENGTH * WIDTH * MLP
SCORES = 2 * BATCH * HEADS * LENGTH * LENGTH * HEAD_DIM


@pytest.mark.parametrize(
    ("switches", "again"),
    [
        ({"remat": "attention"}, 2 * SCORES),
        ({"remat": "attention", "attention": "plain"}, SCORES),
        ({"remat": "dots"}, 2 * SCORES),
        ({"remat": "full"}, 2 * QUERY + KV + 2 * SCORES + 2 * WIDE),  # not down, whose result no derivative needs
        ({"remat": "named", "remat_save": ()}, 2 * QUERY + KV + 2 * SCORES + 2 * WIDE),
        ({"remat": "named"}, 2 * SCORES + 2 * WIDE),
        ({"remat": "named", "remat_save": ("q", "k", "v", "attention_out", "mlp_up", "mlp_gate")}, 2 * SCORES),
    ],
    ids=str,
)
def test_what_is_computed_again(switches: dict[str, Any], again: int) -> None:
    attention = switches.get("attention", "blocked")
    assert backward_flops(**switches) - backward_flops(attention=attention) == LAYERS * again


@pytest.mark.parametrize("switches", [{"remat": "attention"}, {"remat": "named"}], ids=str)
def test_flash_attention_is_not_run_twice(switches: dict[str, Any]) -> None:
    """Its own result and sums are kept under the name "attended"."""
    again = backward_flops(attention="flash", **switches) - backward_flops(attention="flash")
    assert again == (0 if switches["remat"] == "attention" else LAYERS * 2 * WIDE)


STREAM, HEADED, KEYED, INNER = (BATCH * LENGTH * size for size in (WIDTH, HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, MLP))


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("q", HEADED),
        ("k", KEYED),
        ("v", KEYED),
        ("attended", HEADED),
        ("attention_out", STREAM),
        ("mlp_gate", INNER),
        ("mlp_up", INNER),
        ("mlp_out", 0),  # the sum behind it is the next layer's input, which is kept anyhow
        ("layer_in", 0),
    ],
)
def test_a_name_keeps_its_array_and_nothing_else(name: str, numbers: int) -> None:
    assert name in remat.NAMES
    full = residual_numbers(remat="full")
    assert residual_numbers(remat="named", remat_save=(name,)) - full == LAYERS * numbers


def test_kept_numbers_are_those_of_the_formulas() -> None:
    """models/remat.py: D for "full", 3 D + C + 2 F for "dots", 4 D + C for "named"."""
    full = residual_numbers(remat="full")
    assert residual_numbers(remat="named") - full == LAYERS * (HEADED + 2 * KEYED + HEADED + STREAM)
    assert residual_numbers(remat="dots") - full == LAYERS * (HEADED + 2 * KEYED + STREAM + 2 * INNER)
    none, attention = residual_numbers(remat="none"), residual_numbers(remat="attention")
    assert none - attention >= LAYERS * BATCH * HEADS * LENGTH * LENGTH


def test_names_cost_nothing_where_they_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(layers=1)
    params = jax.eval_shape(model.init, jax.random.key(0))

    def lowered() -> str:
        # A new function each time: JAX would find the old one's trace.
        return jax.jit(jax.grad(loss_of(model))).lower(params).as_text()

    with_names = lowered()
    monkeypatch.setattr(layers, "checkpoint_name", lambda array, name: array)
    assert lowered() == with_names


@pytest.mark.parametrize("layers_as", ["unrolled", "scan"])
def test_offloaded_arrays_travel_where_there_are_two_memories(layers_as: str) -> None:
    """Lowered for a GPU that is not there: each name goes to the host and comes back, in each layer or in the body of the scan."""
    moved = {}
    for names in ((), ("q",), ("q", "mlp_up")):
        model = build(layers_as=layers_as, remat="named", remat_save=(), remat_offload=names)
        traced = jax.jit(jax.grad(loss_of(model))).trace(jax.eval_shape(model.init, jax.random.key(0)))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        moved[names] = text.count('_xla_buffer_placement = "pinned_host"'), text.count('_xla_buffer_placement = "device"')
    bodies = LAYERS if layers_as == "unrolled" else 1
    assert moved == {(): (0, 0), ("q",): (bodies, bodies), ("q", "mlp_up"): (2 * bodies, 2 * bodies)}


@pytest.mark.parametrize(
    ("switches", "words"),
    [
        (
            {"remat": "named", "remat_save": ("q", "attention_uot")},
            r"model.remat_save: no array of a layer has the name 'attention_uot'. Did you mean 'attention_out'\?\n  Accepted: layer_in, q",
        ),
        (
            {"remat": "named", "remat_offload": ("x",)},
            "model.remat_offload: no array of a layer has the name 'x'.\n  Accepted: layer_in",
        ),
        (
            {"remat": "full", "remat_offload": ("q",)},
            "with model.remat = 'full', which names nothing.\n  Accepted: model.remat = 'named'",
        ),
    ],
)
def test_names_that_do_not_fit(switches: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build(**switches)


def test_offload_is_refused_where_it_would_do_nothing() -> None:
    config = configure(remat="named", remat_offload=("q",))
    config.parallel.data = 1
    with pytest.raises(
        ValueError, match=r"model.remat_offload = \('q',\) on cpu: its memory is the host's.\n  Accepted: devices with"
    ):
        build_session(config, plan.make(config))
    build_session(config, plan.make_abstract(config))  # planned for devices that are not there

    def device(*kinds: str) -> Any:
        return SimpleNamespace(
            platform="new", device_kind="N1", addressable_memories=lambda: [SimpleNamespace(kind=k) for k in kinds]
        )

    offloads = remat.make(config.model)
    remat.check_offload(offloads, [device("device", "pinned_host")])
    remat.check_offload(remat.Remat("full"), [device("device")])
    with pytest.raises(ValueError, match="on N1: its memories are device, unpinned_host"):
        remat.check_offload(offloads, [device("device", "pinned_host"), device("device", "unpinned_host")])
