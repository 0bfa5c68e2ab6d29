"""Configs: made with all defaults, checked, read and written. Their fields are those of schema.py.

`base()` is the starting point of every file in configs/; `check()` rejects what cannot run before a device is touched.
"""

import difflib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxllm import consistency
from jaxllm.schema import SCHEMA, Field


def base() -> ConfigDict:
    """All defaults, as a ConfigDict that accepts no unknown key."""
    config = ConfigDict()
    for key, field in SCHEMA.items():
        section, _, name = key.rpartition(".")
        if section and section not in config:
            config[section] = ConfigDict()
        (config[section] if section else config)[name] = field.default
    return config.lock()


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """{"model.layers": 6, ...}."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            flat.update({f"{key}.{name}": inner for name, inner in flatten(value).items()})
        else:
            flat[key] = value
    return flat


def unknown_key(key: str) -> str:
    """The error text for a key that the schema does not have, with the closest one."""
    near = difflib.get_close_matches(key, SCHEMA, n=1, cutoff=0.4) or [
        known for known in SCHEMA if known.rpartition(".")[2] == key.rpartition(".")[2]
    ]
    section = key.rpartition(".")[0]
    listed = [known for known in SCHEMA if known.rpartition(".")[0] == section] or sorted(
        {known.partition(".")[0] for known in SCHEMA}
    )
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"unknown config key '{key}'.{hint}\n  Accepted: {', '.join(listed)}."


def wrong_type(key: str, value: Any) -> str:
    """The error text for a value that the field `key` cannot hold."""
    field = SCHEMA[key]
    kind = type(field.default).__name__
    return (
        f"{key} = {value!r} is not of type {kind} ({field.meaning}).\n  Accepted: {field.accept.words}; default {field.default!r}."
    )


def check(config: ConfigDict) -> None:
    """Raises ValueError, naming the field, what is accepted and what to change, if the config cannot run anywhere."""
    check_fields(config)
    consistency.check(config)


def check_fields(config: ConfigDict) -> None:
    """The same of each field by itself."""
    flat = flatten(config)
    for key in flat:
        if key not in SCHEMA:
            raise ValueError(unknown_key(key) + "\n  Take it out, or correct its spelling.")
    for key, field in SCHEMA.items():
        if key not in flat:
            raise ValueError(f"config key '{key}' is missing.\n  Accepted: {field.accept.words}. Start from jaxllm.config.base().")
        if not _passes(field, flat[key]):
            raise ValueError(
                f"{key} = {flat[key]!r} ({field.meaning}).\n  Accepted: {field.accept.words}.\n  Set it with --config.{key}=..."
            )


def _passes(field: Field, value: Any) -> bool:
    try:
        return bool(field.accept.test(value))
    except TypeError:
        return False


def with_vocabulary(config: ConfigDict, vocab_size: int) -> ConfigDict:
    """A copy, with this model.vocab_size if that was left open (0)."""
    # ConfigDict(config) would share the sections.
    config = config.copy_and_resolve_references()
    config.model.vocab_size = config.model.vocab_size or max(vocab_size, config.model.start_rows)
    return config


def with_classes(config: ConfigDict, classes: int) -> ConfigDict:
    """A copy, with this model.classes if that was left open (0); ValueError if it says another number. 0 classes: no labels.

    A reward is the one class of its model, whatever is given.
    """
    if config.train.objective == "reward":
        classes = 1
    if classes and config.model.classes not in (0, classes):
        raise ValueError(
            f"model.classes = {config.model.classes}, but the training data has {classes} different labels.\n"
            f"  Accepted: {classes}, or 0 for as many as the data has.\n  Set model.classes, or check data.target_field."
        )
    config = config.copy_and_resolve_references()
    config.model.classes = config.model.classes or classes
    return config


def load(path: str | Path) -> ConfigDict:
    """`get_config()` of a Python file, or a run's config.json; the result is checked for unknown keys, not for its sums."""
    path = Path(path)
    if path.suffix == ".json" and path.is_file():
        try:
            return from_json(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ValueError(
            f"no config at '{path}'.\n  Accepted: a Python file with get_config(), or a run's config.json.\n  Correct the path."
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config() if hasattr(module, "get_config") else None
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"{path} has no get_config() that returns a config.\n  Accepted: jaxllm.config.base() with some fields changed.\n"
            "  Write it as the files in configs/ do."
        )
    return config


def to_json(config: ConfigDict) -> str:
    """All fields, indented, in the order of the schema."""
    nested: dict[str, Any] = {}
    for key in SCHEMA:
        section, _, name = key.rpartition(".")
        value = config[section][name] if section else config[name]
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return json.dumps(nested, indent=2) + "\n"


def from_json(text: str) -> ConfigDict:
    """The inverse of `to_json`; fields that it lacks have their default. ValueError for anything but JSON of these fields."""
    config, change = base(), "\n  Correct it, or write the file again from the config in configs/."
    try:
        given = json.loads(text)
    except ValueError as error:
        raise ValueError(f"no JSON: {error}.\n  Accepted: what a run wrote as its config.json.{change}") from error
    if not isinstance(given, dict):
        raise ValueError(f"a {type(given).__name__} instead of a JSON object.\n  Accepted: a run's config.json.{change}")
    for key, value in flatten(given).items():
        if key not in SCHEMA:
            raise ValueError(unknown_key(key) + change)
        section, _, name = key.rpartition(".")
        try:
            (config[section] if section else config)[name] = _tuples(value)
        except TypeError as error:
            raise ValueError(wrong_type(key, value) + change) from error
    return config


def _tuples(value: Any) -> Any:
    return tuple(_tuples(part) for part in value) if isinstance(value, list) else value
