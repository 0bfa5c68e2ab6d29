"""Which family a class of transformers belongs to, and which class a model of ours is."""

import difflib
from collections.abc import Mapping
from typing import Any

from jaxllm.interop import bert, gpt2, llama, t5
from jaxllm.interop.family import Family
from jaxllm.models.architecture import Architecture

FAMILIES = (gpt2.FAMILY, llama.FAMILY, bert.FAMILY, t5.FAMILY)


def find(architecture: str) -> Family:
    """The family of a known class."""
    return next(family for family in FAMILIES if architecture in family.classes)


def identify(values: Mapping[str, Any], where: str) -> str:
    """The class that a config.json names, or the first one of its model_type; ValueError with the known and the nearest one."""
    named = values.get("architectures") or []
    known = [name for family in FAMILIES for name in family.classes]
    for name in named if isinstance(named, list) else [named]:
        if name in known:
            return name
    model_type = values.get("model_type")
    if not named and model_type is not None:
        for family in FAMILIES:
            if model_type in family.model_types:
                return family.model_types[model_type]
    given = f"architectures = {named!r}" if named else f"model_type = {model_type!r}"
    types = [name for family in FAMILIES for name in family.model_types]
    near = difflib.get_close_matches(str(named[0] if named else model_type), known if named else types, n=1, cutoff=0.4)
    hint = f" The nearest is {near[0]}." if near else ""
    raise ValueError(
        f"{where}: {given} is no architecture that can be read.{hint}\n  Accepted: {', '.join(known)}.\n"
        "  Take a model of one of these, or correct the file."
    )


def choose(arch: Architecture) -> str:
    """The class that can hold the model; ValueError that lists what no class can express."""
    broken = {family.name: family.limits(arch) for family in FAMILIES}
    for family in FAMILIES:
        if not family.limits(arch):
            return family.choose(arch)
    name, limits = min(broken.items(), key=lambda item: len(item[1]))
    listed = "".join(f"\n  {field} = {value}; {name} has {accepted}" for field, value, accepted in limits)
    raise ValueError(
        f"no architecture in transformers is this model (model.name = '{arch.family.name}'). The nearest is {name}:{listed}\n"
        f"  Accepted: models that are {', '.join(broken)} in all of this.\n  Train one of these to export it."
    )
