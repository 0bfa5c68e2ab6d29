"""A linear regression under the train step: every number of it is known to NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import tiny_training as tiny

from jaxllm.engine import gradients
from jaxllm.engine import state as states
from jaxllm.engine import step as steps
from jaxllm.optim import build
from jaxllm.parallel import plan as plans
from jaxllm.parallel.region import Region
from jaxllm.transforms import tree
from jaxllm.types import Mean, Model

LR, B1 = 0.1, 0.9
WIDTH, EXAMPLES = 3, 8


def batch(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((EXAMPLES, WIDTH)).astype(np.float32)
    weights = rng.choice([0.5, 1.0, 2.0], (EXAMPLES, 1)).astype(np.float32)
    weights[3] = 0
    return {"x": x, "y": rng.standard_normal((EXAMPLES, 1)).astype(np.float32), "weights": weights}


def squared_error(params, batch, rng):
    """Sum of w (x . kernel + bias - y)^2; reports a random number where dropout is on."""
    error = batch["x"] @ params["kernel"][:, None] + params["bias"] - batch["y"]
    weight = jnp.sum(batch["weights"])
    mean = Mean(jnp.sum(batch["weights"] * error**2), weight)
    noise = {} if rng is None else {"noise": Mean(jax.random.uniform(rng), jnp.ones(()))}
    return mean, {"loss": mean, **noise}


def make(dtype=jnp.float32, objective=squared_error, **overrides):
    """(compiled step, fresh state, place) of the regression; `dead` is a parameter that nothing depends on. The learning rate of the
    first step is LR, of the second one 2 LR, ..."""
    config = tiny.config_of({"optimizer.weight_decay": 0.0, "optimizer.groups": ()} | overrides)
    plan = plans.make(config, jax.devices()[:1])
    shapes = {"kernel": (WIDTH,), "bias": (1,), "dead": (2,)}
    axes = dict.fromkeys(shapes, ("head_dim",))

    def init(rng):
        return {name: jax.random.normal(jax.random.fold_in(rng, len(name)), shape) for name, shape in shapes.items()}

    model = Model("regression", None, axes, init, *[None] * 7)
    optimizer = build.make(config, axes)
    region = Region(plan, axes, ())
    step = steps.make(
        gradients.make(objective, model, config, region), optimizer, lambda n: jnp.float32(LR) * (n + 1), config, region
    )
    abstract = states.abstract(model, optimizer, config, plan)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=plan.batch_sharding()), batch())
    executable = steps.compile(step, abstract, like)

    def place(batch):
        return jax.device_put(batch, plan.batch_sharding())

    return executable, lambda: states.create(model, optimizer, config, plan), place


def gradient(params, batch):
    x, y, w = (batch[name].astype(np.float64) for name in ("x", "y", "weights"))
    error = x @ np.float64(params["kernel"])[:, None] + np.float64(params["bias"]) - y
    weight = w.sum()
    return {"kernel": (2 * w * error * x).sum(0) / weight, "bias": (2 * w * error).sum(0) / weight}, (w * error**2).sum() / weight


def momentum(state):
    """Adam's first moment over 1 - b1: after one step the very gradient that went into the optimizer."""
    return {
        name.rpartition("mu/")[2]: np.asarray(leaf) / (1 - B1) for name, leaf in tree.named_leaves(state.opt_state) if "mu/" in name
    }


def norm_of(gradients):
    return np.sqrt(sum(np.sum(np.square(np.float64(g))) for g in gradients.values()))
