"""Directories as transformers writes them: config.json, tensors, and files that travel along. Read into our terms, and written."""

import copy
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jaxllm import config as schema
from jaxllm import models
from jaxllm.data import tokenize
from jaxllm.data.chat import encoding
from jaxllm.data.tokenizers import file as tokenizer_file
from jaxllm.interop import families, safetensors, tokenizer_files, weights
from jaxllm.interop.family import Family, Settings
from jaxllm.interop.imported import Imported, Tensors
from jaxllm.interop.packed import formats, keep
from jaxllm.interop.packed import write as write_packed
from jaxllm.interop.packed.dense import Dense
from jaxllm.models.architecture import Architecture
from jaxllm.types import Params, Tokenizer

CONFIG, GENERATION = "config.json", "generation_config.json"
# What travels along, byte for byte.
CARRIED = (*tokenizer_files.NAMES, GENERATION)
# Keys of config.json that no computation here reads; they travel along as well.
CARRIED_KEYS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "sep_token_id",
    "decoder_start_token_id",
    "problem_type",
    "task_specific_params",
)
OBJECTIVES = {"classify": "sequence_classification", "tag": "token_classification", "none": "masked_lm"}
LM_OBJECTIVES = {"bert": "masked_lm", "t5": "span_corruption"}
# Tokens a row of an evaluation, at most: a context of a hundred thousand needs more memory than most machines have.
ROW_TOKENS = 1024
DTYPES = ("float32", "bfloat16", "float16")
MAX_SHARD_BYTES = 5_000_000_000


def is_one(path: Path) -> bool:
    """Whether the path is a directory whose config.json is not one of a run, which has sections."""
    try:
        values = json.loads((path / CONFIG).read_bytes())
    except OSError:
        return False
    except ValueError:
        return any(path.glob("*.safetensors"))
    return isinstance(values, dict) and not isinstance(values.get("model"), dict)


def read(path: str | Path, *, keep_codes: bool = False) -> Imported:
    """The model in a directory, its tensors still on disk.

    keep_codes: where a transform has kernels in such codes as the directory holds, the config has that transform, and `weights.load` gives
    kernels in these codes; else they are dense.

    ValueError for a directory without config.json or tensors, an architecture that is not known, a value in config.json that has no
    counterpart here, damaged files, and a tokenizer with more tokens than the embedding has rows.
    """
    path = Path(path).expanduser()
    values = _config(path / CONFIG)
    given = Settings(values, str(path / CONFIG))
    architecture = families.identify(values, given.where)
    family = families.find(architecture)
    fields, head = family.read(given, architecture), family.classes[architecture]
    _check_range(fields, given.where)
    config = schema.base()
    config.model.update(fields | {"head": head, "classes": given.classes() if head in ("classify", "tag") else 0})
    config.model.init_std = given.number("initializer_range", 0.0)
    # A head with one label gives a number: of what transformers can train like this, a reward is what can be measured here.
    rewards = head == "classify" and config.model.classes == 1
    config.train.objective = "reward" if rewards else OBJECTIVES.get(head) or LM_OBJECTIVES.get(config.model.name, "causal_lm")
    config.data.row_tokens = min(config.model.context_tokens, ROW_TOKENS)
    tensors = _tensors(path, given, family, config, architecture)
    if keep_codes and isinstance(tensors, Dense):
        kept = keep.plan(tensors, weights.kernels(config, family, architecture, tensors.shapes))
        config.update_from_flattened_dict(kept or {})
    if isinstance(tensors, Dense):
        how = "kept in their codes" if config.train.transforms else "read as dense ones"
        given.notes.append(f"weights are quantized ({tensors.settings.words}); they are {how}")
    files = {name: (path / name).read_bytes() for name in (CONFIG, *CARRIED) if (path / name).is_file()}
    tokenizer = _tokenizer(path, config, values)
    return Imported(path, architecture, config, tokenizer, tensors, files, tuple(given.notes))


def _tensors(path: Path, given: Settings, family: Family, config: ConfigDict, architecture: str) -> Tensors:
    """Those of the files; where they are quantized, as if they were not."""
    quantized = formats.identify(path, given)
    files = safetensors.Files(safetensors.find(path))
    if quantized is None:
        return files
    rules = family.rules(architecture, models.build(config).config)
    patterns = [re.escape(rule.name).replace(r"\{layer\}", r"\d+") for rule in rules if rule.inputs and not rule.transposed]
    return Dense(files, quantized, lambda name: any(re.fullmatch(pattern, family.canonical(name)) for pattern in patterns))


def _check_range(fields: Mapping[str, Any], where: str) -> None:
    """ValueError for a value that config.model does not accept; an epsilon of 0 there means another one."""
    for name, value in fields.items():
        accept = schema.SCHEMA[f"model.{name}"].accept
        if not accept.test(value) or (name == "norm_eps" and value == 0):
            words = "above 0" if name == "norm_eps" else accept.words
            raise ValueError(
                f"{where}: model.{name} would be {value!r} ({schema.SCHEMA[f'model.{name}'].meaning}).\n  Accepted: {words}.\n"
                "  Correct the file if it is wrong; else take another model."
            )


def classes_of(carried: Mapping[str, bytes]) -> tuple[str, ...]:
    """The labels in the config.json among the carried files, by number; none if it has none."""
    labels = json.loads(carried.get(CONFIG, b"{}")).get("id2label") or {}
    return tuple(labels[key] for key in sorted(labels, key=int))


def dtype_of(carried: Mapping[str, bytes]) -> str:
    """What the config.json among the carried files says, float32 if that is not one of DTYPES or not there."""
    values = json.loads(carried.get(CONFIG, b"{}"))
    dtype = values.get("dtype") or values.get("torch_dtype")
    return dtype if dtype in DTYPES else DTYPES[0]


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        what = "does not exist" if not path.parent.is_dir() else f"has no {CONFIG}"
        raise ValueError(
            f"'{path.parent}' {what}.\n  Accepted: a directory with {CONFIG} and model.safetensors, as transformers writes them.\n"
            "  Fetch the file, or correct the path."
        )
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"'{path}' is not JSON: {error}.\n  Accepted: the file as it was published.\n  Fetch it again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"'{path}' holds a {type(values).__name__}.\n  Accepted: a JSON object.\n  Fetch it again.")
    return values


def _tokenizer(path: Path, config: ConfigDict, values: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer of the directory, if it has one; fills in the config's tokenizer section."""
    if not tokenizer_file.has_one(path):
        return None
    config.tokenizer.kind, config.tokenizer.path = "file", str(path.absolute())
    tokenizer = tokenizer_file.load(config, lambda: ())
    check_vocabulary(path, tokenizer, config.model.vocab_size)
    if config.model.name == "t5" and (start := values.get("decoder_start_token_id")) is not None:
        # What a decoder behind an encoder begins with; the tokenizer's own files say what its encoder reads.
        tokenizer.bos_id = None if start == tokenizer.pad_id else start
    return tokenizer


def check_vocabulary(path: Path, tokenizer: Tokenizer, vocab_size: int) -> None:
    """ValueError if the tokenizer has ids for which the embedding has no row. Rows without a token are common, and fine."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{path}: its tokenizer has {tokenizer.vocab_size} tokens, its embedding {vocab_size} rows (vocab_size).\n"
            f"  Accepted: a tokenizer of up to {vocab_size} tokens.\n  Fetch the tokenizer files that belong to this model."
        )


class Written(NamedTuple):
    """architecture: the class it was written as. shapes: of the tensors. files: names of all files. notes: lines for the user."""

    architecture: str
    shapes: Mapping[str, tuple[int, ...]]
    files: tuple[str, ...]
    notes: tuple[str, ...]


def write(
    directory: Path,
    params: Params,
    arch: Architecture,
    tokenizer: Tokenizer | None,
    carried: Mapping[str, bytes],
    *,
    classes: Sequence[str] = (),
    dtype: str = "float32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    packing: str = "",
    forced: bool = False,
) -> Written:
    """Writes what transformers (4 and 5) and this package read; ValueError if no class there can express `arch`.

    packing: one of packed.formats.WRITTEN, in which quantized kernels are written; else they are written dense. forced: also what no
    other tool would load.

    carried: files of the model that this one comes from, name -> bytes: its tokenizer is written as it was, and of its config.json
    what no computation here reads. Without tokenizer files among them, they are made from `tokenizer`. classes: names of the classes
    of a head that classifies; numbered ones if there are none.
    """
    architecture = families.choose(arch)
    export = weights.export(params, architecture, arch)
    packed = write_packed.pack(export, families.find(architecture), packing, dtype, forced) if packing else None
    made = tokenizer_files.NOTHING
    notes: tuple[str, ...] = ()
    if tokenizer is not None and arch.head == "classify" and arch.family.kind == "decoder":
        tokenizer, notes = _with_padding(tokenizer)
    if tokenizer is not None and not any(name in carried for name in tokenizer_files.DEFINITIONS):
        made = tokenizer_files.make(tokenizer, arch.context_tokens, arch.family.kind)
    values = {"architectures": [architecture], **families.find(architecture).write(arch, architecture)}
    values |= _labels(arch, classes) | (_carried_keys(carried) if CONFIG in carried else _ids(arch, tokenizer))
    # Both spellings: the first is that of transformers 4.
    notes += made.notes
    if arch.bidirectional_prompt:
        notes += ("transformers attends causally to a prompt, whose tokens see each other in prefix_lm",)
    values |= {"torch_dtype": dtype, "dtype": dtype}
    if packed:
        values[formats.CONFIG] = packed.config
    texts = {CONFIG: _json(values), GENERATION: _json(_generation(values))}
    contents = {**texts, **made.files, **{name: data for name, data in carried.items() if name in CARRIED}}
    if packed:
        contents |= packed.files
        notes += packed.notes
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in contents.items():
        (directory / name).write_bytes(data)
    shapes, make, dtypes = (packed.shapes, packed.make, packed.dtypes) if packed else (export.shapes, export.make, dtype)
    paths = safetensors.write(directory, shapes, make, dtypes, max_shard_bytes)
    names = [*(file.name for file in paths), *([safetensors.INDEX] if len(paths) > 1 else []), *contents]
    return Written(architecture, shapes, tuple(names), notes)


def tokenizer_alone(tokenizer: Tokenizer, arch: Architecture) -> tokenizer_files.Made:
    """The files of a tokenizer for a directory without a model, and what generation_config.json says ends a text."""
    made = tokenizer_files.make(tokenizer, arch.context_tokens, arch.family.kind)
    return made._replace(files={**made.files, GENERATION: _json(_generation(_ids(arch, tokenizer)))})


def _labels(arch: Architecture, classes: Sequence[str]) -> dict[str, Any]:
    if arch.head not in ("classify", "tag"):
        return {}
    names = classes if len(classes) == arch.classes else [f"LABEL_{index}" for index in range(arch.classes)]
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def _ids(arch: Architecture, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Special ids; none rather than those that transformers takes for granted."""
    if tokenizer is None:
        return {}
    pad_id = tokenizer.pad_id if tokenizer.pad_id in tokenize.special_ids(tokenizer) else None
    stops = tokenize.stop_ids(tokenizer)
    eos_ids = tokenizer.eos_id if len(stops) < 2 else list(stops)
    ids: dict[str, Any] = {"bos_token_id": tokenizer.bos_id, "eos_token_id": eos_ids, "pad_token_id": pad_id}
    if arch.family.kind == "encoder_decoder":
        ids["decoder_start_token_id"] = tokenize.start_id(tokenizer)
    return ids


def _with_padding(tokenizer: Tokenizer) -> tuple[Tokenizer, tuple[str, ...]]:
    """The tokenizer, with another pad token if its own one ends a text, and a note on that.

    A decoder's class stands at the token that ends a text; transformers looks for it at a row's last token that is not padding.
    """
    ends = set(tokenize.stop_ids(tokenizer))
    if getattr(tokenizer, "template", None) is not None:
        ends |= set(encoding.answer_stop_ids(tokenizer))
    if tokenizer.pad_id not in ends:
        return tokenizer, ()
    others = sorted({*tokenize.special_ids(tokenizer), *getattr(tokenizer, "special_tokens", {}).values()} - ends)
    if not others:
        note = "the pad token ends a text, and transformers reads a class before it: give it rows without padding"
        return tokenizer, (note,)
    changed = copy.copy(tokenizer)
    changed.pad_id = next((index for index in others if index != tokenizer.bos_id), others[0])
    name = tokenize.names(tokenizer, [changed.pad_id]).get(changed.pad_id, str(changed.pad_id))
    return changed, (f"{name!r} is the pad token: the tokenizer's own one ends a text, where transformers is to read the class",)


def _carried_keys(carried: Mapping[str, bytes]) -> dict[str, Any]:
    """Of the config.json that was read."""
    values = json.loads(carried[CONFIG])
    return {key: values[key] for key in CARRIED_KEYS if key in values}


def _generation(values: Mapping[str, Any]) -> dict[str, Any]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    return {name: values[name] for name in names if values.get(name) is not None}


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
