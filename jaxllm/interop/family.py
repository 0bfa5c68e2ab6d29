"""What a family of foreign models is to us, and how its config.json is read: every value that we cannot represent is an error."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxllm.interop.rules import Rule
from jaxllm.models.architecture import Architecture

# Their names of an activation -> ours. The first name of each is the one that is written.
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


@dataclass(frozen=True)
class Family:
    """One file of this package.

    model_types: "model_type" of config.json -> the class where it names none. classes: class in transformers -> our model.head.
    rules(class, arch): the name table, for every parameter that such a model may have. canonical(name): their name as the table spells it.
    unused: pattern of tensors that files carry and no computation needs. sizes: keys of config.json that decide shapes.
    copies: name of a tensor that files may repeat where it is tied -> the one that it repeats. stand_ins: name of a tensor that may
    be left out although it is not tied here -> the one that it equals.
    read(settings, class) -> fields of config.model. write(arch, class) -> config.json without what all families share.
    limits(arch) -> (field, its value, what is accepted) of all that a class of this family cannot express; choose(arch) -> class.
    """

    name: str
    model_types: Mapping[str, str]
    classes: Mapping[str, str]
    rules: Callable[[str, Architecture], Sequence[Rule]]
    canonical: Callable[[str], str]
    unused: str
    copies: Mapping[str, str]
    stand_ins: Mapping[str, str]
    sizes: tuple[str, ...]
    read: Callable[["Settings", str], dict[str, Any]]
    write: Callable[[Architecture, str], dict[str, Any]]
    limits: Callable[[Architecture], list[tuple[str, Any, str]]]
    choose: Callable[[Architecture], str]


@dataclass(frozen=True)
class Settings:
    """A config.json while it is read. A key that is absent or null has its default, which is that of transformers."""

    values: Mapping[str, Any]
    where: str
    notes: list[str] = field(default_factory=list)

    def get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def size(self, key: str, default: int) -> int:
        """A whole number of 1 or more."""
        value = self.get(key, default)
        if type(value) is not int or value < 1:
            raise self.refuse(key, value, "a whole number, 1 or more")
        return value

    def number(self, key: str, default: float) -> float:
        """A number of 0 or more."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise self.refuse(key, value, "a number, 0 or more")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, value, "true or false")
        return value

    def choice(self, key: str, ours: Mapping[str, str], default: str) -> str:
        """Our word for the value, which is a key of `ours`."""
        value = self.get(key, default)
        if value not in ours:
            raise self.refuse(key, value, ", ".join(ours))
        return ours[value]

    def only(self, key: str, accepted: Any) -> None:
        """ValueError unless the key is absent, null or `accepted`."""
        value = self.get(key, accepted)
        if value != accepted:
            raise self.refuse(key, value, repr(accepted))

    def section(self, key: str) -> "Settings":
        """What is below the key; empty if it is absent."""
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise self.refuse(key, value, "an object")
        return Settings(value, f"{self.where}, {key}", self.notes)

    def dropout(self, defaults: Mapping[str, float]) -> float:
        """The first of these shares; a note if another one differs, as a model here has one for all places."""
        found = {key: self.number(key, default) for key, default in defaults.items()}
        first = next(iter(found.values()))
        if any(value != first for value in found.values()):
            listed = ", ".join(f"{key} {value:g}" for key, value in found.items())
            self.notes.append(f"model.dropout_frac = {first:g} stands for {listed}; it matters in training alone")
        return first

    def classes(self) -> int:
        """The number of labels."""
        labels = self.get("id2label", {})
        return len(labels) if labels else self.size("num_labels", 2)

    def refuse(self, key: str, value: Any, accepted: str) -> ValueError:
        return ValueError(
            f"{self.where}: {key} = {value!r}.\n  Accepted: {accepted}.\n"
            "  A model with another value has no exact counterpart here; correct the file if it is wrong."
        )


def name_of(ours: str) -> str:
    """Their first name of our activation."""
    return next(theirs for theirs, name in ACTIVATIONS.items() if name == ours)


def limit(arch: Architecture, names: Sequence[str], **accepted: tuple[Any, ...]) -> list[tuple[str, Any, str]]:
    """Those of model.name and the given fields whose value is none of the accepted ones, as `Family.limits` gives them."""
    values = {"name": (arch.family.name, names), **{name: (getattr(arch, name), accepted[name]) for name in accepted}}
    return [
        (f"model.{name}".replace("biased", "bias"), _words(value), ", ".join(map(_words, accepted)))
        for name, (value, accepted) in values.items()
        if value not in accepted
    ]


def _words(value: Any) -> str:
    return ("+".join(sorted(value)) or "off") if isinstance(value, frozenset) else str(value)


def prefixed(prefix: str, others: str) -> Callable[[str], str]:
    """A `canonical` that adds the prefix to names without it, unless they begin with one of `others` (a pattern)."""
    return lambda name: name if re.match(rf"({re.escape(prefix)}|{others})\.", name) else f"{prefix}.{name}"
