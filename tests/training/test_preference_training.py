"""Preference objectives in the training program: a reference as the step's frozen argument, on one device and eight."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.sharding import MeshConfig, make_mesh
from jaxlm.data.chat import Plain
from jaxlm.data.chat_batches import LabeledBatches, PairBatches
from jaxlm.data.chat_examples import labeled_examples, preference_examples
from jaxlm.data.chat_records import LabeledRecord, PreferenceRecord
from jaxlm.data.tokenizers import ByteTokenizer
from jaxlm.models import Decoder
from jaxlm.objectives import DPO, KTO
from jaxlm.optim import OptimizerConfig
from jaxlm.testing import tiny_config
from jaxlm.training import Program, fit

SETTINGS = {"batch_size": 8, "length": 12, "seed": 0}


def said(role, text):
    return ({"role": role, "content": text},)


def pairs():
    made = [
        PreferenceRecord(said("user", f"{n}"), said("assistant", "a" * (n % 3 + 1)), said("assistant", "b"), "x")
        for n in range(9)
    ]
    return PairBatches(preference_examples(made, ByteTokenizer(), Plain(), length=12)[0], **SETTINGS)


def labeled():
    made = [LabeledRecord(said("user", f"{n}"), said("assistant", "ab"[n % 2]), n % 2 == 0, "x") for n in range(9)]
    return LabeledBatches(labeled_examples(made, ByteTokenizer(), Plain(), length=12)[0], **SETTINGS)


def train(objective, batches, mesh, devices, micro_batches=1):
    model = Decoder(tiny_config("llama", num_layers=1, vocab_size=259))
    tx = OptimizerConfig(learning_rate=0.003).make(8, model.axes())
    program = Program(model, objective(model), tx, make_mesh(mesh, devices), micro_batches)
    state = program.init(seed=1)
    # The reference is a copy: the step donates the state's own buffers.
    frozen = jax.tree.map(jnp.copy, state.trainable)
    losses = []

    class Note:
        every = 0

        def on_metrics(self, step, metrics):
            losses.append(metrics["loss"])

        def at_step(self, step, state):
            pass

    fit(program.step, state, frozen, batches, num_steps=8, put=program.put, callbacks=[Note()])
    return np.array(losses)


def test_dpo_starts_at_the_reference_and_improves():
    losses = train(DPO, pairs(), MeshConfig(), jax.devices()[:1])
    np.testing.assert_allclose(losses[0], np.log(2), rtol=1e-4)
    assert losses[-1] < losses[0] - 0.01


def test_kto_is_the_same_on_a_mesh_in_micro_batches():
    alone = train(KTO, labeled(), MeshConfig(), jax.devices()[:1])
    np.testing.assert_allclose(alone[0], 0.5, rtol=1e-4)
    assert alone[-1] < alone[0] - 0.01
    together = train(KTO, labeled(), MeshConfig(data=2, fsdp=2), jax.devices()[:4], micro_batches=2)
    np.testing.assert_allclose(together, alone, rtol=2e-4)
