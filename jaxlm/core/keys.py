"""Random keys by name: typed JAX keys that depend on what they are for, never on the order of calls."""

import zlib

import jax


def fold(key: jax.Array, *names: str | int | jax.Array) -> jax.Array:
    """A key derived from `key` by names and numbers, as `fold(key, "dropout", step)`.

    Strings are folded in by their CRC-32, so the same names give the same key in every process and version.
    """
    for name in names:
        key = jax.random.fold_in(key, zlib.crc32(name.encode()) if isinstance(name, str) else name)
    return key
