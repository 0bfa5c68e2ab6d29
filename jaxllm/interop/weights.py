"""Parameters from foreign tensors and back: the one walk over a name table, in either direction, one tensor at a time."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxllm import models
from jaxllm.interop import families
from jaxllm.interop.family import Family
from jaxllm.interop.imported import Imported, Tensors
from jaxllm.interop.packed import keep, leaves
from jaxllm.interop.packed.dense import Dense
from jaxllm.interop.rules import Rule, stored_shape, to_ours, to_theirs
from jaxllm.models.architecture import Architecture
from jaxllm.transforms import leaf
from jaxllm.transforms.quantized import Quantized
from jaxllm.transforms.tree import is_stacked, path_name
from jaxllm.types import Params

# So many names of each kind are listed in an error.
LISTED = 20
# Rows of a transposed tensor that are laid out at once: a line of the cache has 16 float32.
STRIP_ROWS = 16


class Slot(NamedTuple):
    """One tensor of a parameter: the whole of it, or that of one layer of a stack."""

    rule: Rule
    layer: int | None
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.rule.name.format(layer=self.layer)


class Loaded(NamedTuple):
    """params: float32, in the form of config.model.layers_as; where directory.read has kept codes, with quantized kernels.

    unused: names of tensors that no computation needs.
    """

    params: Params
    unused: tuple[str, ...]


class OnHost(NamedTuple):
    """A parameter on its way to a device: float32 arrays or quantized kernels, one a layer where a stack of layers is one parameter, else
    the only one. They are read when it is their turn."""

    shape: tuple[int, ...]
    arrays: Iterable[Any]


# (key path, parameter on the host) -> what stands in its place
Place = Callable[[Any, OnHost], Any]


def on_device(path: Any, host: OnHost) -> Any:
    """The whole parameter on the first device."""
    arrays = list(host.arrays)
    whole = jax.tree.map(lambda *layers: np.stack(layers), *arrays) if is_stacked(path) else arrays[0]
    # Waits for the copy to the device, or copies of many tensors would be in memory at once.
    return jax.block_until_ready(jax.device_put(whole))


def load(imported: Imported, place: Place = on_device) -> Loaded:
    """The parameters, each given to `place`; ValueError that lists every missing, unexpected and mis-shaped tensor, before one is read.

    Beside the result one tensor is held, by `on_device` one parameter of all layers where config.model.layers_as is "scan".
    """
    family = families.find(imported.architecture)
    model = models.build(imported.config)
    template = jax.eval_shape(model.init, jax.random.key(0))
    rules = family.rules(imported.architecture, model.config)
    found = slots(template, rules)
    stored, unused = _check(imported, family, _expected(found, rules))

    def read(path: tuple[Any, ...], like: Any) -> Any:
        parts = found[jax.tree_util.keystr(path)]
        if isinstance(like, Quantized):
            one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), like) if is_stacked(path) else like
            return place(path, OnHost(like.shape, (_codes(imported.tensors, stored, slot, one) for slot in parts)))
        return place(path, OnHost(like.shape, (_read(imported.tensors, stored, slot) for slot in parts)))

    return Loaded(jax.tree.map_with_path(read, template, is_leaf=_is_quantized), unused)


def kernels(config: ConfigDict, family: Family, architecture: str, names: Iterable[str]) -> dict[str, keep.Kernel]:
    """Path name -> the tensors, by their `names` in the files, of every kernel in the layers of a model."""
    model = models.build(config)
    template = jax.eval_shape(model.init, jax.random.key(0))
    stored = {family.canonical(name): name for name in names}
    found: dict[str, list[Slot]] = {}
    for parts in slots(template, family.rules(architecture, model.config)).values():
        found.setdefault(parts[0].rule.path, []).extend(parts)
    return {
        path: keep.Kernel(
            [stored.get(slot.name, "") for slot in parts], parts[0].shape, parts[0].rule.inputs, parts[0].rule.part[1] > 1
        )
        for path, parts in found.items()
        if "layers" in path.split("/")
    }


def _codes(tensors: Tensors, stored: Mapping[str, str], slot: Slot, like: Quantized) -> Quantized:
    """The kernel of one layer in the codes of the files."""
    assert isinstance(tensors, Dense), "only where directory.read has kept codes does a config ask for them"
    name = stored[slot.name]
    codes = tensors.codes(name)
    assert codes is not None, f"{name} is dense"
    return leaves.make(name, codes, like, slot.shape, slot.rule.part)


def _read(tensors: Tensors, stored: Mapping[str, str], slot: Slot) -> np.ndarray:
    """Our form of a tensor. A transposed one is laid out in strips of what were its rows: along its columns each number would be looked for
    in memory, which takes four times as long."""
    view = to_ours(slot.rule, tensors.read(stored[slot.name]), slot.shape)
    ours = np.empty(slot.shape, np.float32)
    strip = slot.shape[-1] if view.flags.c_contiguous else STRIP_ROWS
    for begin in range(0, slot.shape[-1], strip):
        part = (..., slice(begin, begin + strip))
        ours[part] = view[part].astype(np.float32)
    return ours


def slots(template: Params, rules: Sequence[Rule]) -> dict[str, list[Slot]]:
    """Key path of every parameter -> the tensors that it is in; ValueError, with their names, for parameters without a rule."""
    table = {rule.path: rule for rule in rules}
    found: dict[str, list[Slot]] = {}
    unknown = []
    for path, node in jax.tree.leaves_with_path(template, is_leaf=_is_quantized):
        name = path_name(path)
        indices = [key.idx for key in path if isinstance(key, jax.tree_util.SequenceKey)]
        if name not in table:
            unknown.append(name)
        elif indices or "layers" not in name.split("/"):
            found[jax.tree_util.keystr(path)] = [Slot(table[name], indices[0] if indices else None, node.shape)]
        else:
            found[jax.tree_util.keystr(path)] = [Slot(table[name], layer, node.shape[1:]) for layer in range(node.shape[0])]
    if unknown:
        raise ValueError(
            f"parameters without a counterpart in transformers: {listing(unknown)}.\n  Accepted: those of {', '.join(table)}.\n"
            "  Change config.model."
        )
    return found


def _expected(table: Mapping[str, list[Slot]], rules: Sequence[Rule]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor, layer by layer, in the order of the table."""
    order = {rule: index for index, rule in enumerate(rules)}
    every = [slot for parts in table.values() for slot in parts]
    every.sort(key=lambda slot: (-1 if slot.layer is None else slot.layer, order[slot.rule]))
    return {slot.name: stored_shape(slot.rule, slot.shape) for slot in every}


def _check(imported: Imported, family: Family, expected: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, str], tuple[str, ...]]:
    """({name in the table: name in the files}, names of unused tensors); ValueError if anything does not fit."""
    shapes = imported.tensors.shapes
    found: dict[str, str] = {}
    for name in shapes:
        found.setdefault(family.canonical(name), name)  # a second spelling of the same name is unexpected below
    stored = {name: found[name] for name in expected if name in found}
    # A tensor that stands in two places may be stored under either name, or under both.
    copies = {copy: name for copy, name in family.copies.items() if copy in found and copy not in expected}
    stored |= {name: found[copy] for copy, name in copies.items() if name in expected and name not in found}
    stored |= {
        copy: found[name] for copy, name in family.stand_ins.items() if copy in expected and copy not in found and name in found
    }
    spare = {found[copy]: found[name] for copy, name in copies.items() if name in found}
    ignored = [name for theirs, name in found.items() if theirs not in expected and re.fullmatch(family.unused, theirs)]
    ignored += [name for theirs, name in found.items() if theirs not in expected and _adds_nothing(imported.tensors, name)]
    missing = [f"{name} {list(shape)}" for name, shape in expected.items() if name not in stored]
    known = {*stored.values(), *spare, *ignored}
    unexpected = [f"{name} {list(shape)}" for name, shape in shapes.items() if name not in known]
    wrong = [
        f"{stored[name]} {list(shapes[stored[name]])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in stored and shapes[stored[name]] != shape
    ]
    differing = [f"{copy} is not {name}" for copy, name in spare.items() if not _equal(imported.tensors, copy, name)]
    if missing or unexpected or wrong or differing:
        kinds = {"missing": missing, "unexpected": unexpected, "of another shape": wrong, "copies that differ": differing}
        raise ValueError(_mismatch(imported, family, kinds))
    return stored, (*spare, *ignored)


def _equal(tensors: Tensors, one: str, other: str) -> bool:
    return tensors.shapes[one] == tensors.shapes[other] and np.array_equal(tensors.read(one), tensors.read(other))


def _adds_nothing(tensors: Tensors, name: str) -> bool:
    """Whether it is a bias of zeros, which AutoGPTQ gives to every Linear."""
    beside = f"{name.removesuffix('.bias')}.weight"
    return name.endswith(".bias") and len(tensors.shapes.get(beside, ())) == 2 and not tensors.read(name).any()


def _mismatch(imported: Imported, family: Family, kinds: Mapping[str, list[str]]) -> str:
    lines = [f"{imported.path}: its tensors are not those of {imported.architecture} by its config; nothing was loaded."]
    lines += [f"  {kind} ({len(names)}): {listing(names)}" for kind, names in kinds.items() if names]
    keys = family.write(models.build(imported.config).config, imported.architecture)
    sizes = ", ".join(f"{key} {keys[key]}" for key in family.sizes if key in keys)
    lines.append(f"  Accepted: the tensors of one {imported.architecture} with {sizes}.")
    lines.append("  Fetch config and tensors of the same model, or correct architectures or the sizes in config.json.")
    return "\n".join(lines)


def listing(names: Sequence[str]) -> str:
    """The names for an error text, the first LISTED of them."""
    more = f", and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


class Exported(NamedTuple):
    """shapes: name -> shape of every tensor to write, in order. make(name) -> the tensor, in the dtype of the parameters.

    rules: name -> the rule of the tensor (of its first parameter). pieces(name) -> our parameters of one layer that it holds, in order:
    arrays, or kernels that are quantized, which `make` makes dense.
    """

    shapes: dict[str, tuple[int, ...]]
    make: Callable[[str], np.ndarray]
    rules: dict[str, Rule]
    pieces: Callable[[str], list[Any]]


def export(params: Params, architecture: str, arch: Architecture) -> Exported:
    """The tensors of the class `architecture` that these parameters of `arch` are, made one at a time when they are asked for."""
    rules = families.find(architecture).rules(architecture, arch)
    table = slots(params, rules)
    params_by_key = {jax.tree_util.keystr(path): node for path, node in jax.tree.leaves_with_path(params, is_leaf=_is_quantized)}
    parts: dict[str, list[tuple[Slot, str]]] = {}
    for key, found in table.items():
        for slot in found:
            parts.setdefault(slot.name, []).append((slot, key))
    for chosen in parts.values():
        chosen.sort(key=lambda part: part[0].rule.part)
    expected = _expected(table, rules)

    def pieces(name: str) -> list[Any]:
        return [_piece(params_by_key[key], slot) for slot, key in parts[name]]

    def make(name: str) -> np.ndarray:
        return to_theirs(parts[name][0][0].rule, [np.asarray(leaf.dense(piece)) for piece in pieces(name)])

    return Exported(expected, make, {name: parts[name][0][0].rule for name in expected}, pieces)


def _is_quantized(node: Any) -> bool:
    return isinstance(node, Quantized)


def _piece(node: Any, slot: Slot) -> Any:
    """The parameter, or one layer of it where the layers are stacked."""
    return node if node.shape == slot.shape else jax.tree.map(lambda x: x[slot.layer], node)
