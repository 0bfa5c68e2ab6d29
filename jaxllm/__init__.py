"""jaxllm: understand and train language models in JAX."""

from typing import Any

__version__ = "0.1.0"

# Imported on first use, so that `import jaxllm` costs no more than its lightest use.
_LAZY = dict.fromkeys(("load", "generate", "chat", "fill_mask", "classify", "reward", "reward_model"), "jaxllm.api")


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'jaxllm' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
