"""Comparisons of arms: tuned alike, judged on other text with other seeds, resumed."""

import dataclasses

import numpy as np
import pytest

from experiments import bases
from experiments.bases import Arm, StudyConfig
from jaxlm.core.errors import ConfigError, DataError
from jaxlm.data.prepare import DataConfig
from jaxlm.models.config import DecoderConfig
from jaxlm.optim.config import OptimizerConfig


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A tiny study on a folder of text, and its rows."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for i in range(40):
        (folder / f"{i}.txt").write_text("".join(rng.choice(list("abcdef "), 200)))
    config = StudyConfig(
        model=DecoderConfig(vocab_size=320, num_layers=1, embed_dim=16, num_heads=2, mlp_dim=16, max_length=16),
        data=DataConfig(path=(str(folder / "*.txt"),), tokenizer="byte", sequence_length=16, validation_fraction=0.4),
        steps=4,
        batch_size=4,
        judge_rows=6,
    )
    return config, bases.load_text(config)


def test_texts_are_apart(study):
    config, text = study
    rows = [{bytes(row) for row in np.asarray(part.arrays["inputs"])} for part in (text.train, text.tuning, text.judge)]
    assert not rows[0] & (rows[1] | rows[2])
    assert not rows[1] & rows[2]
    assert len(rows[1]) + len(rows[2]) == 12


def test_an_arm_is_judged_at_its_best_rate_with_other_seeds(study, tmp_path, capsys):
    config, text = study
    adam = Arm(OptimizerConfig("adamw", weight_decay=0.0), (1e-4, 1e-3, 1e-2))
    found = bases.compare_arms(config, {"adam": adam}, text, tmp_path)["adam"]
    # Four steps from scratch: the greatest rate is the best, so greater ones are tried, up to three.
    assert found.rate == min(found.tuned, key=found.tuned.get)
    assert len(found.tuned) > 3
    assert len(found.losses) == len(config.seeds)
    assert len(found.history) == config.steps
    assert found.loss == pytest.approx(np.mean(found.losses))
    first = capsys.readouterr().out.count("\n")
    assert first == len(found.tuned) + 2
    again = bases.compare_arms(config, {"adam": adam}, text, tmp_path)["adam"]
    assert capsys.readouterr().out == ""
    assert (again.tuned, again.losses) == (found.tuned, found.losses)


def test_what_is_kept_is_of_one_configuration(study, tmp_path):
    config, _ = study
    keep = bases.Keeper(tmp_path, config)
    assert [keep("a b", lambda: [1.0]), keep("a b", lambda: [2.0])] == [[1.0], [1.0]]
    with pytest.raises(DataError, match="a_b.json is of a run with other settings"):
        bases.Keeper(tmp_path, dataclasses.replace(config, steps=80))("a b", lambda: [1.0])


def test_rates_are_extended_at_the_edges_only():
    assert bases._beyond(4.0, [1.0, 2.0, 4.0]) == [8.0]
    assert bases._beyond(1.0, [1.0, 2.0, 4.0]) == [0.5]
    assert bases._beyond(2.0, [1.0, 2.0, 4.0]) == []
    assert bases._beyond(1.0, [1.0]) == []


def test_what_cannot_be_judged_is_refused(study, tmp_path):
    config, text = study
    with pytest.raises(ConfigError, match="seeds are \\(0, 1\\), expected different ones"):
        dataclasses.replace(config, seeds=(0, 1))
    wild = Arm(OptimizerConfig("adamw", clip_norm=None), (1e30,))
    with pytest.raises(ConfigError, match="arm 'wild' diverges at each"):
        bases.compare_arms(config, {"wild": wild}, text, tmp_path)
    small = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=100))
    with pytest.raises(ConfigError, match="the tokenizer has 259 ids"):
        bases.load_text(small)
