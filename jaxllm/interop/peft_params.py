"""Adapters of PEFT out of parameters with Lora and Dora leaves, and such leaves around the kernels of a base.

Ours are a [inputs..., R] and b [R, outputs...] of each kernel; theirs lora_A [R, inputs] and lora_B [outputs, R] of each module. Where
a module holds several kernels side by side (GPT-2's c_attn: q, k, v), an adapter of its own for each is one of the summed rank for the
module, A of all below each other and B block by block; and an adapter of the module is one for each kernel with the same A and its
rows of B. Both are exact, with DoRA too, whose norm is that of an output. An adapter of a tied table is one of each module that is tied.
"""

import functools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.interop import families, peft_modules, peft_tables, pissa, weights
from jaxllm.interop.peft import EMBEDDING_A, EMBEDDING_B, MAGNITUDE, A, Adapter, B, Factors, Product
from jaxllm.interop.weights import Slot
from jaxllm.models.architecture import Architecture
from jaxllm.transforms import adapt, dora, grown, leaf
from jaxllm.transforms.tree import path_name
from jaxllm.types import Params

TASKS = {"classify": "SEQ_CLS", "tag": "TOKEN_CLS", "none": "FEATURE_EXTRACTION"}
LM_TASKS = {"decoder": "CAUSAL_LM", "encoder_decoder": "SEQ_2_SEQ_LM"}


# What follows ".lora_" in names of A.
FIRST = [name.removeprefix(".lora_") for name in (A, EMBEDDING_A)]


class Part(NamedTuple):
    """A kernel of one layer: its place in a module, the leaf (of all layers where they are stacked), and its original of PiSSA.

    turned: the module reads a tied table the other way round, as a head.
    """

    slot: Slot
    node: Any
    original: Any | None = None
    turned: bool = False

    @property
    def sides(self) -> tuple[int, int]:
        """(inputs, outputs) of the module."""
        read, given = map(math.prod, peft_tables.sides(self.slot))
        return (given, read) if self.turned else (read, given)

    @property
    def outputs(self) -> int:
        return self.sides[1]

    @property
    def names(self) -> tuple[str, str]:
        """Endings of the names of A and B."""
        return (EMBEDDING_A, EMBEDDING_B) if self.slot.rule.path == grown.EMBEDDING and not self.turned else (A, B)


def export(
    params: Params,
    arch: Architecture,
    *,
    whole: Collection[str] = (),
    base: str = "",
    rslora: bool = False,
    original: Params | None = None,
) -> Adapter:
    """The adapter that `params` hold, their layers stacked or not; its tensors are made when they are asked for.

    whole: path names of arrays that are trained as they are. The head of a classifier is always stored, as PEFT expects, and so are all
    rows of the tables of a vocabulary that grew. base: path or name of the base, as transformers loads it. original: parameters before
    PiSSA took part of them away; the adapter is then one of twice the rank, beside these. ValueError for a model that no class of
    transformers is, and for what PEFT has no place for.
    """
    if grown.names(params):
        params, whole = grown.joined(params), {*whole, *grown.tables(arch.head)}
    architecture = families.choose(arch)
    rules = families.find(architecture).rules(architecture, arch)
    exported = weights.export(plain(params), architecture, arch)
    modules = parts(params, rules, arch, original)
    modules |= _tied(modules, arch, copied(architecture, exported))
    adapted = {_own(arch, name): found for name, found in modules.items() if any(adapt.is_adapter(part.node) for part in found)}
    kind = _kind(adapted)
    if arch.head in ("classify", "tag"):
        whole = {*whole, *(rule.path for rule in rules if rule.path.startswith("head/"))}
    stored = {_own(arch, name): ours for name, ours in _whole(whole, modules, architecture, exported, rules).items()}
    names = {_own(arch, name) for name in (*exported.shapes, *copied(architecture, exported))}
    every = peft_modules.universe({peft_modules.of_tensor(name) for name in names})
    factors = functools.lru_cache(maxsize=1)(lambda module: _factors(adapted[module], kind == "dora"))

    def read(name: str) -> np.ndarray:
        if name in stored:
            return exported.make(stored[name])
        module, _, part = name.partition(".lora_")
        found: Factors = factors(module)
        array = found.magnitude if name.endswith(MAGNITUDE) else found.a if part in FIRST else found.b
        assert array is not None
        return array

    products = {module: _product(found) for module, found in adapted.items()}
    return Adapter(
        where="the adapter",
        base=base,
        task=TASKS.get(arch.head) or LM_TASKS.get(arch.family.kind),
        targets=peft_modules.targets(adapted, every),
        excluded=(),
        saved=peft_modules.saved({peft_modules.of_tensor(name) for name in stored}, every),
        tied=False,
        fan_in_fan_out=any(part.slot.rule.inputs and not part.slot.rule.transposed for found in adapted.values() for part in found),
        rslora=rslora,
        dora=kind == "dora",
        dropout_frac=next(part.node.dropout_frac for found in adapted.values() for part in found if adapt.is_adapter(part.node)),
        products=products,
        shapes=_shapes(adapted, products, kind == "dora") | {name: exported.shapes[ours] for name, ours in stored.items()},
        read=read,
    )


def _own(arch: Architecture, name: str) -> str:
    """A name as the class itself has it: without a head, nothing stands before the names of the rest."""
    return name.partition(".")[2] if arch.head == "none" else name


def plain(params: Params) -> Params:
    """The parameters with a shape in the place of each leaf type."""

    def one(node: Any) -> Any:
        return jax.ShapeDtypeStruct(node.shape, jnp.float32) if leaf.is_type(node) else node

    return jax.tree.map(one, params, is_leaf=leaf.is_type)


def parts(params: Params, rules: Sequence[Any], arch: Architecture, original: Params | None = None) -> dict[str, list[Part]]:
    """Module -> the kernels that it holds, in order, of every module whose weight can have an adapter."""
    nodes = {jax.tree_util.keystr(path): node for path, node in jax.tree.leaves_with_path(params, is_leaf=leaf.is_type)}
    dense = {} if original is None else {_place(path): node for path, node in jax.tree.leaves_with_path(original)}
    modules: dict[str, list[Part]] = {}
    for key, slots in weights.slots(plain(params), rules).items():
        for slot in slots:
            if peft_tables.takes(slot, arch.head):
                # Its layers need not be stacked where those of `params` are, nor the reverse.
                before = dense.get((slot.rule.path, slot.layer), dense.get((slot.rule.path, None)))
                modules.setdefault(peft_modules.of_tensor(slot.name), []).append(Part(slot, nodes[key], before))
    return {name: sorted(found, key=lambda part: part.slot.rule.part) for name, found in modules.items()}


def _tied(modules: Mapping[str, list[Part]], arch: Architecture, copies: Mapping[str, str]) -> dict[str, list[Part]]:
    """Module -> the adapted table that it is tied to; ValueError for a DoRA of one that is read in both directions."""
    found = {}
    for copy, name in copies.items() if arch.head == "lm" else ():
        module, (part, *_) = peft_modules.of_tensor(copy), modules.get(peft_modules.of_tensor(name), [None])
        if part is None or not adapt.is_adapter(part.node):
            continue
        turned = peft_tables.turns(module)
        if turned and part.node.kind == "dora":
            raise ValueError(
                f"a DoRA of {part.slot.rule.path}, which is the output head as well: PEFT has a length for each output, and those of the"
                f" embedding are the inputs of {module}.\n  Accepted: LoRA of a tied table; DoRA where the head is one of its own.\n"
                "  Write merged weights (python -m jaxllm.convert), or train with lora."
            )
        found[module] = [part._replace(turned=turned)]
    return found


def _place(path: Sequence[Any]) -> tuple[str, int | None]:
    """(path name, index of the layer in a list)."""
    return path_name(path), next((key.idx for key in path if isinstance(key, jax.tree_util.SequenceKey)), None)


def copied(architecture: str, exported: weights.Exported) -> dict[str, str]:
    """Name of a tensor that is tied in this model -> the one that it equals."""
    return {
        copy: name
        for copy, name in families.find(architecture).copies.items()
        if copy not in exported.shapes and name in exported.shapes
    }


def _kind(adapted: Mapping[str, list[Part]]) -> str:
    """lora or dora; ValueError if it is neither, or both."""
    kinds = {part.node.kind for found in adapted.values() for part in found if adapt.is_adapter(part.node)}
    nested = any(adapt.is_adapter(part.node) and adapt.is_adapter(part.node.base) for found in adapted.values() for part in found)
    if len(kinds) != 1 or nested or not kinds <= {"lora", "dora"}:
        what = "an adapter inside of an adapter" if nested else " and ".join(sorted(kinds)) or "no adapter"
        raise ValueError(
            f"the parameters hold {what}.\n  Accepted: either lora or dora beside some kernels.\n"
            "  Export a run whose train.transforms has one of these."
        )
    return next(iter(kinds))


def _whole(
    whole: Collection[str],
    modules: Mapping[str, list[Part]],
    architecture: str,
    exported: weights.Exported,
    rules: Sequence[Any],
) -> dict[str, str]:
    """Name of a tensor to be stored whole -> the tensor of ours that it is: all tensors of a module, and of those that are tied to it."""
    copies = copied(architecture, exported)
    every = {**{name: name for name in exported.shapes}, **copies}
    patterns = {rule.name for rule in rules if rule.path in whole}
    layers = range(max((part.slot.layer or 0) for found in modules.values() for part in found) + 1)
    chosen = {pattern.format(layer=layer) for pattern in patterns for layer in layers} & set(exported.shapes)
    chosen |= {copy for copy, name in copies.items() if name in chosen}
    # A tensor beside others of its own below it (BERT's cls.predictions.bias) is stored as its copy.
    owners = {peft_modules.of_tensor(name) for name in chosen}
    owners -= {owner for owner in owners if any(other.startswith(f"{owner}.") for other in map(peft_modules.of_tensor, every))}
    if both := sorted(owner for owner in owners if any(leaf.is_type(part.node) for part in modules.get(owner, ()))):
        raise ValueError(
            f"trained whole beside an adapter or a quantized kernel of the same module: {weights.listing(both)}.\n"
            "  Accepted: in PEFT a module has an adapter, or it is stored whole, its bias with it.\n"
            "  Leave the biases of these out of lora.also, or write merged weights (python -m jaxllm.convert)."
        )
    return {name: ours for name, ours in every.items() if peft_modules.of_tensor(name) in owners}


def _shapes(adapted: Mapping[str, list[Part]], products: Mapping[str, Product], is_dora: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for module, found in adapted.items():
        (a, b), rank = found[0].names, products[module].rank
        outputs = sum(part.outputs for part in found)
        shapes |= {module + a: (rank, found[0].sides[0]), module + b: (outputs, rank)}
        shapes |= {module + MAGNITUDE: (outputs,)} if is_dora else {}
    return shapes


def _product(found: Sequence[Part]) -> Product:
    adapters = [part.node for part in found if adapt.is_adapter(part.node)]
    rank = adapters[0].a.shape[-1] if _share_a(found) else sum(node.a.shape[-1] for node in adapters)
    return Product(rank * (1 if found[0].original is None else 2), adapters[0].scale)


def _share_a(found: Sequence[Part]) -> bool:
    """Whether the kernels read the same: an adapter of the module, as PEFT trains it."""
    adapted = [part for part in found if adapt.is_adapter(part.node)]
    if len(adapted) == 1:
        return True
    if found[0].original is not None:
        return False
    first, *others = [_layer(part.node.a, part) for part in adapted]
    return all(np.array_equal(first, other) for other in others)


def _layer(array: Any, part: Part) -> np.ndarray:
    """Of one layer, on the host."""
    stacked = part.node.shape != part.slot.shape
    return np.asarray(array[part.slot.layer] if stacked else array)


def _factors(found: Sequence[Part], is_dora: bool) -> Factors:
    """Of a module, from its kernels."""
    thin = [_thin(part) if adapt.is_adapter(part.node) else None for part in found]
    shared = _share_a(found)
    firsts = [each for each in thin if each is not None]
    scale = firsts[0].scale
    a = firsts[0].a if shared else np.concatenate([each.a for each in firsts])
    b, column = np.zeros((sum(part.outputs for part in found), len(a)), np.float32), 0
    row = 0
    for part, each in zip(found, thin, strict=True):
        if each is not None:
            rank = each.b.shape[1]
            b[row : row + part.outputs, column : column + rank] = each.b * (each.scale / scale)
            column += 0 if shared else rank
        row += part.outputs
    magnitudes = [_magnitude(part) for part in found] if is_dora else []
    return Factors(a, b, scale, np.concatenate(magnitudes) if is_dora else None)


def _thin(part: Part) -> Factors:
    node = part.node
    a = _layer(node.a, part).reshape(-1, node.a.shape[-1])
    b = _layer(node.b, part).reshape(a.shape[1], -1)
    if part.original is not None:
        base, original = (_matrix(kernel, part) for kernel in (node.base, part.original))
        a0, b0 = pissa.taken(original, base, a.shape[1], node.scale, part.slot.name)
        a, b = np.concatenate([a, a0], axis=1), np.concatenate([b, -b0])
    return Factors(b, a, node.scale, None) if part.turned else Factors(a.T, b.T, node.scale, None)


def _magnitude(part: Part) -> np.ndarray:
    """Of DoRA; without an adapter the length that the kernel has."""
    if adapt.is_adapter(part.node):
        return _layer(part.node.magnitude, part).reshape(-1)
    return np.asarray(dora.norm(jnp.asarray(_matrix(part.node, part)), 1))


def _matrix(kernel: Any, part: Part) -> np.ndarray:
    """A kernel of one layer, whatever form it has, as [inputs, outputs] in float32."""
    stacked = kernel.shape != part.slot.shape
    dense = np.asarray(leaf.dense(jax.tree.map(lambda array: array[part.slot.layer], kernel) if stacked else kernel), np.float32)
    read, _ = peft_tables.sides(part.slot)
    return dense.T if part.slot.rule.path == grown.HEAD else dense.reshape(math.prod(read), -1)
