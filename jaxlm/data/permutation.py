"""Keyed permutations of any size with random access: the order of rows in an epoch, of documents in a store.

A Feistel network over the smallest number of bits that holds the size, walked again from every value that
falls outside (cycle walking: Black and Rogaway 2002, "Ciphers with arbitrary finite domains"); no secrets.
`grain.experimental.index_shuffle` is built alike, but Grain 0.2.18 sends two of the indices 0 .. 4**k (k > 7)
to one place, and walks through 2**16 values for small sizes.
"""

import hashlib

import numpy as np
from jaxtyping import Int, UInt64

_MULTIPLIER = np.uint64(0xD6E8FEB86659FD93)
_INCREMENT = 0x9E3779B97F4A7C15
_ROUNDS = 8


def permutation_key(*parts: int | str) -> int:
    """A 64-bit key that depends on all parts, the same everywhere."""
    text = "\0".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def permuted(
    index: Int[np.ndarray, "n"], size: int | Int[np.ndarray, "n"], key: int | UInt64[np.ndarray, "n"]
) -> Int[np.ndarray, "n"]:
    """Where the permutation of 0 .. size - 1 with that key sends each index.

    Sizes (below 2**63) and keys may differ by index. Time and memory grow with the indices, not the sizes.
    """
    value = np.array(index, dtype=np.uint64)
    size = np.broadcast_to(np.asarray(size, dtype=np.uint64), value.shape)
    key = np.broadcast_to(np.asarray(key, dtype=np.uint64), value.shape)
    if (value >= size).any():
        raise IndexError(f"index {value[value >= size][0]} in a permutation of {size[value >= size][0]}")
    bits = np.array([int(s - 1).bit_length() for s in size.tolist()], dtype=np.uint64)
    walking = np.arange(len(value))
    while len(walking):
        value[walking] = _feistel(value[walking], bits[walking], key[walking])
        walking = walking[value[walking] >= size[walking]]
    return value.astype(np.int64)


def _feistel(
    value: UInt64[np.ndarray, "n"], bits: UInt64[np.ndarray, "n"], key: UInt64[np.ndarray, "n"]
) -> UInt64[np.ndarray, "n"]:
    """A permutation of the numbers of that many bits: the halves are changed in turn, each by the other."""
    one = np.uint64(1)
    low_bits = bits >> one
    low_mask, high_mask = (one << low_bits) - one, (one << (bits - low_bits)) - one
    low, high = value & low_mask, value >> low_bits
    for r in range(0, _ROUNDS, 2):
        high ^= _mixed(low, key, r) & high_mask
        low ^= _mixed(high, key, r + 1) & low_mask
    return high << low_bits | low


def _mixed(half: np.ndarray, key: np.ndarray, r: int) -> np.ndarray:
    mixed = (half ^ (key + np.uint64(_INCREMENT * (r + 1) % 2**64))) * _MULTIPLIER
    mixed ^= mixed >> np.uint64(32)
    mixed *= _MULTIPLIER
    return mixed >> np.uint64(32)
