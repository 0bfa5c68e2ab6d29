"""What prepared data was made from, and whether it would come out the same today."""

import hashlib
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxllm import __version__
from jaxllm.config import flatten
from jaxllm.consistency import LOADED
from jaxllm.data import documents, examples, shards
from jaxllm.data.sources import text
from jaxllm.data.tokenizers import chat_template, file, files

TRAINED = ("bpe", "unigram")
# Files beside the one of the tokenizer that say which ids are special, and how conversations are written.
BESIDE = (file.SETTINGS, files.RECORD, chat_template.TEXT_FILE)


class SourceGone(ValueError):
    """The text from which the shards were made is no longer there, so that nothing can be said about changes."""


def recipe(config: ConfigDict) -> dict[str, Any]:
    """The config fields that the shards depend on, and no others, as JSON values."""
    flat, made = flatten(config), examples.make(config)
    keys = ["data.source", "data.text_field", "data.max_documents", "data.cleaners", "tokenizer.kind"]
    keys += ["data.min_chars"] if "min_chars" in config.data.cleaners else []
    keys += ["data.validation_source"] if config.data.validation_source else ["data.validation_frac", "data.split_by"]
    keys += ["data.replay_source", "data.validation_frac", "data.split_by"] if config.data.replay_source else []
    keys += ["tokenizer.vocab_size"] if config.tokenizer.kind in TRAINED else []
    keys += ["tokenizer.path"] if config.tokenizer.kind in LOADED else []
    keys += ["tokenizer.add_tokens"] if config.tokenizer.add_tokens else []
    fields = {key: flat[key] for key in keys} | {"data.row_tokens": examples.row_tokens(config), "format": shards.FORMAT}
    return json.loads(json.dumps(fields | dict(made.recipe)))


def origins(config: ConfigDict) -> dict[str, list[dict[str, Any]]]:
    """By config field: every file that is read, with size, modification time and sha256 or the name of what is no file.

    A data set of the hub is known by its name alone; Python's documentation by the version of Python.
    """
    return {key: [_describe(place, hashed=True) for place in places] for key, places in _places(config).items()}


def changes(record: dict[str, Any], config: ConfigDict) -> list[str]:
    """Why shards with this record are stale, in words; empty if they are fresh.

    A file with another time of modification is hashed before it counts as changed.
    """
    was, now = record.get("recipe", {}), recipe(config)
    if not was:
        return ["the last prepare did not finish"]
    found = [f"{key} was {was.get(key)!r} and is {now.get(key)!r}" for key in sorted(was | now) if was.get(key) != now.get(key)]
    if found:
        return found
    try:
        today = _places(config)
    except ValueError as error:
        raise SourceGone(str(error).partition("\n")[0]) from error
    for key, places in today.items():
        before = {entry["path"]: entry for entry in record["origins"][key]}
        found += [f"'{path}' is gone" for path in before if path not in places]
        found += [f"'{place}' is new" for place in places if place not in before]
        found += [f"'{place}' has changed" for place in places if place in before and _differs(before[place])]
    return found


def versions() -> dict[str, str]:
    """Of what decides about the result."""
    names = ("numpy", "sentencepiece")
    return {"jaxllm": __version__, "python": platform.python_version()} | {name: metadata.version(name) for name in names}


def _places(config: ConfigDict) -> dict[str, list[str]]:
    fields = ("source", "validation_source", "replay_source")
    places = {f"data.{name}": _resolve(config.data[name], f"data.{name}") for name in fields if config.data[name]}
    if config.tokenizer.kind in LOADED:
        places["tokenizer.path"] = _tokenizer_files(Path(config.tokenizer.path).expanduser())
    return places


def _tokenizer_files(path: Path) -> list[str]:
    """A folder's files, or a file and those beside it."""
    if path.is_dir():
        return sorted(str(each) for each in path.iterdir() if each.is_file())
    if not path.is_file():
        raise ValueError(
            f"tokenizer.path = '{path}' does not exist.\n  Accepted: tokenizer.model, tokenizer.json, or a folder with one of them."
            "\n  Set tokenizer.path."
        )
    return [str(path), *(str(path.with_name(name)) for name in BESIDE if path.with_name(name).is_file())]


def _resolve(source: str, setting: str) -> list[str]:
    return [location if os.path.exists(location) else source for _, location in documents.readings(source, setting)]


def _describe(place: str, *, hashed: bool) -> dict[str, Any]:
    if not os.path.isfile(place):
        return {"path": place, "version": platform.python_version() if place in documents.OF_PYTHON else ""}
    status = os.stat(place)
    entry = {"path": place, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    if hashed:
        try:
            with open(place, "rb") as content:
                entry["sha256"] = hashlib.file_digest(content, "sha256").hexdigest()
        except OSError as error:
            raise ValueError(text.unreadable(place, error)) from error
    return entry


def _differs(before: dict[str, Any]) -> bool:
    now = _describe(before["path"], hashed=False)
    if now.items() <= before.items():
        return False
    if now.get("bytes") != before.get("bytes") or "bytes" not in now:
        return True
    return _describe(before["path"], hashed=True)["sha256"] != before["sha256"]
