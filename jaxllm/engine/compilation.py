"""Compiled programs are kept on disk, so that the second run of a config starts sooner."""

import os
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache


def use_cache() -> None:
    """Keeps compiled programs in ~/.cache/jaxllm (or $XDG_CACHE_HOME/jaxllm), unless JAX_COMPILATION_CACHE_DIR says where."""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(home / "jaxllm" / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def distrust_cache(platform: str, devices: int) -> None:
    """From here on every program is compiled, where programs from the cache are not to be trusted: on pretend devices.

    All that a shard_map sends has one channel, and the order that keeps its messages apart on a CPU is lost when a program is loaded:
    wrong numbers, or a hang (jax 0.10.2).
    """
    if platform == "cpu" and devices > 1:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()
