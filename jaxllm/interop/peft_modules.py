"""How an adapter_config.json says which modules it means: by the ends of their names, or by a regular expression.

`target_modules` is a list of names, of which each means the modules that are called so or end with "." and it, or one regular expression
for whole names. `modules_to_save` is a list of endings, with or without a dot before them. The keys of `rank_pattern` and `alpha_pattern`
are regular expressions for the end of a name. Names are those of the base model, as in `transformer.h.0.attn.c_attn`.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

ALL_LINEAR = "all-linear"


def of_tensor(name: str) -> str:
    """The module of a tensor: its name without the last part."""
    return name.rpartition(".")[0]


def universe(modules: Collection[str]) -> set[str]:
    """These modules and all that they are in."""
    parts = [name.split(".") for name in modules]
    return {".".join(part[: length + 1]) for part in parts for length in range(len(part))}


def matches(targets: str | Collection[str], name: str) -> bool:
    """Whether target_modules (or exclude_modules) mean the module."""
    if isinstance(targets, str):
        return targets == ALL_LINEAR or re.fullmatch(targets, name) is not None
    return any(_ends(name, target) for target in targets)


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def targets(chosen: Collection[str], every: Collection[str]) -> str | tuple[str, ...]:
    """target_modules that mean exactly the `chosen` ones of `every`: the shortest endings, the same for all layers; where there are none,
    a regular expression."""
    shortest = {_shortest(name, chosen, every, _ends, layers=False) for name in chosen}
    if None not in shortest:
        return tuple(sorted(end for end in shortest if end))
    # Numbers stand for layers, if that means no other module.
    general = {re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(name)) for name in chosen}
    pattern = "|".join(sorted(general))
    exact = "|".join(sorted(map(re.escape, chosen)))
    return pattern if all((name in chosen) == matches(pattern, name) for name in every) else exact


def saved(chosen: Collection[str], every: Collection[str]) -> tuple[str, ...]:
    """modules_to_save that mean exactly the `chosen` ones of `every`."""
    return tuple(sorted({_shortest(name, chosen, every, str.endswith, layers=True) or name for name in chosen}))


def _shortest(
    name: str, chosen: Collection[str], every: Collection[str], ends: Callable[[str, str], bool], layers: bool
) -> str | None:
    """The shortest ending of `name` that only chosen modules have, or None. layers: it may have the number of a layer."""
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        end = ".".join(parts[-count:])
        if parts[-count].isdigit() and not layers:
            return None
        if not parts[-count].isdigit() and all(other in chosen for other in every if ends(other, end)):
            return end
    return None


def look_up(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of rank_pattern or alpha_pattern for a module: that of the first key that fits."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def union(several: Sequence[str | Collection[str]]) -> str | tuple[str, ...]:
    """target_modules that mean what any of these mean."""
    if not any(isinstance(each, str) for each in several):
        return tuple(sorted({name for each in several for name in each}))
    if ALL_LINEAR in several:
        return ALL_LINEAR
    patterns = [each if isinstance(each, str) else _ending_in(each) for each in several]
    return patterns[0] if len(set(patterns)) == 1 else "|".join(f"({pattern})" for pattern in patterns)


def _ending_in(names: Collection[str]) -> str:
    return rf"(.*\.)?({'|'.join(sorted(map(re.escape, names)))})"
