"""Training that begins with the weights of a model: `train.start` is a run, a directory of transformers, a GGUF file or an adapter of PEFT.

The model brings its architecture and its tokenizer, so a config need not repeat them. Its parameters are transformed and placed on the mesh
one after the other, those of a stack layer by layer. Those of a model of others are read so, too: no device, and no host, holds more than
one kernel dense when a quantized one is trained. A run is read as a whole, and so are an adapter and its base, into which it is folded.
"""

import shlex
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxllm import config as schema
from jaxllm import models, runs
from jaxllm.consistency import FORMS, LOADED
from jaxllm.data import tokenize
from jaxllm.data.tokenizers import file as tokenizer_file
from jaxllm.engine import state
from jaxllm.engine.checkpoint import Checkpoints
from jaxllm.engine.session import Session
from jaxllm.engine.workdir import Workdir
from jaxllm.interop import peft, peft_attach, peft_tokenizer, weights
from jaxllm.interop.imported import Imported
from jaxllm.interop.weights import OnHost
from jaxllm.models import heads
from jaxllm.transforms import adapt, grown, leaf, tree
from jaxllm.transforms.quantized import Quantized
from jaxllm.types import Axes, Params, Tokenizer

# Fields of config.model that say how a model is run, or what is put on top of it: the config's own, whatever the model had.
FREE = (
    "head",
    "classes",
    "dropout_frac",
    "init_std",
    "attention",
    "attention_block_tokens",
    "layers_as",
    "remat",
    "remat_save",
    "remat_offload",
)
# Not in their files, but said by the tokenizer or by the model that is begun with.
FILLED_IN = ("vocab_size", "start_rows")


class _Target(NamedTuple):
    """Where a dense parameter goes: its axes and shape, and the axes and shardings of what the transforms make of it."""

    axes: Axes
    shape: tuple[int, ...]
    node_axes: Any
    shardings: Any


@dataclass(frozen=True)
class Start:
    """A model to begin with. config: its own; files: where its tokenizer is; title: what it is called.

    imported: None for a run of this package, and for an adapter.
    """

    path: Path
    config: ConfigDict
    tokenizer: Tokenizer | None
    files: Path
    title: str
    imported: Imported | None = None

    @property
    def tokenizer_fields(self) -> tuple[str, str]:
        """tokenizer.kind and tokenizer.path that load its tokenizer; "" each if it has none."""
        if self.tokenizer is None:
            return "", ""
        return "gguf" if self.files.is_file() else "file", str(self.files.absolute())


def open_start(path: str, transforms: Sequence[str] = ()) -> Start:
    """The model at `path`, its weights still on disk; ValueError if there is none, and for an adapter that does not fit its base.

    transforms: what is made of it. Of a quantized directory of another tool the codes are kept where there are any; else it is dense, as
    all of it is trained.
    """
    if peft.is_one(path):
        return _open_adapter(peft.read(path))
    if runs.is_foreign(path):
        imported = runs.read_imported(path, keep_codes=bool(transforms))
        return Start(imported.path, imported.config, imported.tokenizer, imported.path, str(imported.path), imported)
    workdir = runs.find(path)
    config, tokenizer = schema.load(workdir.config), tokenize.load(workdir.tokenizer)
    config = schema.with_vocabulary(config, tokenizer.vocab_size)
    return Start(workdir.path, config, tokenizer, workdir.tokenizer, str(workdir.path))


def _open_adapter(adapter: peft.Adapter) -> Start:
    path, place = Path(adapter.where), runs.find_base(adapter)
    if place is None:
        what = f"its base '{adapter.base}' is not a path here, nor beside it" if adapter.base else "it names no base"
        raise ValueError(
            f"'{path}' is an adapter, and {what}.\n  Accepted: to begin with, an adapter whose base is found, or a whole model.\n"
            f"  Fold it into its base (python -m jaxllm.convert --from {shlex.quote(str(path))} --base BASE --to MERGED), and begin with"
            " MERGED."
        )
    base = open_start(str(place))
    if base.imported is not None and base.tokenizer is None:
        raise ValueError(runs.no_tokenizer(base.imported.path))
    dense = base.config.copy_and_resolve_references()
    dense.train.transforms = ()
    shapes = jax.eval_shape(models.build(dense).init, jax.random.key(0))
    # Numbers that take no memory: what the model is hangs on the base's own in one rare case, and is asked for there.
    empty = jax.tree.map(lambda like: np.broadcast_to(np.zeros((), like.dtype), like.shape), shapes)
    config = peft_attach.attach(
        empty, dense, adapter, lambda: np.asarray(leaf.dense(runs.load(place).params["embed"]["tokens"]))
    ).config
    tokenizer = peft_tokenizer.choose(path, config, base.tokenizer)
    files = path if tokenizer_file.has_one(path) else base.files
    return Start(path, config, tokenizer, files, f"{path} merged into {place}")


def resolve(config: ConfigDict, workdir: Path, asked: Collection[str] = ()) -> ConfigDict:
    """A copy with the architecture and the tokenizer of `train.start`; the same config where that is empty.

    A run in `workdir` that has begun has what it needs: the model need not be there any more. ValueError for a field of config.model that
    contradicts the model, and for a tokenizer other than its own: a field with another value than its default, or one of `asked`, whose
    default is meant, too.
    """
    if not config.train.start:
        return config
    begun = Workdir(workdir)
    if Checkpoints(begun.checkpoints).steps() and begun.config.is_file():
        stored = schema.load(begun.config)
        if stored.train.start == config.train.start:
            config = with_architecture(config, stored.model, stored.model.start_rows, str(begun.config), asked)
            config = with_tokenizer(config, (stored.tokenizer.kind, stored.tokenizer.path), asked)
            return with_codes(config, stored)
    found = open_start(config.train.start, config.train.transforms)
    config = with_architecture(config, found.config.model, found.config.model.vocab_size, config.train.start, asked)
    return with_tokenizer(with_codes(config, found.config), found.tokenizer_fields, asked)


def with_architecture(config: ConfigDict, model: ConfigDict, rows: int, where: str, asked: Collection[str]) -> ConfigDict:
    """A copy with the fields of `model`, that of `where`, which has so many rows in its embedding; ValueError for contradictions."""
    config = config.copy_and_resolve_references()
    contradictions = []
    for name, value in model.items():
        if name in FREE or name in FILLED_IN:
            continue
        given, default = config.model[name], schema.SCHEMA[f"model.{name}"].default
        if given != value and (given != default or f"model.{name}" in asked):
            contradictions.append(f"model.{name} = {given!r}, there {value!r}")
        config.model[name] = value
    if contradictions:
        raise ValueError(
            f"the config contradicts the model that train.start = '{where}' begins with: {'; '.join(contradictions)}.\n"
            f"  Accepted: the model's own values, which need not be repeated; other values of {', '.join(FREE)}.\n"
            "  Take these fields out of the config."
        )
    if 0 < config.model.vocab_size < rows:
        raise ValueError(
            f"model.vocab_size = {config.model.vocab_size} with train.start = '{where}', which has {rows} tokens.\n"
            f"  Accepted: 0, or {rows} or more: tokens can be added and not taken away.\n  Leave out model.vocab_size."
        )
    config.model.start_rows = rows
    return config


def with_codes(config: ConfigDict, start: ConfigDict) -> ConfigDict:
    """With the frozen form of the start's kernels, which are taken over as they are; ValueError for another one.

    A start with adapters is dense: they are folded into what they stand beside.
    """
    forms = tuple(name for name in start.train.transforms if name in FORMS)
    if not forms or len(forms) < len(start.train.transforms):
        return config
    given = tuple(name for name in config.train.transforms if name in FORMS)
    fields = {f"quant.{name}": (config.quant[name], value) for name, value in start.quant.items()}
    contradictions = [
        f"{name} = {mine!r}, there {value!r}"
        for name, (mine, value) in fields.items()
        if mine not in (schema.SCHEMA[name].default, value)
    ]
    if given and given != forms:
        contradictions.append(f"train.transforms = {tuple(config.train.transforms)!r}, there {forms!r}")
    if contradictions:
        raise ValueError(
            f"the config contradicts the codes of the model that train.start = '{config.train.start}' begins with:"
            f" {'; '.join(contradictions)}.\n  Accepted: its own form and quant.*, which need not be repeated.\n  Take these fields out of"
            " the config, or make the model dense (python -m jaxllm.convert)."
        )
    config.quant.update(start.quant)
    config.train.transforms = (*forms, *(name for name in config.train.transforms if name not in FORMS))
    return config


def with_tokenizer(config: ConfigDict, fields: tuple[str, str], asked: Collection[str], setting: str = "train.start") -> ConfigDict:
    """The config with the tokenizer of the model that `setting` names, if it has one and no file is given.

    fields: its `Start.tokenizer_fields`.
    """
    given, (kind, path), (section, _, name) = config.tokenizer, fields, setting.partition(".")
    model = f"{setting} = '{config[section][name]}'"
    if given.kind in LOADED:
        return config
    wrong = f"tokenizer.path = '{given.path}' and no tokenizer.kind" if given.path else ""
    if given.kind != schema.SCHEMA["tokenizer.kind"].default or "tokenizer.kind" in asked:
        wrong = f"tokenizer.kind = '{given.kind}'"
    if wrong:
        raise ValueError(
            f"{wrong} with {model}, whose embeddings belong to its tokenizer's ids.\n"
            "  Accepted: neither, which takes that tokenizer; file, with a tokenizer.path that has the same ids.\n"
            "  Leave out tokenizer.kind and tokenizer.path, or set both."
        )
    if not kind:
        raise ValueError(
            f"{model} has no tokenizer.\n  Accepted: a model with its tokenizer files;"
            " tokenizer.kind = 'file' and tokenizer.path.\n  Fetch them, or set tokenizer.path."
        )
    given.kind, given.path = kind, path
    return config


def load(session: Session, say: Callable[[str], None]) -> Params:
    """The parameters of the model that the config begins with, transformed, on the mesh of the session."""
    found = open_start(session.config.train.start, session.config.train.transforms)
    placing = _Placing(session, found.config.model.head)
    if found.imported is not None:
        for note in found.imported.notes:
            say(f"note: {note}")
        found.imported.config.model.layers_as = session.config.model.layers_as
        weights.load(found.imported, placing.place)
    else:
        run = runs.load(found.path)
        adapted = bool(adapt.adapters(run.params))
        stacked = tree.stack_layers(jax.device_get(adapt.merged(run.params, keep_codes=not adapted)))
        # The form of the session's layers; another head may have other parameters beside them.
        own = run.config.copy_and_resolve_references()
        own.train.transforms = () if adapted else own.train.transforms
        own.model.layers_as = session.config.model.layers_as
        template = jax.eval_shape(models.build(own).init, jax.random.key(0))
        whole = jax.device_get(tree.unstack_like(stacked, template))
        jax.tree.map_with_path(lambda path, host: placing.place(path, _on_host(path, host)), whole, is_leaf=_has_codes)
    params, remarks = placing.finish()
    say(f"begins with {found.title}{remarks}")
    return params


def _on_host(path: Any, host: Any) -> OnHost:
    """An array or a quantized kernel, in layers where it is a stack of them."""
    if not tree.is_stacked(path):
        return OnHost(host.shape, (host,))
    return OnHost(host.shape, (jax.tree.map(itemgetter(index), host) for index in range(host.shape[0])))


def _has_codes(node: Any) -> bool:
    return isinstance(node, Quantized)


class _Placing:
    """Dense parameters on their way to a session: each is transformed and laid out when it comes.

    What the session has no place for is left out, as is another kind of head; what does not come is drawn at random. Tables with fewer
    rows than the vocabulary get the mean of their rows for each new token, which no token is nearer to than to others (Hewitt 2021,
    "Initializing New Word Embeddings for Pretrained Language Models").
    """

    def __init__(self, session: Session, head: str) -> None:
        """head: model.head of what comes."""
        self._config, model = session.config, session.model
        self._same_head = head == session.config.model.head
        plain = session.config.copy_and_resolve_references()
        plain.train.transforms = ()
        self._dense = models.build(plain)
        self._adaptation = adapt.Adaptation(self._dense.axes, model.config.transforms)
        self._selects = state.trains(session.config, model.axes)
        self._rng = state.random_key(session.config.seed, "init")
        self._placed: dict[str, Any] = {}
        self._programs: dict[tuple[str, bool], Callable[..., Any]] = {}
        self._unused: list[str] = []
        self._tables = grown.tables(session.config.model.head)
        self._grown = 0
        template = jax.eval_shape(self._dense.init, jax.random.key(0))
        shardings = session.plan.shardings(model.axes, jax.eval_shape(model.init, jax.random.key(0)))
        self._targets: dict[str, _Target] = {}

        def target(path: Any, axes: Axes, like: Any, node_axes: Any, where: Any) -> None:
            self._targets[jax.tree_util.keystr(path)] = _Target(axes, like.shape, node_axes, where)

        jax.tree.map_with_path(target, self._dense.axes, template, model.axes, shardings, is_leaf=adapt.is_axes)

    def place(self, path: Any, host: OnHost) -> None:
        """Takes in the parameter at this key path, dense or quantized."""
        name, target = tree.path_name(path), self._targets.get(jax.tree_util.keystr(path))
        if name.startswith("head/") and not self._same_head:  # its rows are other outputs
            target = None
        if target is not None and name in self._tables and host.shape[0] < target.shape[0]:
            self._grown, (table,) = target.shape[0] - host.shape[0], host.arrays
            table = np.concatenate([table, np.repeat(table.mean(0, keepdims=True), self._grown, axis=0)])
            host = OnHost(table.shape, (table,))
        if target is None or host.shape != target.shape:
            self._unused.append(name)
            return
        self._lay(path, host)

    def _lay(self, path: Any, host: OnHost) -> None:
        key, first = jax.tree_util.keystr(path), next((part.idx for part in path if isinstance(part, jax.tree_util.SequenceKey)), 0)
        program, whole = self._program(path, first), None
        for layer, array in enumerate(host.arrays, start=first):
            if layer == 0 and tree.is_stacked(path):
                whole = self._empty(path, array)
            # Waits, or copies of many arrays would be in memory at once.
            whole = jax.block_until_ready(program(whole, array, np.int32(layer)))
        self._placed[key] = whole

    def _empty(self, path: Any, layer: Any) -> Any:
        """Room for a transformed stack of such layers, laid out."""
        target = self._targets[jax.tree_util.keystr(path)]
        like = jax.eval_shape(partial(self._transform, path), layer, jax.ShapeDtypeStruct((), jnp.int32))

        def make() -> Any:
            return jax.tree.map(lambda part: jnp.zeros((target.shape[0], *part.shape), part.dtype), like)

        return jax.jit(make, out_shardings=target.shardings)()

    def _transform(self, path: Any, host: Any, layer: jax.Array) -> Any:
        """What the session makes of a parameter that is none of a stack, or is one layer of it."""
        target = self._targets[jax.tree_util.keystr(path)]
        wide = host if _has_codes(host) else host.astype(jnp.float32)  # a run may have frozen it in bfloat16
        node = self._adaptation.kernel(tree.path_name(path), False, wide, self._rng, layer)
        return state.narrowed(node, target.node_axes, self._config, self._selects, under=path)

    def _program(self, path: Any, layer: int) -> Callable[..., Any]:
        """(room of a stack or None, array, layer) -> the stack with this layer in it, or the parameter, laid out.

        One for all layers of an unrolled stack, and one for its frozen ones.
        """
        kind = (tree.path_name(path), layer < self._config.train.frozen_layers)
        if kind not in self._programs:
            target = self._targets[jax.tree_util.keystr(path)]

            def lay(whole: Any, host: Any, layer: jax.Array) -> Any:
                node = self._transform(path, host, layer)
                if whole is None:
                    return node
                return jax.tree.map(lambda room, part: jax.lax.dynamic_update_index_in_dim(room, part, layer, 0), whole, node)

            self._programs[kind] = jax.jit(lay, out_shardings=target.shardings, donate_argnums=0)
        return self._programs[kind]

    def finish(self) -> tuple[Params, str]:
        """All parameters, and a remark for the user on what was not simply taken over."""
        missing = [key for key in self._targets if key not in self._placed]
        remarks = []
        if missing:
            drawn = self._draw(missing)
            values = [name for name in drawn if name.startswith(f"{heads.VALUE}/")]
            for what, names in (("drawn at random", [name for name in drawn if name not in values]), ("begin at 0", values)):
                remarks += [f"{what}: {', '.join(names)}"] if names else []
        if self._unused:
            remarks.append(f"not used: {', '.join(dict.fromkeys(self._unused))}")
        if self._grown:
            remarks.append(f"{self._grown} new tokens begin as the mean of the others")
        whole = jax.tree.map_with_path(
            lambda path, _: self._placed[jax.tree_util.keystr(path)], self._dense.axes, is_leaf=adapt.is_axes
        )
        return whole, "".join(f"; {remark}" for remark in remarks)

    def _draw(self, missing: Collection[str]) -> list[str]:
        """Places random parameters at these keys, and returns their names; ValueError if one would stay as it is drawn."""
        whole = jax.tree.leaves_with_path(jax.device_get(self._dense.init(self._rng)))
        fresh = [(path, host) for path, host in whole if jax.tree_util.keystr(path) in missing]
        drawn = sorted({tree.path_name(path) for path, _ in fresh})
        if idle := sorted({tree.path_name(path) for path, _ in fresh if not self._selects(path)}):
            raise ValueError(
                f"train.start has no {', '.join(idle)}, which would be drawn at random and not trained.\n"
                "  Accepted: training them as they are, as with lora.also = 'head/.*'; a model that has them.\n"
                "  Set lora.also (without adapters train.trainable), or begin with another model."
            )
        for path, host in fresh:
            self._lay(path, _on_host(path, host))
        return drawn
