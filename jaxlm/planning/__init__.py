"""Planning: a program compiled for machines that are not here, and what it takes of their chips."""

from jaxlm.planning.hlo import Collective, Costs, analyze
from jaxlm.planning.plan import Memory, Plan, Times, make_plan, parse_refusal, shard_bytes
from jaxlm.planning.search import Candidate, candidates
from jaxlm.planning.topology import CHIPS, Chip, Topology, find_topology, num_chips, parse_topology, prepare_environment

__all__ = [
    "CHIPS",
    "Candidate",
    "Chip",
    "Collective",
    "Costs",
    "Memory",
    "Plan",
    "Times",
    "Topology",
    "analyze",
    "candidates",
    "find_topology",
    "make_plan",
    "num_chips",
    "parse_refusal",
    "parse_topology",
    "prepare_environment",
    "shard_bytes",
]
