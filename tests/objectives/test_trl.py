"""The losses beside TRL's own code (optional: `pip install trl datasets accelerate`), on random log-probabilities.

TRL's methods run with stand-ins for the trainer and the model. The numbers that they gave are in `EXPECTED`, so that
the comparison holds where TRL is not installed.
"""

import collections
import types

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.objectives.policy_gradient import GRPO
from jaxlm.objectives.preference import dpo_losses, kto_losses

RNG = np.random.default_rng(0)
ROWS, LENGTH = 6, 9
LOG_PROBS, REFERENCE, OLD = (-RNG.exponential(1.0, (ROWS, LENGTH)).astype(np.float32) for _ in range(3))
MASK = (np.arange(LENGTH) < RNG.integers(2, LENGTH + 1, ROWS)[:, None]).astype(np.float32)
LABELS = np.array([1.0, 0, 0, 1, 1, 0], np.float32)
ADVANTAGES = RNG.normal(size=ROWS).astype(np.float32)
DPO_CASES = {
    "sigmoid": 0.0,
    "hinge": 0.0,
    "ipo": 0.0,
    "robust": 0.1,
    "sigmoid_norm": 0.0,
}
GRPO_CASES = {
    "grpo": {"aggregation": "grpo", "kl_weight": 0.04},
    "dapo": {"aggregation": "dapo", "clip_high": 0.28},
    "dr_grpo": {"aggregation": "dr_grpo", "max_length": 20},
    "gspo": {"aggregation": "grpo", "ratio_level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    "two_sided": {"aggregation": "dapo", "ratio_limit": 1.7},
    "cispo": {"aggregation": "dapo", "cispo": True, "clip_high": 1.5},
}
# From TRL 1.16.0.
EXPECTED = {
    "dpo/sigmoid": 2.091197,
    "dpo/hinge": 2.424579,
    "dpo/ipo": 10.211766,
    "dpo/robust": 2.265906,
    "dpo/sigmoid_norm": 0.879609,
    "kto": 0.448864,
    "grpo/grpo": 0.115331,
    "grpo/dapo": -0.497264,
    "grpo/dr_grpo": -0.144697,
    "grpo/gspo": -0.470210,
    "grpo/two_sided": -0.497036,
    "grpo/cispo": 0.358601,
}


def ours_dpo(kind):
    ratios = (MASK * (LOG_PROBS - REFERENCE)).sum(1)
    if kind in ("ipo", "sigmoid_norm"):
        ratios = ratios / MASK.sum(1)
    half = ROWS // 2
    return dpo_losses(jnp.asarray(ratios[:half] - ratios[half:]), kind, 0.3, DPO_CASES[kind]).mean()


def ours_grpo(name):
    totals = {"rows": jnp.float32(ROWS), "tokens": jnp.asarray(MASK.sum())}
    loss, _ = GRPO(None, **GRPO_CASES[name]).from_log_probs(
        jnp.asarray(LOG_PROBS),
        jnp.asarray(MASK),
        jnp.asarray(ADVANTAGES),
        totals,
        old_log_probs=jnp.asarray(OLD),
        reference_log_probs=jnp.asarray(REFERENCE),
    )
    return loss


def ours_kto():
    ratios = (MASK * (LOG_PROBS - REFERENCE)).sum(1)
    # In both, the rows themselves stand in for the mismatched ones.
    return kto_losses(jnp.asarray(ratios), jnp.asarray(LABELS), max(0.0, ratios.mean()), 0.3, 1.0, 1.5).mean()


@pytest.mark.parametrize("kind", DPO_CASES)
def test_dpo_numbers(kind):
    np.testing.assert_allclose(ours_dpo(kind), EXPECTED[f"dpo/{kind}"], rtol=1e-5)


@pytest.mark.parametrize("name", GRPO_CASES)
def test_grpo_numbers(name):
    np.testing.assert_allclose(ours_grpo(name), EXPECTED[f"grpo/{name}"], rtol=1e-4)


def test_kto_number():
    np.testing.assert_allclose(ours_kto(), EXPECTED["kto"], rtol=1e-5)


class TestInstalledTRL:
    """TRL's own methods."""

    @pytest.fixture(autouse=True)
    def _needs_trl(self):
        for name in ("torch", "accelerate", "datasets", "trl"):
            pytest.importorskip(name)

    @pytest.mark.parametrize("kind", DPO_CASES)
    def test_dpo(self, kind):
        from trl.trainer.dpo_trainer import DPOTrainer

        trainer = stand_in(
            loss_types=[kind], loss_weights=[1.0], beta=0.3, label_smoothing=DPO_CASES[kind], ld_alpha=None,
            f_divergence_type="reverse_kl", use_weighting=False, precompute_ref_logps=False,
        )  # fmt: skip
        loss = DPOTrainer._compute_loss(trainer, model(LOG_PROBS), inputs(), False)
        np.testing.assert_allclose(EXPECTED[f"dpo/{kind}"], float(loss), rtol=1e-5)

    def test_kto(self):
        import torch
        from trl.trainer.kto_trainer import KTOTrainer

        trainer = stand_in(
            loss_type="kto", beta=0.3, desirable_weight=1.0, undesirable_weight=1.5, calculate_KL=True,
            precompute_ref_logps=False,
        )  # fmt: skip
        trainer._compute_kl_logps = types.MethodType(KTOTrainer._compute_kl_logps, trainer)
        kl = {f"KL_{name}": x for name, x in inputs().items()}
        batch = {**inputs(), **kl, "label": torch.tensor(LABELS) > 0}
        loss = KTOTrainer._compute_loss(trainer, model(LOG_PROBS), batch, False)
        np.testing.assert_allclose(EXPECTED["kto"], float(loss), rtol=1e-5)

    @pytest.mark.parametrize("name", GRPO_CASES)
    def test_grpo(self, name):
        import torch
        from trl.trainer.grpo_trainer import GRPOTrainer

        case = GRPO_CASES[name]
        low = case.get("clip_low", 0.2)
        trainer = stand_in(
            loss_type="cispo" if case.get("cispo") else case["aggregation"],
            importance_sampling_level=case.get("ratio_level", "token"),
            beta=case.get("kl_weight", 0.0), epsilon_low=low, epsilon_high=case.get("clip_high", low),
            max_completion_length=case.get("max_length"), top_entropy_quantile=1.0, off_policy_mask_threshold=None,
            use_vllm=False,
        )  # fmt: skip
        trainer.args.delta, trainer.args.use_bias_correction_kl = case.get("ratio_limit"), False
        trainer._get_per_token_logps_and_entropies = lambda *a, **k: (
            torch.tensor(LOG_PROBS), torch.zeros(ROWS, LENGTH), None
        )  # fmt: skip
        batch = {
            "prompt_ids": torch.zeros(ROWS, 1, dtype=torch.long), "prompt_mask": torch.ones(ROWS, 1),
            "completion_ids": torch.zeros(ROWS, LENGTH, dtype=torch.long), "completion_mask": torch.tensor(MASK),
            "advantages": torch.tensor(ADVANTAGES), "old_per_token_logps": torch.tensor(OLD),
            "ref_per_token_logps": torch.tensor(REFERENCE), "num_items_in_batch": torch.tensor(MASK.sum()),
        }  # fmt: skip
        loss = GRPOTrainer._compute_loss(trainer, model(LOG_PROBS), batch)
        np.testing.assert_allclose(EXPECTED[f"grpo/{name}"], float(loss), rtol=1e-4)


def inputs():
    import torch

    ids = torch.ones(ROWS, LENGTH + 1, dtype=torch.long)
    mask = torch.cat([torch.zeros(ROWS, 1), torch.tensor(MASK)], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}


def model(log_probs):
    """A model whose fused head gives these log-probabilities, zero where there is no label."""
    import torch

    found = torch.tensor(log_probs * MASK)
    zeros = torch.zeros(ROWS, LENGTH)
    out = types.SimpleNamespace(log_probs=found, entropy=zeros, mean_logits=zeros, is_top1=zeros > 0)

    class Model:
        training = False

        def __call__(self, **_):
            return out

    return Model()


def stand_in(**settings):
    """What the methods read of a trainer; several processes' results gathered are those of the one."""
    import torch

    same = types.SimpleNamespace(
        device=torch.device("cpu"), num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x,
        reduce=lambda x, **_: x,
    )
    metrics = collections.defaultdict(lambda: collections.defaultdict(list))
    trainer = types.SimpleNamespace(
        model=model(LOG_PROBS), ref_model=model(REFERENCE), accelerator=same, aux_loss_enabled=False, _metrics=metrics,
        _total_train_tokens=0, _entropy_bonus_enabled=False,
        args=types.SimpleNamespace(gradient_checkpointing_kwargs=None), **settings,
    )  # fmt: skip
    trainer.model.is_gradient_checkpointing = trainer.ref_model.is_gradient_checkpointing = False
    return trainer
