"""Layer-wise learning-rate decay against a table of factors, for both forms of the layer stack and every kind of model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import config as configs
from jaxllm import models
from jaxllm.optim import build
from jaxllm.transforms import tree

DECAY, LAYERS, DECODER_LAYERS = 0.7, 3, 2
# Parts of a path name -> factors of the layers, from the first one on, or of an array outside of them; the first match counts.
STACKS = {"decoder/layers/": [0.7, 1.0], "layers/": [0.49, 0.7, 1.0]}
OUTSIDE = {"embed/": 0.343, "encoder/relative": 0.343, "decoder/relative": 0.49, "": 1.0}


def config_of(name, layers_as, decay, /, **optimizer):
    config = configs.base()
    config.model.update(
        {
            "name": name,
            "layers": LAYERS,
            "decoder_layers": DECODER_LAYERS if name == "t5" else 0,
            "width": 16,
            "heads": 2,
            "mlp_width": 24,
            "vocab_size": 20,
            "context_tokens": 8,
            "layers_as": layers_as,
        }
    )
    config.optimizer.update({"layer_decay": decay, **optimizer})
    return config


def updates(name, layers_as, decay, trained=".*", /, **optimizer):
    """The first updates of the parameters of a model, from the same gradients in both forms."""
    config = config_of(name, layers_as, decay, **optimizer)
    model = models.build(config)
    params, _ = tree.split(model.init(jax.random.key(0)), tree.matches(trained, model.axes))
    made = build.make(config, model.axes)
    # A function of each number by itself, so that both forms get the same ones.
    gradients = jax.tree.map(lambda leaf: jnp.cos(1000 * leaf), params)
    return made.update(gradients, made.init(params), params)[0]


def per_layer(found):
    """(name, layer or None, array) of each array, a stacked one layer by layer."""
    for path, leaf in jax.tree.leaves_with_path(found):
        name = tree.path_name(path)
        if "layers/" not in name:
            yield name, None, leaf
        elif any(isinstance(key, jax.tree_util.SequenceKey) for key in path):
            yield name, next(key.idx for key in path if isinstance(key, jax.tree_util.SequenceKey)), leaf
        else:
            yield from ((name, layer, part) for layer, part in enumerate(leaf))


def expected(name, layer):
    if layer is None:
        return next(factor for part, factor in OUTSIDE.items() if name.startswith(part))
    return next(factors for part, factors in STACKS.items() if part in name)[layer]


@pytest.mark.parametrize("layers_as", ["unrolled", "scan"])
@pytest.mark.parametrize("name", ["gpt", "bert", "t5"])
def test_each_parameter_has_the_factor_of_its_depth(name, layers_as):
    plain = per_layer(updates(name, layers_as, 1.0))
    slower = per_layer(updates(name, layers_as, DECAY))
    seen = set()
    for (path, layer, whole), (_, _, part) in zip(plain, slower, strict=True):
        np.testing.assert_allclose(part, whole * expected(path, layer), rtol=1e-6, err_msg=f"{path} of layer {layer}")
        seen.add(expected(path, layer))
    assert seen == {0.343, 0.49, 0.7, 1.0}


@pytest.mark.parametrize("optimizer", [{}, {"name": "muon"}, {"name": "adafactor"}, {"state": "bfloat16"}])
def test_it_multiplies_what_any_optimizer_and_group_say(optimizer):
    groups = ((".*mlp.*", 0.5, 1.0),)
    plain = updates("llama", "unrolled", 1.0, groups=groups, **optimizer)
    slower = tree.stack_layers(updates("llama", "unrolled", DECAY, groups=groups, **optimizer))
    scanned = updates("llama", "scan", DECAY, groups=groups, **optimizer)
    for (path, layer, whole), (_, _, part), (_, _, also) in zip(
        per_layer(tree.stack_layers(plain)), per_layer(slower), per_layer(scanned), strict=True
    ):
        np.testing.assert_allclose(part, whole * expected(path, layer), rtol=1e-6, err_msg=path)
        # The five Newton-Schulz steps of muon magnify a rounding by up to 485.
        np.testing.assert_allclose(also, part, rtol=0, atol=1e-5 * np.abs(part).max(), err_msg=path)


@pytest.mark.parametrize("layers_as", ["unrolled", "scan"])
def test_the_embedding_counts_frozen_layers(layers_as):
    (_, whole), (_, part) = (tree.named_leaves(updates("gpt", layers_as, decay, "embed/tokens"))[0] for decay in (1.0, DECAY))
    np.testing.assert_allclose(part, whole * 0.343, rtol=1e-6)


def test_the_state_is_as_without_it():
    models_of = {decay: models.build(config_of("gpt", "scan", decay)) for decay in (1.0, DECAY)}
    states = [
        jax.eval_shape(build.make(config_of("gpt", "scan", decay), model.axes).init, jax.eval_shape(model.init, jax.random.key(0)))
        for decay, model in models_of.items()
    ]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
