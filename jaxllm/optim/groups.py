"""Learning-rate and weight-decay factors by parameter path."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxllm.transforms import tree


class Factors(NamedTuple):
    """What the learning rate and the weight decay of one parameter are multiplied by."""

    learning_rate: float
    weight_decay: float


def factors(groups: Sequence[tuple[str, float, float]], axes: Any) -> Mapping[str, Factors]:
    """Path name -> Factors, for every parameter in `axes` (any tree that has the paths of all parameters).

    groups: (pattern, learning-rate factor, weight-decay factor); the first pattern that matches a whole path wins, and where
        none does, both factors are 1. Patterns are held against frozen parameters too, so that freezing some does not
        invalidate a group. ValueError if a pattern selects nothing, or if a learning-rate factor is not above 0.
    """
    for index, (pattern, learning_rate, weight_decay) in enumerate(groups):
        try:
            tree.matches(pattern, axes)
        except ValueError as error:
            raise ValueError(f"optimizer.groups[{index}]: {error}") from None
        if learning_rate <= 0 or weight_decay < 0:
            raise ValueError(
                f"optimizer.groups[{index}] = {(pattern, learning_rate, weight_decay)}.\n"
                "  Accepted: a learning-rate factor above 0 and a weight-decay factor of 0 or more.\n"
                "  Change them; to keep parameters as they are, leave them out of train.trainable."
            )
    return {name: _first(groups, name) for name in tree.names(axes)}


def faster(factors: Mapping[str, Factors], adapters: Iterable[str], ratio: float) -> Mapping[str, Factors]:
    """The same, the learning rate of B `ratio` times as high in each adapter (LoRA+: Hayou et al. 2024, arXiv:2402.12354, section 4)."""
    second = {name for name in adapters if name.endswith("/b")}
    return {
        name: each._replace(learning_rate=each.learning_rate * (ratio if name in second else 1)) for name, each in factors.items()
    }


def _first(groups: Sequence[tuple[str, float, float]], name: str) -> Factors:
    for pattern, learning_rate, weight_decay in groups:
        if re.fullmatch(pattern, name):
            return Factors(learning_rate, weight_decay)
    return Factors(1.0, 1.0)
