"""Compiled programs are kept on disk, so that the second run of a config starts sooner."""

import os
from pathlib import Path

import jax


def use_cache() -> None:
    """Keeps compiled programs in ~/.cache/jaxllm (or $XDG_CACHE_HOME/jaxllm), unless JAX_COMPILATION_CACHE_DIR says where."""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(home / "jaxllm" / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
