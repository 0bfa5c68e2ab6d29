"""An adapter of PEFT beside the kernels of a base: what it changes in the parameters, and in the config.

The arrays of the base are shared, not copied.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from jaxllm import models
from jaxllm.interop import families, peft_modules, peft_tables, weights
from jaxllm.interop.family import Family
from jaxllm.interop.peft import MAGNITUDE, Adapter, Product
from jaxllm.interop.peft_params import copied, parts, plain
from jaxllm.interop.rules import Rule, to_ours
from jaxllm.interop.weights import Slot
from jaxllm.models.architecture import Architecture
from jaxllm.transforms import adapt, grown, leaf
from jaxllm.transforms.dora import Dora
from jaxllm.transforms.lora import Lora
from jaxllm.transforms.tree import path_name
from jaxllm.types import Params


class Attached(NamedTuple):
    """params: Lora or Dora leaves around the kernels of the base, and what was stored whole in its place. config: of all of it."""

    params: Params
    config: ConfigDict


class _Base(NamedTuple):
    """A base in PEFT's terms.

    copies: name of a tensor that is tied -> the one that it equals. embedding: name of the table of tokens; read_embedding: what is in it.
    """

    params: Params
    config: ConfigDict
    arch: Architecture
    family: Family
    rules: Sequence[Rule]
    exported: weights.Exported
    copies: Mapping[str, str]
    embedding: str
    read_embedding: Callable[[], np.ndarray]

    @property
    def tied(self) -> set[str]:
        """The table of tokens under all of its names."""
        return {self.embedding, *(copy for copy, name in self.copies.items() if name == self.embedding)}

    def table(self, name: str) -> np.ndarray | None:
        """The tensor of this name, or None."""
        own = self.copies.get(name, name)
        if own == self.embedding:
            return self.read_embedding()
        return self.exported.make(own) if own in self.exported.shapes else None


def attach(
    params: Params, config: ConfigDict, adapter: Adapter, read_embedding: Callable[[], np.ndarray] | None = None
) -> Attached:
    """The adapter beside the kernels (arrays or quantized) of a base with this config, its layers stacked or not.

    ValueError that lists what of the adapter does not fit, for a base that has one already, and for layers of one kernel with different
    ranks or scales. A head that the base ties and the adapter stores or adapts apart from the embedding is no longer tied. A base with
    fewer tokens than the adapter's embedding has rows grows.
    read_embedding: gives that of the base, for `params` with the right shapes alone, of which `config` in the result is right, too.
    """
    if any(adapt.is_adapter(node) for node in jax.tree.leaves(params, is_leaf=leaf.is_type)):
        raise ValueError(
            f"{adapter.where}: the base has an adapter already.\n  Accepted: a base without one.\n"
            "  Give the base that both began with, or make one model of base and adapter (python -m jaxllm.convert); adapters are averaged"
            " with python -m jaxllm.adapters average."
        )
    base = _open(params, config, read_embedding)
    if adapter.fan_in_fan_out != any(rule.inputs and not rule.transposed for rule in base.rules):
        # As in PEFT: its A and B are stored alike for both.
        logging.warning(
            "%s: fan_in_fan_out = %s is not that of the base's layers, which decide", adapter.where, adapter.fan_in_fan_out
        )
    if adapter.tokens:
        _check_tokens(base, adapter)
    adapter = peft_tables.with_tables(adapter, base.table, base.family.canonical, base.embedding)
    whole = {base.family.canonical(name): name for name in adapter.whole}
    names = {peft_modules.of_tensor(base.family.canonical(f"{name}.weight")): name for name in adapter.products}
    if changed := _changed(base, adapter, whole, names):
        return attach(changed.params, changed.config, adapter, changed.read_embedding)
    # What is tied follows the embedding.
    for copy in base.tied - {base.embedding} if base.arch.head == "lm" else ():
        names.pop(peft_modules.of_tensor(copy), None)
    _check(adapter, parts(params, base.rules, base.arch), base.exported.shapes, names, whole, base.copies)
    whole |= {name: whole[copy] for copy, name in base.copies.items() if copy in whole}
    table = weights.slots(plain(params), base.rules)
    _check_layers((slot for slots in table.values() for slot in slots), adapter, names)
    placed = jax.tree.map_with_path(
        lambda path, node: _place(node, table[jax.tree_util.keystr(path)], adapter, names, whole),
        params,
        is_leaf=leaf.is_type,
    )
    also = {slot.rule.path for slots in table.values() for slot in slots if slot.name in whole}
    return Attached(placed, _describe(config, adapter, placed, also))


def _open(params: Params, config: ConfigDict, read_embedding: Callable[[], np.ndarray] | None) -> _Base:
    arch = models.build(config).config
    architecture = families.choose(arch)
    family = families.find(architecture)
    rules = family.rules(architecture, arch)
    exported = weights.export(plain(params), architecture, arch)
    embedding = next(rule.name for rule in rules if rule.path == grown.EMBEDDING)
    read = read_embedding or (lambda: np.asarray(leaf.dense(params["embed"]["tokens"])))
    return _Base(params, config, arch, family, rules, exported, copied(architecture, exported), embedding, read)


def _check_tokens(base: _Base, adapter: Adapter) -> None:
    """ValueError where PEFT itself has two answers to what rows of tokens do at the head."""
    arch, name = base.arch, base.arch.family.name
    whys = {
        "bert": "leaves out the bias at the output beside the base, and has it when merged",
        "t5": "writes the embedding's rows into a head of its own with transformers 5, and not with 4",
    }
    if arch.head == "lm" and name in whys and (name == "bert" or not arch.tied_head):
        raise ValueError(
            f"{adapter.where}: rows of single tokens (trainable_token_indices), with which PEFT {whys[name]}.\n"
            f"  Accepted: modules_to_save or target_modules for the tables of this model.\n"
            "  Merge them in PEFT (merge_and_unload), and read the model that it saves."
        )


def _changed(base: _Base, adapter: Adapter, whole: Mapping[str, str], names: Mapping[str, str]) -> _Base | None:
    """The base with the tables that the adapter needs: of more rows, or with a head of its own; None if it has them."""
    tied, apart = base.tied, _apart(adapter, whole, base.tied, base.read_embedding)
    shapes = [adapter.shapes[whole[name]] for name in tied & whole.keys()]
    before = base.arch.vocab_size
    if rows := [shape[0] for shape in shapes if shape[1:] == (base.arch.width,) and shape[0] > before]:
        tables = {
            rule.name for rule in base.rules if rule.path in grown.tables(base.arch.head) and rule.name in base.exported.shapes
        }
        alike = {base.copies.get(name, name) for name in whole} | whole.keys()
        _check_new_rows(adapter, max(rows), before, sorted((tables | (tied if apart else set())) - alike))
        return _open(*_grow(base.params, base.config, max(rows)), lambda: np.asarray(_padded(base.read_embedding(), max(rows))))
    if apart:
        return _open(*_untie(base.params, base.config, adapter, apart), base.read_embedding)
    if base.arch.head == "lm" and (products := _products_apart(adapter, names, tied, base.embedding)):
        below = next((adapter.read(whole[name]) for name in tied if name in whole), None)
        own = base.params["embed"] if below is None else {**base.params["embed"], "tokens": jnp.asarray(below, jnp.float32)}
        untied = _untie({**base.params, "embed": own}, base.config, adapter, products)
        return _open(*untied, base.read_embedding if below is None else lambda: below)
    return None


def _products_apart(adapter: Adapter, names: Mapping[str, str], tied: Iterable[str], embedding: str) -> list[str]:
    """Those of the tied modules that have products, unless one adapter of the table does what all of them do."""
    first, modules = peft_modules.of_tensor(embedding), {peft_modules.of_tensor(name) for name in tied}
    found = sorted(names[module] for module in modules if module in names)
    others = modules - {first}
    if adapter.tied and not adapter.dora:  # heads follow the embedding, other look-ups do not
        others = {module for module in others if not peft_tables.turns(module)}
    present = first in names and others <= names.keys()
    if not found or (present and peft_tables.alike(adapter, names[first], [names[module] for module in others])):
        return []
    return found


def _apart(adapter: Adapter, whole: Mapping[str, str], tied: set[str], read_embedding: Callable[[], np.ndarray]) -> list[str]:
    """Those of the tied tensors that the adapter stores, unless afterwards all are alike."""
    stored = sorted(tied & whole.keys())
    if not stored or adapter.tied:
        return []
    # What is put into the base's own place stays tied to all that is not replaced.
    keeps = any(not adapter.replaces(whole[name]) for name in stored)
    first = adapter.read(whole[stored[0]]) if keeps or len(stored) == len(tied) else read_embedding()
    return [] if all(np.array_equal(first, adapter.read(whole[name])) for name in stored) else stored


def _untie(params: Params, config: ConfigDict, adapter: Adapter, stored: Sequence[str]) -> tuple[Params, ConfigDict]:
    """With a head of its own, which begins as the embedding."""
    if config.model.name not in ("gpt", "llama") or config.model.tied_head == "off":
        raise ValueError(
            f"{adapter.where}: of the embedding and what is tied to it, {', '.join(stored)} are stored, and not all alike.\n"
            f"  Accepted: with model.name = '{config.model.name}', all of them alike, or none.\n"
            "  Train them tied (ensure_weight_tying in PEFT), or none of them."
        )
    config = config.copy_and_resolve_references()
    config.model.tied_head = "off"
    return {**params, "head": {"kernel": params["embed"]["tokens"]}}, config


def _check_new_rows(adapter: Adapter, rows: int, before: int, missing: Sequence[str]) -> None:
    """ValueError if there are tables of which nothing says what new rows are."""
    if missing:
        raise ValueError(
            f"{adapter.where}: its embedding has {rows} rows, the base's {before}; {weights.listing(missing)} should have as many, and"
            " is not stored.\n  Accepted: adapters that store both embedding and head where the vocabulary grew, as PEFT does.\n"
            "  Save it again, with both of them in modules_to_save."
        )


def _grow(params: Params, config: ConfigDict, rows: int) -> tuple[Params, ConfigDict]:
    """With tables of so many rows, of which the new ones are 0; the adapter has them all."""
    config = config.copy_and_resolve_references()
    config.model.vocab_size = rows
    tables = grown.tables(config.model.head)

    def one(path: Sequence[Any], node: Any) -> Any:
        return _padded(leaf.dense(node), rows) if path_name(path) in tables else node

    return jax.tree.map_with_path(one, params, is_leaf=leaf.is_type), config


def _padded(table: Any, rows: int) -> jax.Array:
    return jnp.pad(table, [(0, rows - table.shape[0]), *[(0, 0)] * (table.ndim - 1)])


def _check(
    adapter: Adapter,
    modules: Mapping[str, Sequence[Any]],
    tensors: Mapping[str, tuple[int, ...]],
    names: Mapping[str, str],
    whole: Mapping[str, str],
    copies: Mapping[str, str],
) -> None:
    """ValueError if the adapter does not fit the base."""
    kinds = {"unexpected": [theirs for name, theirs in names.items() if name not in modules]}
    kinds["unexpected"] += [theirs for name, theirs in whole.items() if name not in tensors and name not in copies]
    # all-linear means neither embeddings nor heads; names of a class without a head have no prefix.
    meant = [name for name, (part, *_) in modules.items() if part.slot.rule.inputs or adapter.targets != peft_modules.ALL_LINEAR]
    kinds["missing"] = [
        name for name in meant if name not in names and (adapter.means(name) or adapter.means(name.partition(".")[2]))
    ]
    shapes = {theirs: tensors[copies.get(name, name)] for name, theirs in whole.items() if copies.get(name, name) in tensors}
    for name, theirs in names.items():
        if name in modules:
            first, rank = modules[name][0], adapter.products[theirs].rank
            (a, b), columns = adapter.factor_names(theirs), sum(part.outputs for part in modules[name])
            shapes |= {a: (rank, first.sides[0]), b: (columns, rank)}
            shapes |= {theirs + MAGNITUDE: (columns,)} if adapter.dora else {}
    kinds["of another shape"] = [
        f"{name} {list(adapter.shapes[name])} instead of {list(shape)}"
        for name, shape in shapes.items()
        if adapter.shapes[name] != shape
    ]
    if any(kinds.values()):
        lines = [f"{adapter.where}: the adapter does not fit this base; nothing was loaded."]
        lines += [f"  {kind} ({len(found)}): {weights.listing(found)}" for kind, found in kinds.items() if found]
        lines.append(f"  Accepted: adapters of {weights.listing(list(modules))}; whole modules of the same model.")
        lines.append(
            f"  Give the base that it was trained on{f' ({adapter.base})' if adapter.base else ''}, or fetch the files again."
        )
        raise ValueError("\n".join(lines))


def _check_layers(slots: Iterable[Slot], adapter: Adapter, names: Mapping[str, str]) -> None:
    """ValueError unless all layers of a kernel have the same rank and scale: they are run, and kept in checkpoints, as one stack."""
    found: dict[str, dict[Product | None, None]] = {}
    for slot in slots:
        if slot.layer is not None and slot.rule.inputs:
            module = names.get(peft_modules.of_tensor(slot.name))
            found.setdefault(slot.rule.path, {})[adapter.products[module] if module else None] = None
    for path, products in found.items():
        if len(products) > 1:
            listed = ", ".join(f"{each.rank} with scale {each.scale:g}" if each else "none" for each in products)
            raise ValueError(
                f"{adapter.where}: the layers of {path} have adapters of different ranks or scales ({listed}).\n"
                "  Accepted: the same for all layers of a kernel; kernels may differ.\n"
                "  Train all layers alike, without layers_to_transform and with a rank_pattern that does not name a layer."
            )


def _place(node: Any, slots: Sequence[Slot], adapter: Adapter, names: Mapping[str, str], whole: Mapping[str, str]) -> Any:
    """What stands in the place of one parameter of the base."""
    if any(slot.name in whole for slot in slots):
        node = _replaced(node, slots, adapter, whole)
    modules = [names[module] for slot in slots if (module := _weight_of(slot)) in names]
    return _leaf(node, slots, adapter, modules) if modules else node


def _weight_of(slot: Slot) -> str:
    """The module whose weight this is, if it is one."""
    takes = slot.rule.inputs or slot.rule.path in peft_tables.INPUTS
    return peft_modules.of_tensor(slot.name) if takes else ""


def _replaced(node: Any, slots: Sequence[Slot], adapter: Adapter, whole: Mapping[str, str]) -> jax.Array:
    """A parameter of which some layers, or all, are stored whole."""
    host = np.array(leaf.dense(node), np.float32)
    for index, slot in enumerate(slots):
        if slot.name in whole:
            found = to_ours(slot.rule, adapter.read(whole[slot.name]), slot.shape).astype(np.float32)
            if host.shape == slot.shape:
                host = found
            else:
                host[index] = found
    return jnp.asarray(host)


def _leaf(node: Any, slots: Sequence[Slot], adapter: Adapter, modules: Sequence[str]) -> Lora:
    """The kernel of one layer, or of all, with what stands beside it."""
    arrays = [_arrays(slot, adapter, module) for slot, module in zip(slots, modules, strict=True)]
    stacked = [np.stack(each) if node.shape != slots[0].shape else each[0] for each in zip(*arrays, strict=True)]
    a, b, *magnitude = map(jnp.asarray, stacked)
    same: dict[str, Any] = {
        "base": node,
        "a": a,
        "b": b,
        "scale": adapter.products[modules[0]].scale,
        "dropout_frac": adapter.dropout_frac,
        "outputs_first": slots[0].rule.path == grown.HEAD,
    }
    return Dora(**same, magnitude=magnitude[0]) if magnitude else Lora(**same)


def _arrays(slot: Slot, adapter: Adapter, module: str) -> list[np.ndarray]:
    """a, b and with DoRA the magnitude, of one kernel of one layer; of its own rows where the module holds several."""
    found = adapter.factors(module)
    inputs, outputs = peft_tables.sides(slot)
    index, rows = slot.rule.part[0], math.prod(outputs)
    mine = slice(index * rows, (index + 1) * rows)
    arrays = [found.a.T.reshape(*inputs, -1), found.b[mine].T.reshape(-1, *outputs)]
    return arrays if found.magnitude is None else [*arrays, found.magnitude[mine].reshape(outputs)]


def _describe(config: ConfigDict, adapter: Adapter, params: Params, also: Collection[str]) -> ConfigDict:
    """The config of a run that trains these parameters."""
    config, default = config.copy_and_resolve_references(), adapter.default
    nodes = jax.tree.leaves_with_path(params, is_leaf=leaf.is_type)
    adapted = {path_name(path) for path, node in nodes if adapt.is_adapter(node)}
    config.train.transforms = (*config.train.transforms, "dora" if adapter.dora else "lora")
    config.model.start_rows = 0  # all tables are in one piece
    config.lora.update(
        {
            "rank": default.rank,
            "alpha": adapter.alpha(default),
            "rslora": adapter.rslora,
            "dropout_frac": adapter.dropout_frac,
            "targets": "|".join(sorted(adapted)),
            "also": "|".join(sorted(set(also) - adapted)),
            "init": "zero",
        }
    )
    return config
