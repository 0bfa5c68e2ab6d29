"""Eight fake CPU devices and a compilation cache for every test."""

import os
from pathlib import Path

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
CACHE = Path(__file__).resolve().parent.parent / ".cache" / "xla"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# Linux gives a process 65,530 mappings of memory (vm.max_map_count). Programs that are compiled hold some each, and without one the
# compiler crashes.
MAPPINGS, MOST_MAPPINGS = Path("/proc/self/maps"), 15_000


@pytest.fixture(autouse=True, scope="module")
def _release_programs():
    """A file of tests that ends with many mappings lets go of what is compiled: of 8,281, 797 were left."""
    yield
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MOST_MAPPINGS:
        import jax

        jax.clear_caches()


@pytest.fixture(scope="module")
def compiled_anew():
    """No compilation cache. For programs in which a shard_map sends: jax gives all that it sends one channel, and the order that keeps
    those of a channel apart on a CPU is lost when a program is loaded from the cache (jax 0.10.2): wrong numbers, or none ever."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of adapted_runs.py, which tests may add to."""
    import adapted_runs

    return adapted_runs.write(tmp_path_factory.mktemp("adapters"))
