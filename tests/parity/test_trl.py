"""The losses of preferences, rewards and policies that are kept as files are those of the TRL that is installed. Part of `make parity`."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
# Remarks of TRL and of what it imports on their own deprecations.
pytestmark = pytest.mark.filterwarnings("ignore")


def numbers(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every number, text and truth value of a tree of JSON, by its place."""
    if isinstance(tree, dict | list):
        for key, part in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from numbers(part, f"{path}/{key}")
    else:
        yield path, tree


FILES = {"make_preferences": "preferences.json", "make_rewards": "rewards.json", "make_policy": "policy/expected.json"}


@pytest.mark.parametrize(("script", "file"), FILES.items())
def test_kept_losses_are_those_of_trl(script: str, file: str) -> None:
    kept = dict(numbers(json.loads((GOLDEN / file).read_text(encoding="utf-8"))))
    made = dict(numbers(json.loads(json.dumps(importlib.import_module(script).make()))))
    assert kept.keys() == made.keys() and len(kept) > 50
    for path, value in kept.items():
        if isinstance(value, float):
            np.testing.assert_allclose(made[path], value, rtol=1e-6, atol=1e-7, err_msg=path)
        elif path != "/trl":
            assert made[path] == value, path
