"""Settings for every test: 8 CPU devices, rank promotion is an error, compiled programs are kept on disk."""

import gc
import os
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parent.parent

# Eight devices share one pool of threads, by default of eight: where some wait in two collectives at once, none are
# left for the rest, and all wait for good.
os.environ.setdefault("PJRT_NPROC", "32")
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(ROOT / ".pytest_cache" / "xla")
jax.config.update("jax_compilation_cache_dir", cache)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
# Processes that tests start share the cache.
os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Frees what a module compiled. A program takes several memory maps, of which a process may have 65,530; beyond
    them XLA crashes. What comes again is read from disk."""
    yield
    jax.clear_caches()
    gc.collect()
