"""The benchmarks run, at a size that measures nothing."""

import json

import pytest

from experiments.benchmarks import __main__ as everything
from experiments.benchmarks import (
    attention,
    cross_entropy,
    data_loading,
    decode,
    harness,
    population,
    quantized_matmul,
    train_step,
)
from experiments.benchmarks.llama import Size
from jaxlm.core.errors import ConfigError

TINY = Size(vocab_size=64, layers=2, embed_dim=16, heads=2, mlp_dim=32)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr(harness, "has_torch", lambda: False)


@pytest.mark.slow
def test_train_step_measures_our_side_alone(tmp_path, capsys):
    out = tmp_path / "figures.json"
    config = train_step.Config(TINY, batch=2, length=16, precisions=("float32",), rounds=2, steps=1, out=out)
    (row,) = train_step.run(config)
    assert row["side"] == "jaxlm"
    assert row["tokens_per_second"] == pytest.approx(2 * 16 / row["seconds"])
    assert "pip install" in capsys.readouterr().out
    assert json.loads(out.read_text())["machine"]["cores"] >= 1


@pytest.mark.slow
def test_decode_measures_our_side_alone():
    (row,) = decode.run(decode.Config(TINY, batches=(2,), prompt=8, new_tokens=8, rounds=1))
    assert row["agreement"] == 1.0
    assert row["tokens_per_second"] == pytest.approx(16 / row["seconds"])


@pytest.mark.slow
def test_quantized_products_are_measured(tmp_path, monkeypatch):
    monkeypatch.setitem(quantized_matmul.PRESETS, "cpu", ((1, 3), ((128, 64),)))
    out = tmp_path / "figures.json"
    config = quantized_matmul.Config(rounds=1, package="there_is_no_such_package", out=out)
    rows = quantized_matmul.run(config)["products"]
    assert len(rows) == 2 * (1 + len(quantized_matmul.FORMATS))
    # Half a byte a weight, and a float16 scale and minimum for each 32.
    by_format = {row["format"]: row["bytes"] for row in rows}
    assert by_format["int4, blocks of 32, minimum"] == 128 * 64 * 5 // 8
    assert json.loads(out.read_text())["platform"] == "cpu"


def test_cross_entropy_is_measured():
    config = cross_entropy.Config(tokens=16, embed=8, vocab=(64,), rounds=1)
    assert [row["implementation"] for row in cross_entropy.run(config)] == ["reference", "auto"]


@pytest.mark.slow
def test_attention_measures_every_implementation_of_this_platform(tmp_path):
    out = tmp_path / "figures.json"
    rows = attention.run(attention.Config(models=("cpu",), lengths=(256,), decode_batch=2, rounds=1, out=out))
    names = {row["implementation"] for row in rows if row["work"] == "forward and backward"}
    assert {"blocked", "reference", "jax.nn xla"} <= names
    for row in rows:
        if row["work"] == "forward" and "error" not in row:
            assert row["tflops"] * 1e12 * row["seconds"] == pytest.approx(4 * 64 * 4 * 256 * 257 / 2)
    assert json.loads(out.read_text())["device"]["matmul_tflops"] > 0


@pytest.mark.slow
def test_data_loading_is_measured_for_each_number_of_processes():
    config = data_loading.Config(processes=(1, 2), batch=4, length=16, tokens=20_000, steps=1, rounds=1)
    alone, both = data_loading.run(config)
    assert alone["tokens_read_by_each"] == [64]
    assert both["tokens_read_by_each"] == [32, 32]
    assert alone["scaling"] == 1.0
    assert both["scaling"] == pytest.approx(both["rows_per_second"] / alone["rows_per_second"])
    with pytest.raises(ConfigError, match="processes has 3, expected divisors of batch 4"):
        data_loading.Config(processes=(3,), batch=4)


def test_all_of_them_go_into_one_file(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(everything.BENCHMARKS, "cross_entropy", ("--tokens", "16", "--embed", "8", "--vocab", "64"))
    monkeypatch.setitem(everything.BENCHMARKS, "decode", ("--no_such_option",))
    out = tmp_path / "figures.json"
    everything.run(everything.Config(only=("cross_entropy", "decode"), out=out))
    found = json.loads(out.read_text())
    assert found["platform"] == "cpu"
    assert found["benchmarks"]["cross_entropy"]["rows"][0]["implementation"] == "reference"
    assert found["benchmarks"]["decode"]["error"] == "exit code 2"
    with pytest.raises(ConfigError, match="no benchmark 'atention': did you mean 'attention'"):
        everything.Config(only=("atention",))


@pytest.mark.slow
def test_a_population_is_measured_beside_single_runs(capsys):
    found = population.measure(population.Config(members=2, steps=1, rounds=1))
    assert set(found) == {"single runs", "lax.map", "vmap"}
    assert "map: 24 of 24 trained arrays are those of single runs to the bit" in capsys.readouterr().out
