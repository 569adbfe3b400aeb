"""GGUF's block formats as `Quantized` weights, without loss.

A row of a tensor is a sequence of blocks of 32 (superblocks of 256) weights, each with its scales in front or behind.
Here codes and scales become arrays of their own. K-quants keep two levels of scales: their 6-bit scales take a byte
each, so Q4_K is 148 bytes a superblock and not 144, Q5_K 180 and not 176; all other formats keep their size. One
float32 scale a block would be as exact and take 48 bytes more.

Layouts: ggml's `ggml-common.h` and `ggml-quants.c`; every format is tested bit for bit against the `gguf` package.
"""

from collections.abc import Callable

import numpy as np

from jaxlm.interop.gguf.reader import Tensor
from jaxlm.weights import Quantized, pack

FLOATS = ("F32", "F16", "BF16")


def floats(tensor: Tensor) -> np.ndarray:
    """An F32, F16 or BF16 tensor in float32 (of F32, a view of the file)."""
    if tensor.type == "BF16":
        return (tensor.raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(tensor.shape)
    return (
        tensor.raw.view({"F32": "<f4", "F16": "<f2"}[tensor.type]).astype(np.float32, copy=False).reshape(tensor.shape)
    )


def quantized(tensor: Tensor, dtype: np.dtype, *, kernel: bool, rows: np.ndarray | None = None) -> Quantized:
    """A quantized matrix `[out, in]` as a `Quantized` of numpy arrays.

    A `kernel` is transposed to `(in, out)`, an embedding is not: both keep their blocks along what is contiguous in
    the file. `rows` picks and orders the file's rows.
    """
    raw = tensor.raw if rows is None else tensor.raw[rows]
    size, decode = _FORMATS[tensor.type]
    arrays, bits, offset = decode(raw.reshape(raw.shape[0], -1, size))

    def place(x: np.ndarray) -> np.ndarray:
        x = x.reshape(raw.shape[0], -1)
        return np.ascontiguousarray(x.T if kernel else x)

    arrays = {name: place(x) for name, x in arrays.items()}
    return Quantized(**arrays, bits=bits, offset=offset, axis=-2 if kernel else -1, dtype=dtype)


# Each decoder takes blocks `[rows, blocks, bytes]` and returns arrays `[rows, ...]`, the bits and the offset.
_Decoded = tuple[dict[str, np.ndarray], int, int]


def _half(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view("<f2")


def _q8_0(x: np.ndarray) -> _Decoded:
    return {"scale": _half(x[..., :2]), "codes": x[..., 2:].view(np.int8)}, 8, 0


def _q4_0(x: np.ndarray) -> _Decoded:
    return {"scale": _half(x[..., :2]), "codes": x[..., 2:]}, 4, 8


def _q4_1(x: np.ndarray) -> _Decoded:
    return {"scale": _half(x[..., :2]), "minimum": _half(x[..., 2:4]), "codes": x[..., 4:]}, 4, 0


def _q5_0(x: np.ndarray) -> _Decoded:
    return {"scale": _half(x[..., :2]), "high": _fifth_bits(x[..., 2:6]), "codes": x[..., 6:]}, 5, 16


def _q5_1(x: np.ndarray) -> _Decoded:
    scale, minimum = _half(x[..., :2]), _half(x[..., 2:4])
    return {"scale": scale, "minimum": minimum, "high": _fifth_bits(x[..., 4:8]), "codes": x[..., 8:]}, 5, 0


def _fifth_bits(x: np.ndarray) -> np.ndarray:
    """From bit `i` for weight `i` of the block to bit `i // 4` of byte `i % 4`."""
    bits = np.unpackbits(x, axis=-1, bitorder="little").reshape(*x.shape[:-1], 8, 4)
    return np.packbits(bits, axis=-2, bitorder="little")


def _q4_k(x: np.ndarray) -> _Decoded:
    return {**_k_scales(x), "codes": _k_nibbles(x[..., 16:], 32, 32)}, 4, 0


def _q5_k(x: np.ndarray) -> _Decoded:
    # Byte `i` of 32 has the fifth bit of weight `i` of all eight blocks, a bit a block.
    bits = np.unpackbits(x[..., 16:48], axis=-1, bitorder="little").reshape(*x.shape[:-1], 32, 8)
    _, high = pack(np.moveaxis(bits, -1, -2).reshape(x.shape[0], -1) << np.uint8(4), 5, 32, -1)
    return {**_k_scales(x), "high": high, "codes": _k_nibbles(x[..., 48:], 32, 32)}, 5, 0


def _q6_k(x: np.ndarray) -> _Decoded:
    # Each half of the superblock has 32 bytes, byte `i` of which has two bits of weights i, i + 32, i + 64, i + 96.
    two = x[..., 128:192].reshape(*x.shape[:-1], 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None]
    _, high = pack((two & np.uint8(3)).reshape(x.shape[0], -1) << np.uint8(4), 6, 16, -1)
    scales = {"scale": x[..., 192:208].view(np.int8), "super_scale": _half(x[..., 208:])}
    return {**scales, "high": high, "codes": _k_nibbles(x[..., :128], 64, 16)}, 6, 32


def _k_nibbles(x: np.ndarray, run: int, block: int) -> np.ndarray:
    """From runs whose byte `i` has weights `i` and `i + run` to blocks whose byte `i` has `i` and `i + block/2`."""
    runs = x.reshape(*x.shape[:-1], -1, 1, run) >> np.array([0, 4], np.uint8)[:, None]
    codes, _ = pack((runs & np.uint8(15)).reshape(x.shape[0], -1), 4, block, -1)
    return codes


def _k_scales(x: np.ndarray) -> dict[str, np.ndarray]:
    """Scales and minimums of eight blocks, of 6 bits each in 12 bytes, and the two float16 before them."""
    a, b, c = np.split(x[..., 4:16], 3, axis=-1)
    scale = np.concatenate([a & 63, (c & 15) | ((a >> 6) << 4)], axis=-1)
    minimum = np.concatenate([b & 63, (c >> 4) | ((b >> 6) << 4)], axis=-1)
    factors = {"super_scale": _half(x[..., :2]), "super_minimum": -_half(x[..., 2:4])}
    return {"scale": scale, "minimum": minimum, **factors}


_FORMATS: dict[str, tuple[int, Callable[[np.ndarray], _Decoded]]] = {
    "Q8_0": (34, _q8_0),
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
    "Q5_0": (22, _q5_0),
    "Q5_1": (24, _q5_1),
    "Q4_K": (144, _q4_k),
    "Q5_K": (176, _q5_k),
    "Q6_K": (210, _q6_k),
}
TYPES = (*FLOATS, *_FORMATS)
"""The types of tensors that can be read."""
