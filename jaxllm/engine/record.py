"""What a checkpoint says about itself: step, validation loss, every array's shape, dtype and digest, its files, what the run adds.

It is a JSON file inside the checkpoint, so that it becomes visible together with the arrays or not at all. Whether a
checkpoint fits a model is decided here, before anything is loaded: the storage format would cast a wrong dtype silently.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

# Config fields behind the axes of a parameter (see the layout in models/), not counting the axis of stacked layers.
AXES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"embed/tokens|head/kernel", ("model.vocab_size (or the tokenizer)", "model.width")),
    (r"embed/positions", ("model.context_tokens", "model.width")),
    (r"attention/q/kernel", ("model.width", "model.heads", "model.head_dim")),
    (r"attention/[kv]/kernel", ("model.width", "model.kv_heads", "model.head_dim")),
    (r"attention/o/kernel", ("model.heads", "model.head_dim", "model.width")),
    (r"attention/q/bias", ("model.heads", "model.head_dim")),
    (r"attention/[kv]/bias", ("model.kv_heads", "model.head_dim")),
    (r"mlp/(gate|up)/kernel", ("model.width", "model.mlp_width")),
    (r"mlp/down/kernel", ("model.mlp_width", "model.width")),
    (r"mlp/(gate|up)/bias", ("model.mlp_width",)),
    (r"(norm|attention/o|mlp/down)/(scale|bias)", ("model.width",)),
)
# Config fields that decide whether an array exists; the first that matches its name counts.
PRESENCE: tuple[tuple[str, str], ...] = (
    (r"loss_scale", "precision.compute"),
    (r"ema(/|$)", "train.ema_decay"),
    (r"frozen/", "train.trainable or train.frozen_layers"),
    (r"opt_state/", "optimizer.name"),
    (r"norm/bias$", "model.norm or model.bias"),
    (r"bias$", "model.bias"),
    (r"head/kernel$", "model.tied_head"),
    (r"embed/positions$", "model.positions"),
    (r"mlp/gate/", "model.activation"),
)
# So many names of each kind are listed in an error.
LISTED = 4


class CheckpointError(ValueError):
    """A checkpoint cannot be written, read or used; the message says which one, why, and what to do."""


class DamagedError(CheckpointError):
    """The files of a committed checkpoint, in the folder `path`, are not what was written. advice: what to do."""

    def __init__(self, path: Path, what: str, advice: str = ""):
        super().__init__(f"checkpoint {path} is damaged: {what}.{advice}")
        self.path, self.what = path, what


@dataclass(frozen=True)
class Leaf:
    """One array of a checkpoint, in canonical form. layers: which layers its stack is of; empty: all, or it is no stack."""

    shape: tuple[int, ...]
    dtype: str
    digest: str
    layers: tuple[int, ...] = ()

    def to_json(self) -> list[Any]:
        return [list(self.shape), self.dtype, self.digest, *([list(self.layers)] if self.layers else [])]


@dataclass(frozen=True)
class Record:
    """step: updates done. loss: validation loss at this step, if it was measured. leaves: name -> Leaf. meta: JSON of the run.

    files: path inside the checkpoint -> bytes, for all files but the record.
    frozen: fingerprint of the frozen parameters that belong to it and lie in a folder of their own; None if there are none.
    """

    step: int
    loss: float | None
    leaves: Mapping[str, Leaf]
    meta: Mapping[str, Any]
    files: Mapping[str, int]
    frozen: str | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON object with a checksum of itself."""
        leaves = {name: leaf.to_json() for name, leaf in self.leaves.items()}
        body: dict[str, Any] = {
            "step": self.step,
            "loss": self.loss,
            "leaves": leaves,
            "meta": dict(self.meta),
            "files": dict(self.files),
        }
        if self.frozen is not None:
            body["frozen"] = self.frozen
        return {**body, "checksum": _checksum(body)}

    def fingerprint(self) -> str:
        """Of the arrays alone, whenever they were written: names, shapes, dtypes, digests."""
        return _checksum({name: leaf.to_json() for name, leaf in self.leaves.items()})


def check_meta(meta: Mapping[str, Any]) -> None:
    """ValueError if `meta` does not come back from JSON as it is."""
    try:
        same = json.loads(json.dumps(meta)) == meta
    except (TypeError, ValueError) as error:
        raise ValueError(f"meta of a checkpoint: {error}.\n  Accepted: what JSON can hold. Change the value.") from error
    if not same:
        raise ValueError(
            "meta of a checkpoint does not come back from JSON as it was given.\n"
            "  Accepted: dicts with text keys, lists (not tuples), text, finite numbers, booleans, None. Change the value."
        )


def from_json(stored: Any) -> Record:
    """The inverse of `Record.to_json`; ValueError if it is incomplete or was altered."""
    if not isinstance(stored, dict) or "checksum" not in stored:
        raise ValueError("it is incomplete")
    body = {key: value for key, value in stored.items() if key != "checksum"}
    if _checksum(body) != stored["checksum"]:
        raise ValueError("it was altered, as its checksum does not fit")
    leaves = {
        name: Leaf(tuple(shape), dtype, digest, tuple(*layers)) for name, (shape, dtype, digest, *layers) in body["leaves"].items()
    }
    return Record(body["step"], body["loss"], leaves, body["meta"], body["files"], body.get("frozen"))


def _checksum(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


def check_fits(
    saved: Mapping[str, Leaf], wanted: Mapping[str, jax.ShapeDtypeStruct], held: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """CheckpointError that lists the differing arrays and the config fields behind them, if `saved` is not exactly `wanted`.

    held: name -> layers of those stacks that are to be of some layers only.
    """
    missing = [name for name in wanted if name not in saved]
    unexpected = [name for name in saved if name not in wanted]
    both = [name for name in wanted if name in saved]
    layers = [name for name in both if saved[name].layers != held.get(name, ())]
    shapes = [name for name in both if name not in layers and saved[name].shape != wanted[name].shape]
    dtypes = [name for name in both if saved[name].dtype != wanted[name].dtype.name]
    if not (missing or unexpected or layers or shapes or dtypes):
        return
    lines = [f"{where} is from another model or another setup; nothing was loaded."]
    lines += _listing("not in the checkpoint", missing, {name: str(list(wanted[name].shape)) for name in missing})
    lines += _listing("only in the checkpoint", unexpected, {name: str(list(saved[name].shape)) for name in unexpected})
    lines += _listing(
        "layers",
        layers,
        {name: f"{_which(saved[name].layers)} in the checkpoint, {_which(held.get(name))} here" for name in layers},
    )
    lines += _listing(
        "shape", shapes, {name: f"{_size(saved[name])} in the checkpoint, {_size(wanted[name])} here" for name in shapes}
    )
    lines += _listing(
        "dtype", dtypes, {name: f"{saved[name].dtype} in the checkpoint, {wanted[name].dtype} here" for name in dtypes}
    )
    fields = _fields_behind([*missing, *unexpected], {name: (saved[name].shape, wanted[name].shape) for name in shapes})
    likely = f"; likely different: {', '.join(fields)}" if fields else ""
    lines.append(f"  Accepted: the config that the checkpoint was trained with (config.json of its run){likely}.")
    lines.append("  Set it back, or use another --workdir.")
    raise CheckpointError("\n".join(lines))


def _size(leaf: Leaf | jax.ShapeDtypeStruct) -> str:
    return str(list(leaf.shape))


def _which(layers: Sequence[int] | None) -> str:
    return f"layers {', '.join(map(str, layers))}" if layers else "all layers"


def _listing(title: str, names: Sequence[str], details: Mapping[str, str]) -> list[str]:
    if not names:
        return []
    more = f", and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return [f"  {title}: " + ", ".join(f"{name} ({details[name]})" for name in names[:LISTED]) + more]


def _fields_behind(names: Sequence[str], shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> list[str]:
    """Config fields that explain the differences, without repetition."""
    # What the optimizer holds follows the parameters, so these alone explain a difference if they differ.
    primary = [name for name in names if not name.startswith(("opt_state/", "ema/"))]
    fields = [next((field for pattern, field in PRESENCE if re.search(pattern, name)), None) for name in primary or names]
    for name, (one, other) in shapes.items():
        fields += _axes_behind(name, one, other)
    return list(dict.fromkeys(field for field in fields if field))


def _axes_behind(name: str, one: tuple[int, ...], other: tuple[int, ...]) -> list[str]:
    axes = next((axes for pattern, axes in AXES if re.search(f"({pattern})$", name)), ())
    if "layers/" in name:
        axes = ("model.layers", *axes)
    if not len(axes) == len(one) == len(other):
        return []
    return [axis for axis, a, b in zip(axes, one, other, strict=True) if a != b]
