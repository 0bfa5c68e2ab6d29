"""The files of an adapter as PEFT (https://github.com/huggingface/peft) has them: adapter_config.json and adapter_model.safetensors.

Beside the weight W [outputs, inputs] of a module stand lora_A [rank, inputs] and lora_B [outputs, rank]; the module does what W + s B A
would, and with lora_magnitude_vector [outputs] what DoRA makes of it (transforms/dora.py). s is lora_alpha / rank, or with use_rslora
lora_alpha / sqrt(rank). An embedding [V, D] has lora_embedding_A [rank, V] and lora_embedding_B [D, rank]. Modules of modules_to_save are
stored whole, and of trainable_token_indices the rows of these tokens. The files do not hold the base, but that of an adapted embedding;
what they are beside ours is in interop/peft_params.py, peft_attach.py and peft_tables.py.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxllm.interop import peft_modules, safetensors
from jaxllm.interop.family import Settings
from jaxllm.interop.weights import listing

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
A, B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
EMBEDDING_A, EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"
ROWS = ".token_adapter.trainable_tokens_delta"
# Where PEFT stores what is below an adapter it is the module's own; the rows that the base had are not needed.
BELOW, FORMER_ROWS = (".token_adapter.base_layer.", ".base_layer."), ".trainable_tokens_original"
# Where the vocabulary grew, PEFT writes a module of modules_to_save three times: so, as it was before, and under its own name.
REPEATED = (".modules_to_save.", ".original_module.")
# Modules of modules_to_save or target_modules with which ensure_weight_tying ties; without one of them it does nothing.
TYING = ("embed_tokens", "lm_head")
# init_lora_weights with which the base stays as it is.
BASE_KEPT = (True, False, "gaussian", "eva", "orthogonal")
# Keys that say nothing about what the adapter does; and those that are read here. Any other one must be null, false or empty.
SILENT = {
    "auto_mapping",
    "revision",
    "peft_version",
    "inference_mode",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
    "layers_pattern",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "velora_config",
}
READ = {
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "lora_dropout",
    "bias",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "fan_in_fan_out",
    "use_rslora",
    "use_dora",
    "init_lora_weights",
    "ensure_weight_tying",
    "trainable_token_indices",
}


class Product(NamedTuple):
    """What stands beside the weight of a module: s times a product of this rank."""

    rank: int
    scale: float


class Factors(NamedTuple):
    """The same with its numbers, in float32: a [rank, inputs], b [outputs, rank], magnitude [outputs] or None.

    Inputs of an embedding are the tokens.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None


@dataclass(frozen=True)
class Adapter:
    """products: module -> its product. shapes: name -> shape of every tensor, without PREFIX; read(name) -> the tensor.

    where: what errors call it. base: path or name of the base, "" if it is not known. targets, excluded: target_modules and
    exclude_modules; saved: modules_to_save. tokens: module -> the tokens of which it stores rows. tied: what equals a stored or adapted
    embedding follows it, though it is not stored (ensure_weight_tying). fan_in_fan_out: the weights of the modules are [inputs, outputs].
    """

    where: str
    base: str
    task: str | None
    targets: str | tuple[str, ...]
    excluded: str | tuple[str, ...]
    saved: tuple[str, ...]
    tied: bool
    fan_in_fan_out: bool
    rslora: bool
    dora: bool
    dropout_frac: float
    products: Mapping[str, Product]
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def whole(self) -> tuple[str, ...]:
        """Names of the tensors that are stored whole."""
        return tuple(name for name in self.shapes if ".lora_" not in name and not name.endswith(ROWS))

    def factor_names(self, module: str) -> tuple[str, str]:
        """Names of its tensors A and B."""
        looks_up = any(module + part in self.shapes for part in (EMBEDDING_A, EMBEDDING_B))
        return (module + EMBEDDING_A, module + EMBEDDING_B) if looks_up else (module + A, module + B)

    def factors(self, module: str) -> Factors:
        magnitude = self.read(module + MAGNITUDE).astype(np.float32) if self.dora else None
        a, b = (self.read(name).astype(np.float32) for name in self.factor_names(module))
        return Factors(a, b, self.products[module].scale, magnitude)

    def replaces(self, name: str) -> bool:
        """Whether the tensor of this name is one of modules_to_save; any other that is stored is put into the base's own place."""
        return any(peft_modules.of_tensor(name).endswith(end) for end in self.saved)

    def means(self, module: str) -> bool:
        """Whether target_modules mean the module of this name."""
        return peft_modules.matches(self.targets, module) and not peft_modules.matches(self.excluded, module)

    @property
    def default(self) -> Product:
        """That of most modules."""
        return Counter(self.products.values()).most_common(1)[0][0]

    def alpha(self, product: Product) -> float:
        """lora_alpha, a whole number where it is one but for rounding."""
        alpha = product.scale * (math.sqrt(product.rank) if self.rslora else product.rank)
        return float(round(alpha)) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def is_one(path: str | Path) -> bool:
    """Whether the path is a directory with an adapter."""
    return (Path(path).expanduser() / CONFIG).is_file()


def read(path: str | Path) -> Adapter:
    """The adapter in a directory, its tensors still on disk.

    ValueError for a directory without the two files, damaged ones, another kind than LoRA or DoRA, a setting that has no counterpart
    here, and tensors that are not those of adapter_config.json.
    """
    path = Path(path).expanduser()
    given = Settings(_load(path / CONFIG), str(path / CONFIG))
    _check_kind(given)
    if not (path / TENSORS).is_file():
        raise ValueError(
            f"'{path}' has no {TENSORS}.\n  Accepted: {CONFIG} and {TENSORS}, as PEFT writes them.\n"
            "  Fetch the file. A .bin file can run code when it is opened; where you trust it, load it with PEFT and save it again."
        )
    files = safetensors.Files([path / TENSORS])
    kept = [name for name in files.shapes if not any(part in name for part in (*REPEATED, FORMER_ROWS))]
    stored = {_own_name(name): name for name in kept}
    shapes = {name: files.shapes[theirs] for name, theirs in stored.items()}
    adapter = Adapter(
        where=str(path),
        base=given.get("base_model_name_or_path", ""),
        task=given.get("task_type", None),
        targets=_names(given, "target_modules"),
        excluded=_names(given, "exclude_modules"),
        saved=tuple(_names(given, "modules_to_save")),
        tied=given.flag("ensure_weight_tying", False)
        and any(_ties(_names(given, key)) for key in ("modules_to_save", "target_modules")),
        fan_in_fan_out=given.flag("fan_in_fan_out", False),
        rslora=given.flag("use_rslora", False),
        dora=given.flag("use_dora", False),
        dropout_frac=given.number("lora_dropout", 0.0),
        products=_products(given, shapes),
        shapes=shapes,
        read=lambda name: files.read(stored[name]),
        tokens=_tokens(given, shapes),
    )
    _check_tensors(adapter)
    return adapter


def _own_name(stored: str) -> str:
    """The name of a tensor in the base, or beside it."""
    name = stored.removeprefix(PREFIX)
    for part in BELOW if ".lora_" not in name else ():
        name = name.replace(part, ".")
    return name


def _ties(names: str | tuple[str, ...]) -> bool:
    if isinstance(names, str):
        return any(re.fullmatch(names, name) for name in TYING)
    return any(name.split(".")[-1] in TYING for name in names)


def _tokens(given: Settings, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Of trainable_token_indices: ids, or ids for each ending of names."""
    value = given.get("trainable_token_indices", [])
    ends: dict[str, Any] = value if isinstance(value, dict) else {"": value}
    stored, found = [name.removesuffix(ROWS) for name in shapes if name.endswith(ROWS)], dict[str, tuple[int, ...]]()
    for module in stored:
        ids = next((each for end, each in ends.items() if module.endswith(end)), None)
        if (
            not isinstance(ids, list)
            or not all(type(each) is int and each >= 0 for each in ids)
            or len(ids) != shapes[module + ROWS][0]
        ):
            raise given.refuse(
                "trainable_token_indices", value, f"an id for each row of {module}{ROWS} {list(shapes[module + ROWS])}"
            )
        found[module] = tuple(ids)
    if not stored and any(ends.values()):
        raise given.refuse("trainable_token_indices", value, f"tokens whose rows are in {TENSORS}; there are none")
    return found


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        what = f"has no {CONFIG}" if path.parent.is_dir() else "does not exist"
        raise ValueError(
            f"'{path.parent}' {what}.\n  Accepted: a directory with {CONFIG} and {TENSORS}, as PEFT writes them.\n  Correct the path."
        )
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"'{path}' is not JSON: {error}.\n  Accepted: the file as it was published.\n  Fetch it again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"'{path}' holds a {type(values).__name__}.\n  Accepted: a JSON object.\n  Fetch it again.")
    return values


def _check_kind(given: Settings) -> None:
    """ValueError for what is no plain LoRA or DoRA."""
    given.only("peft_type", "LORA")
    given.only("bias", "none")
    init = given.get("init_lora_weights", True)
    if init not in BASE_KEPT:
        raise ValueError(
            f"{given.where}: init_lora_weights = {init!r}, which changes the base, so that the adapter fits no other one.\n"
            f"  Accepted: {', '.join(map(str, BASE_KEPT))}.\n"
            "  Convert it in PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=PATH_OF_THE_INITIAL_ADAPTER)."
        )
    for key, value in given.values.items():
        off = value is None or value is False or value in ({}, [], "")
        if not off and key not in SILENT | READ:
            raise given.refuse(key, value, "null, false or empty")


def _names(given: Settings, key: str) -> str | tuple[str, ...]:
    value = given.get(key, ())
    if key != "modules_to_save" and isinstance(value, str):
        return value
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise given.refuse(key, value, "a list of names")
    return tuple(value)


def _products(given: Settings, shapes: Collection[str]) -> dict[str, Product]:
    rank, alpha = given.size("r", 8), given.number("lora_alpha", 8)
    ranks, alphas = given.section("rank_pattern"), given.section("alpha_pattern")
    own_ranks = {key: ranks.size(key, 8) for key in ranks.values}
    own_alphas = {key: alphas.number(key, 8) for key in alphas.values}
    if not all((alpha, *own_alphas.values())):
        raise given.refuse("lora_alpha", 0, "a number above 0, also in alpha_pattern")
    products = {}
    adapted = (name.partition(".lora_")[0] for name in shapes if ".lora_" in name)
    for module in dict.fromkeys(adapted):
        own, own_alpha = peft_modules.look_up(own_ranks, module, rank), peft_modules.look_up(own_alphas, module, alpha)
        products[module] = Product(own, own_alpha / (math.sqrt(own) if given.get("use_rslora", False) else own))
    return products


def _check_tensors(adapter: Adapter) -> None:
    """ValueError unless every product has its two factors of the right rank, and a magnitude if all have one, and nothing else."""
    factors = {module: adapter.factor_names(module) for module in adapter.products}
    lengths = [module + MAGNITUDE for module in adapter.products] if adapter.dora else []
    expected = {*lengths, *(name for names in factors.values() for name in names)}
    present = {name for name in adapter.shapes if ".lora_" in name}
    wrong = [
        f"{name} {list(adapter.shapes[name])} with r = {adapter.products[module].rank}"
        for module, names in factors.items()
        for axis, name in enumerate(names)
        if name in present and adapter.shapes[name][axis : axis + 1] != (adapter.products[module].rank,)
    ]
    kinds = {"missing": sorted(expected - present), "unexpected": sorted(present - expected), "of another rank": wrong}
    if not adapter.products:
        kinds["missing"] = ["lora_A and lora_B of any module"]
    if any(kinds.values()):
        lines = [f"{adapter.where}: its tensors are not those of its {CONFIG}; nothing was loaded."]
        lines += [f"  {kind} ({len(names)}): {listing(names)}" for kind, names in kinds.items() if names]
        parts = (A, B, MAGNITUDE) if adapter.dora else (A, B)
        lines.append(
            f"  Accepted: {' and '.join(part[1:] for part in parts)} of every module (an embedding has {EMBEDDING_A[1:]} and"
            f" {EMBEDDING_B[1:]}), of the rank r or that of rank_pattern."
        )
        raise ValueError("\n".join([*lines, "  Fetch both files again."]))


class Written(NamedTuple):
    """files: their names. parameters: how many numbers they hold."""

    files: tuple[str, ...]
    parameters: int


def write(directory: Path, adapter: Adapter) -> Written:
    """Writes the two files, in float32, one tensor at a time."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG).write_text(json.dumps(_config(adapter), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    shapes = {PREFIX + name: adapter.shapes[name] for name in sorted(adapter.shapes)}
    safetensors.write_file(directory / TENSORS, shapes, lambda name: adapter.read(name.removeprefix(PREFIX)), "float32")
    return Written((CONFIG, TENSORS), sum(map(math.prod, shapes.values())))


def _config(adapter: Adapter) -> dict[str, Any]:
    default = adapter.default
    ranks, alphas = _patterns(adapter)
    return {
        "peft_type": "LORA",
        "task_type": adapter.task,
        "base_model_name_or_path": adapter.base or None,
        "inference_mode": True,
        "r": default.rank,
        "lora_alpha": _number(adapter.alpha(default)),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "lora_dropout": adapter.dropout_frac,
        "target_modules": adapter.targets if isinstance(adapter.targets, str) else list(adapter.targets),
        "exclude_modules": _listed(adapter.excluded),
        "modules_to_save": _listed(adapter.saved),
        "ensure_weight_tying": adapter.tied,
        "bias": "none",
        "fan_in_fan_out": adapter.fan_in_fan_out,
        "use_rslora": adapter.rslora,
        "use_dora": adapter.dora,
        "init_lora_weights": True,
    }


def _listed(names: str | tuple[str, ...]) -> str | list[str] | None:
    return names if isinstance(names, str) and names else list(names) or None


def _patterns(adapter: Adapter) -> tuple[dict[str, int], dict[str, float]]:
    """rank_pattern and alpha_pattern for the modules that are not as most are."""
    default, ranks, alphas = adapter.default, {}, {}
    for module, product in adapter.products.items():
        ends = () if isinstance(adapter.targets, str) else adapter.targets
        same = [end for end in ends if {adapter.products[name] for name in adapter.products if _ends(name, end)} == {product}]
        key = re.escape(next((end for end in same if _ends(module, end)), module))
        if product.rank != default.rank:
            ranks[key] = product.rank
        if adapter.alpha(product) != adapter.alpha(default):
            alphas[key] = _number(adapter.alpha(product))
    return ranks, alphas


def _ends(name: str, end: str) -> bool:
    return peft_modules.matches((end,), name)


def _number(value: float) -> float:
    """A whole number as one."""
    return int(value) if value == int(value) else value
