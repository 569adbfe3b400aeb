"""Which mesh, rematerialization and micro-batches to try on a machine, best first, from arithmetic alone.

The arithmetic is coarse: it orders what is worth compiling; the compiler then says what fits.
"""

import dataclasses
from collections.abc import Sequence

from jaxlm.core.sharding import MeshConfig
from jaxlm.models.config import DecoderConfig
from jaxlm.models.flops import executed_flops_per_token
from jaxlm.planning.topology import Chip

POLICIES = ("dots", "projections", "full")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way to run a training step, with the bytes a chip and the seconds that it is expected to take."""

    mesh: MeshConfig
    remat: str
    micro_batches: int
    memory: float
    seconds: float

    def __str__(self) -> str:
        axes = {"data": self.mesh.data, "fsdp": self.mesh.fsdp, "tensor": self.mesh.tensor}
        mesh = ",".join(f"{name}={size}" for name, size in axes.items() if size > 1 or name == "data")
        return f"--mesh {mesh} --remat {self.remat} --micro_batches {self.micro_batches}"


def candidates(
    model: DecoderConfig, parameters: int, chip: Chip, chips: int, *, batch_size: int, length: int
) -> list[Candidate]:
    """All that divide evenly: those expected to fit first, the fastest of them at the top."""
    found = []
    for tensor in _divisors(chips):
        if tensor > 8 or any(size % tensor for size in (model.num_heads, model.mlp_dim, model.vocab_size)):
            continue
        for fsdp in _divisors(chips // tensor):
            rows = batch_size // (chips // tensor)
            if model.embed_dim % fsdp or batch_size % (chips // tensor):
                continue
            mesh = MeshConfig(data=chips // tensor // fsdp, fsdp=fsdp, tensor=tensor)
            for remat in POLICIES:
                for micro in _divisors(rows):
                    found.append(_estimate(model, parameters, chip, chips, mesh, remat, micro, batch_size, length))
    return sorted(found, key=lambda c: (c.memory > chip.memory, c.seconds if c.memory <= chip.memory else c.memory))


def _estimate(model, parameters, chip, chips, mesh, remat, micro, batch_size, length) -> Candidate:
    c, tensor, shards = model, mesh.tensor, mesh.fsdp * mesh.tensor
    embed, wide = c.embed_dim, c.mlp_dim * (2 if c.mlp_gated else 1)
    heads, kv = c.num_heads * c.head_size, c.kv_heads * c.head_size
    tokens = batch_size * length / (mesh.data * mesh.fsdp * micro)
    weights = 2 * parameters / tensor  # as they are gathered, in bfloat16

    stored = {"full": 0, "projections": heads + 2 * kv, "dots": 2 * heads + 2 * kv + wide}[remat] / tensor
    activations = 2 * tokens * c.num_layers * (embed + stored)
    layer = 2 * tokens * (8 * embed + (4 * heads + 3 * wide) / tensor) + 3 * weights / c.num_layers
    head = 3 * 4 * embed * c.vocab_size / tensor
    gradients = 4 * parameters / shards * (2 if micro > 1 else 1)
    memory = 12 * parameters / shards + gradients + activations + max(layer, head)

    compute = executed_flops_per_token(c, length, remat) * batch_size * length / chips / chip.flops
    share = (mesh.fsdp - 1) / mesh.fsdp
    sent = 3 * weights * share * micro  # gathered forward and backward, gradients scattered
    sent += 2 * 4 * parameters / shards * (mesh.data > 1)
    exchanges = 6 if remat == "full" else 4
    sent += exchanges * c.num_layers * 2 * 2 * tokens * embed * micro * (tensor - 1) / tensor
    network = sent / chip.interconnect
    # Products run at half the peak; what little overlaps badly is part of either.
    seconds = max(2 * compute, network) + 0.2 * min(2 * compute, network)
    return Candidate(mesh, remat, micro, memory, seconds)


def _divisors(n: int) -> Sequence[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
