"""Planning: a program compiled for machines that are not here, and what it takes of their chips."""

from jaxlm.planning.hlo import Collective, Costs, analyze
from jaxlm.planning.plan import Memory, Plan, Times, make_plan, parse_refusal, shard_bytes
from jaxlm.planning.search import Candidate, candidates
from jaxlm.planning.steps import LoweredStep, abstract_batch, adapter_step, decode_step, policy_step, train_step
from jaxlm.planning.topology import CHIPS, Chip, Topology, find_topology, num_chips, parse_topology, prepare_environment

__all__ = [
    "CHIPS",
    "Candidate",
    "Chip",
    "Collective",
    "Costs",
    "LoweredStep",
    "Memory",
    "Plan",
    "Times",
    "Topology",
    "abstract_batch",
    "adapter_step",
    "analyze",
    "candidates",
    "decode_step",
    "find_topology",
    "make_plan",
    "num_chips",
    "parse_refusal",
    "parse_topology",
    "policy_step",
    "prepare_environment",
    "shard_bytes",
    "train_step",
]
