"""What a config turns into before the first step: plan, model, optimizer, the step, and what they will cost."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxllm import models, registry
from jaxllm.config import with_classes, with_vocabulary
from jaxllm.data import examples
from jaxllm.engine import gradients, state, step
from jaxllm.models import remat
from jaxllm.optim import build, schedules
from jaxllm.parallel import fits, forms, layout
from jaxllm.parallel.plan import Plan, shard_bytes
from jaxllm.parallel.region import Region
from jaxllm.transforms import adapt, grown, tree
from jaxllm.transforms.lora import Lora
from jaxllm.types import Model, Params

# Stands for a number of classes that only the data will tell.
UNKNOWN_CLASSES = 2
# What is added to each hidden state, or to each logit, at the end.
SHIFTS = ("norm/bias", "head/bias")
# What jax multiplies float32 matrices in where nobody says more.
NARROWED = {"gpu": "TF32, with 10 bits of mantissa,", "tpu": "bfloat16, with 7 bits of mantissa,"}


@dataclass(frozen=True)
class Session:
    """A training setup. `abstract` is the state as shapes and shardings; nothing is allocated yet."""

    config: ConfigDict
    plan: Plan
    region: Region
    model: Model
    optimizer: optax.GradientTransformation
    update: step.Step
    abstract: state.TrainState

    def create(self, params: Params | None = None) -> state.TrainState:
        """The state before the first step. params: to begin with, given away; None: random ones."""
        return state.create(self.model, self.optimizer, self.config, self.plan, params)

    def compile(self) -> step.Compiled:
        """The train step, compiled once and ahead of time."""
        return step.compile(self.update, self.abstract, step.abstract_batch(self.config, self.plan))

    @property
    def first_moves(self) -> Mapping[str, int]:
        """Name -> the update that must change this trained array, where it is not the first one; 0: none.

        A of an adapter has no gradient while B is 0, nor has B of an embedding's while A is; rows of new tokens in an embedding have
        none where no batch has these tokens. What shifts all rewards alike has none where only their differences count.
        """
        names = adapt.adapters(self.model.axes)
        drawn = {name for name in names if name.endswith("/b" if name.startswith(f"{grown.EMBEDDING}/") else "/a")}
        late = dict.fromkeys(drawn, 2) if self.config.lora.init == "zero" else {}
        differences = self.config.train.objective == "reward" and not self.config.reward.centering
        free = dict.fromkeys(SHIFTS, 0) if differences else {}
        return late | free | {name: 0 for name in names if name.endswith("/rows")}

    @property
    def weights(self) -> int:
        """Numbers of all parameters, frozen ones too, those of quantized kernels counted as if they were dense."""
        return forms.weights(tree.combine(self.abstract.params, self.abstract.frozen))

    def describe(self) -> str:
        """What is trained: how many parameters and, where some are not, their share and what the optimizer holds for them."""
        trained = count(self.abstract.params)
        if trained == self.weights:
            return f"{self.config.model.name}, {trained:,} trainable parameters"
        return (
            f"{self.config.model.name}, {trained:,} of {self.weights:,} parameters are trained ({trained / self.weights:.3%}),"
            f" the optimizer holds {bytes_of(self.abstract.opt_state):,} bytes for them"
        )

    def notes(self) -> list[str]:
        """What fits, but is wasteful or of no effect, one line each."""
        found = [*fits.notes(self.config, self.plan.mesh.shape), *_idle_ranks(self), *_idle_dropout(self), *_idle_tokens(self)]
        if isinstance(self.plan.mesh, Mesh):
            found += narrow_products(self.config, self.plan.mesh.devices.flat[0])
        return found

    @property
    def eval_seqs(self) -> int:
        """Rows of a batch of an evaluation: those of a micro-batch, or of all that pass through a pipeline together."""
        train = self.config.train
        return train.batch_seqs if self.plan.mesh.shape["pipe"] > 1 else train.batch_seqs // train.microbatches

    @property
    def row_tokens(self) -> int:
        return examples.row_tokens(self.config)

    @property
    def positions_a_step(self) -> int:
        """Token positions in one batch, those of an encoder and padding included."""
        return self.config.train.batch_seqs * examples.make(self.config).tokens_a_row


def build_session(config: ConfigDict, plan: Plan) -> Session:
    """The setup that the whole config describes on the mesh of `plan`. model.vocab_size must be filled in."""
    model = models.build(config, plan.constrain)
    if isinstance(plan.mesh, Mesh):  # not a plan for devices that are not there
        remat.check_offload(model.config.remat, plan.mesh.devices.flat)
    optimizer = build.make(config, model.axes)
    objective = registry.resolve("objective", config.train.objective)(model, config)
    region = Region(plan, model.axes, tuple(each.path for each in model.stacks))
    found = gradients.make(objective, model, config, region)
    update = step.make(found, optimizer, schedules.make(config), config, region)
    return Session(config, plan, region, model, optimizer, update, state.abstract(model, optimizer, config, plan))


def check(config: ConfigDict, plan: Plan) -> None:
    """ValueError for what cannot run on this mesh, in a moment and without data. An open vocabulary counts as one that divides."""
    config = with_vocabulary(config, plan.mesh.size)
    build_session(with_classes(config, config.model.classes or UNKNOWN_CLASSES), plan)


def count(tree: Any) -> int:
    """Numbers in the arrays of a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def bytes_of(tree: Any) -> int:
    """Bytes of the arrays of a tree, once each, however devices share them."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _idle_ranks(session: Session) -> list[str]:
    """A line about the adapters whose rank is more than their kernels can use."""
    rank, sides = session.config.lora.rank, dict[str, int]()
    everything = tree.combine(session.abstract.params, session.abstract.frozen)
    for path, node in jax.tree.leaves_with_path(everything, is_leaf=adapt.is_adapter):
        if isinstance(node, Lora):
            # a [i..., R] and b [R, o...] of one layer, or of all with an axis in front.
            lead = int(tree.is_stacked(path))
            smaller = min(math.prod(node.a.shape[lead:-1]), math.prod(node.b.shape[lead + 1 :]))
            if smaller < rank:
                sides[tree.path_name(path)] = smaller
    if not sides:
        return []
    kernels = ", ".join(f"{name} ({side})" for name, side in sides.items())
    return [f"lora.rank = {rank} is more than the smaller side of {kernels}: a product of A and B has no higher rank than that"]


def _idle_dropout(session: Session) -> list[str]:
    """A line about adapters of tables, of which the loss takes the merged head, and a look-up reads no numbers."""
    settings, names = session.config.lora, adapt.adapters(session.model.axes)
    tables = [table for table in grown.TABLES if f"{table}/a" in names]
    if not tables or not settings.dropout_frac:
        return []
    return [f"lora.dropout_frac = {settings.dropout_frac:g} drops nothing at {' and '.join(tables)}"]


def _idle_tokens(session: Session) -> list[str]:
    """A line about new tokens whose rows in the embedding or the head are not trained."""
    model, trained, frozen = (
        session.config.model,
        *(set(tree.names(part)) for part in (session.abstract.params, session.abstract.frozen)),
    )
    tables = ((table, {table, f"{table}/rows"}) for table in grown.tables(model.head))
    idle = [table for table, rows in tables if rows & frozen and not rows & trained]
    if not 0 < model.start_rows < model.vocab_size or not idle:
        return []
    tokens = model.vocab_size - model.start_rows
    return [
        f"{tokens} new tokens stay the mean of the others in {', '.join(idle)}: train.trainable or train.frozen_layers freezes them"
    ]


def narrow_products(config: ConfigDict, device: jax.Device) -> list[str]:
    """A line where float32 is less than that on this device."""
    told = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    if config.precision.compute != "float32" or told or device.platform not in NARROWED:
        return []
    return [
        f"precision.compute = 'float32' on {device.device_kind}: jax multiplies in {NARROWED[device.platform]} unless"
        " JAX_DEFAULT_MATMUL_PRECISION=highest is set, which is slower; precision.compute=bfloat16 is faster"
    ]


def bytes_by_category(session: Session) -> Mapping[str, int]:
    """Bytes on one device, from shapes and shardings alone: no activations, no temporaries (the compiler knows those)."""
    abstract = session.abstract

    def size(tree: Any) -> int:
        return shard_bytes(jax.tree.map(lambda leaf: leaf.sharding, tree), tree)

    return {
        "parameters": size(abstract.params) + size(abstract.frozen),
        "gradients": layout.gradient_bytes(session.plan, session.model.axes, abstract.params),
        "optimizer": size(abstract.opt_state),
        "average": size(abstract.ema),
        "batch": size(step.abstract_batch(session.config, session.plan)),
    }
