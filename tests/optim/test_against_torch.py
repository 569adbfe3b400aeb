"""GaLore, Fira, APOLLO, SPAM, Stable-SPAM and 8-bit blocks against their authors' or others' PyTorch code.

What that code computes is kept in `golden_torch.json`, so the comparison needs no PyTorch. Where `torch` and the
packages `galore-torch`, `fira`, `apollo-torch`, `pytorch-optimizer` and `bitsandbytes` are installed, the kept numbers
are computed anew and compared; `python tests/optim/test_against_torch.py` writes them.
"""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.optim import (
    Projection,
    dequantize_blocks,
    dynamic_code_book,
    quantize_blocks,
    scale_by_apollo,
    scale_by_fira,
    scale_by_galore,
    scale_by_spam,
    scale_by_stable_spam,
)
from jaxlm.optim.wiring import adam

GOLDEN = Path(__file__).with_name("golden_torch.json")
SHAPES = {"up": (5, 8), "down": (8, 5), "square": (6, 6)}  # (in, out), ours
RATE, RANK, PERIOD, TINY = 0.01, 3, 4, 1e-20
KEPT = (0, 4, 5, 9, 19)
"""Steps after which parameters are compared: the first, around a spike and a reset, the last."""


def gradient(name, step):
    """A full-rank matrix, the same everywhere; the fifth has a spike."""
    rows, columns = SHAPES[name]
    k = np.arange(rows * columns, dtype=np.float64).reshape(rows, columns)
    g = np.sin(0.37 * k**2 + (1.0 + 0.3 * step) * k + len(name)) * (1.0 + 0.1 * step)
    if step == 4:
        g[1, 2] = 300.0
    return g.astype(np.float32)


def trajectory(tx, steps, first=0):
    """Parameters after the first, ..., the `steps`-th update from zero, where they are kept."""
    params = {name: jnp.zeros(shape, jnp.float32) for name, shape in SHAPES.items()}
    state, out = tx.init(params), {name: [] for name in SHAPES}
    for step in range(steps):
        gradients = {name: jnp.asarray(gradient(name, step)) for name in SHAPES}
        updates, state = tx.update(gradients, state, params, step=jnp.int32(first + step))
        params = {name: params[name] - RATE * updates[name] for name in SHAPES}
        if step in KEPT:
            for name in SHAPES:
                out[name].append(np.asarray(params[name]))
    return out


class Given(Projection):
    """Random matrices that are given, by (shape of the gradient, number of the period)."""

    def draw(self, gradients, step):
        given = golden()["apollo_draws"][str(self.rank)]

        def one(path, g, sides):
            p = jnp.asarray(given[path][int(step) // self.period], jnp.float32)
            return (p, None) if sides == (-2,) else (None, p)

        return self._map(gradients, one)


OURS = {
    "galore": lambda: trajectory(scale_by_galore(Projection(RANK, PERIOD), adam(0.9, 0.999, TINY), 0.25), 10),
    "fira": lambda: trajectory(
        scale_by_fira(Projection(RANK, PERIOD), 0.25, eps=TINY, released_residual=True), 10
    ),
    "apollo": lambda: trajectory(scale_by_apollo(Given(2, PERIOD), 4.0, eps=TINY), 10),
    "apollo_mini": lambda: trajectory(
        scale_by_apollo(Given(1, PERIOD), 16.0, scaling="tensor", scale_front=True, eps=TINY), 10
    ),
    # Their count starts at 1, so that a reset comes one update earlier than ours.
    "spam": lambda: trajectory(scale_by_spam(period=6, warmup=4, threshold=50.0, quiet=2, eps=TINY), 20, first=1),
    "stable_spam": lambda: trajectory(
        scale_by_stable_spam(lambda p: dict.fromkeys(p, 2), period=6, theta=0.9, eps=TINY), 20, first=1
    ),
}


def golden():
    return json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("method", OURS)
def test_trajectories_are_those_of_the_torch_code(method):
    ours, theirs = OURS[method](), golden()["trajectories"][method]
    for name in SHAPES:
        for step, a, b in zip(KEPT, ours[name], theirs[name]):
            np.testing.assert_allclose(a, np.asarray(b), rtol=1e-3, atol=2e-5, err_msg=f"{name} step {step}")


@pytest.mark.parametrize("signed", [True, False])
def test_code_book_and_blocks_are_those_of_bitsandbytes(signed):
    kept = golden()["blocks"][str(signed)]
    np.testing.assert_allclose(dynamic_code_book(signed), kept["code_book"], rtol=1e-6)
    x = block_values(signed)
    blocks = quantize_blocks(jnp.asarray(x), 64, signed=signed)
    np.testing.assert_allclose(np.ravel(blocks.scales), kept["absmax"], rtol=1e-6)
    normalized = x.reshape(-1, 64) / np.asarray(kept["absmax"])[:, None]
    nearest = np.abs(normalized[..., None] - np.asarray(kept["code_book"])).argmin(-1)
    np.testing.assert_array_equal(np.ravel(blocks.codes), np.ravel(nearest))
    back = np.asarray(kept["code_book"])[nearest] * np.asarray(kept["absmax"])[:, None]
    np.testing.assert_allclose(dequantize_blocks(blocks, 64, signed=signed), back.reshape(x.shape), rtol=1e-5)


def block_values(signed):
    k = np.arange(4 * 128, dtype=np.float64).reshape(4, 128)
    x = np.sin(3.7 * k + 1.0) ** 5 * np.exp(np.cos(k))
    return (x if signed else x**2).astype(np.float32)


# What follows runs other people's code, where it is installed.


def test_kept_numbers_are_what_the_torch_code_gives():
    for package in ("torch", "galore_torch", "fira", "apollo_torch", "pytorch_optimizer", "bitsandbytes"):
        pytest.importorskip(package)
    now, kept = compute_golden(), golden()
    flat = lambda tree: np.concatenate([np.ravel(x) for x in leaves(tree)])  # noqa: E731
    np.testing.assert_allclose(flat(now), flat(kept), rtol=1e-4, atol=1e-6)


def leaves(tree):
    if isinstance(tree, dict):
        return [leaf for key in sorted(tree) for leaf in leaves(tree[key])]
    if isinstance(tree, list):
        return [leaf for item in tree for leaf in leaves(item)]
    return [tree]


def compute_golden():
    import torch
    from apollo_torch import APOLLOAdamW
    from apollo_torch.random_projector import next_seed, stable_randn
    from bitsandbytes.functional import create_dynamic_map, quantize_blockwise
    from fira import FiraAdamW
    from fira.gradient_projection import GradientProjector
    from galore_torch import GaLoreAdamW
    from galore_torch.galore_projector import GaLoreProjector
    from pytorch_optimizer import SPAM, StableSPAM

    def with_signs_like_ours(get):
        """A decomposition leaves the signs of its vectors open, and moments outlive a basis, so they matter."""

        def signed(self, weights, rank, type):
            vectors = get(self, weights, rank, type)
            axis = 1 if type == "right" else 0
            largest = vectors.abs().argmax(axis, keepdim=True)
            return vectors * vectors.gather(axis, largest).sign()

        return signed

    for projector in (GaLoreProjector, GradientProjector):
        if projector.get_orthogonal_matrix.__name__ != "signed":
            projector.get_orthogonal_matrix = with_signs_like_ours(projector.get_orthogonal_matrix)

    def run(make, steps):
        weights = {name: torch.nn.Parameter(torch.zeros(*shape[::-1])) for name, shape in SHAPES.items()}
        tx, out = make(list(weights.values())), {name: [] for name in SHAPES}
        for step in range(steps):
            for name, w in weights.items():
                w.grad = torch.tensor(gradient(name, step).T.copy())
            tx.step()
            if step in KEPT:
                for name, w in weights.items():
                    out[name].append(w.detach().numpy().T.copy().tolist())
        return out

    def group(ws, **settings):
        return [{"params": ws, "rank": RANK, "update_proj_gap": PERIOD, "proj_type": "std", **settings}]

    def apollo(rank, scale, kind, front):
        def make(ws):
            settings = {"rank": rank, "scale": scale, "scale_type": kind, "proj": "random"}
            return APOLLOAdamW(group(ws, **settings), lr=RATE, eps=TINY, scale_front=front)

        return make

    def draws(rank, periods):
        """The released code's random matrices: a seed for each parameter, advanced at every refresh."""
        out = {}
        for seed, (name, shape) in enumerate(SHAPES.items(), 1):
            rows, columns = shape[::-1]
            out[name] = []
            for _ in range(periods):
                p = stable_randn((rank, columns) if rows >= columns else (rows, rank), seed=seed) / rank**0.5
                out[name].append((p.T if rows >= columns else p).tolist())
                seed = next_seed(seed)
        return out

    def blocks(signed):
        x = torch.tensor(block_values(signed)).flatten()
        book = create_dynamic_map(signed)
        _, state = quantize_blockwise(x, code=book, blocksize=64)  # its codes on CPUs are not always the nearest
        return {"code_book": book.tolist(), "absmax": state.absmax.tolist()}

    return {
        "trajectories": {
            "galore": run(lambda ws: GaLoreAdamW(group(ws, scale=0.25), lr=RATE, eps=TINY), 10),
            "fira": run(lambda ws: FiraAdamW(group(ws, alpha=0.25), lr=RATE, eps=TINY), 10),
            "apollo": run(apollo(2, 4.0, "channel", False), 10),
            "apollo_mini": run(apollo(1, 16.0, "tensor", True), 10),
            "spam": run(
                lambda ws: SPAM(
                    ws, lr=RATE, eps=TINY, update_proj_gap=6, warmup_epoch=4, threshold=50, grad_accu_steps=2
                ),
                20,
            ),
            "stable_spam": run(lambda ws: StableSPAM(ws, lr=RATE, eps=TINY, update_proj_gap=6, theta=0.9), 20),
        },
        "apollo_draws": {str(rank): draws(rank, 3) for rank in (1, 2)},
        "blocks": {str(signed): blocks(signed) for signed in (True, False)},
    }


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    text = json.dumps(json.loads(json.dumps(compute_golden()), parse_float=lambda x: float(f"{float(x):.7g}")))
    GOLDEN.write_text(text + "\n")
