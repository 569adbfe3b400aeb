"""What the settings of experiments have in common in what they refuse. Imports nothing heavy: benchmarks use it too."""

from collections.abc import Collection, Sequence
from typing import Any

from jaxlm.core.errors import ConfigError, nearest


def check_counts(config: Any, *names: str) -> None:
    """Raises `ConfigError` for a field that is below 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} is {getattr(config, name)}, expected at least 1")


def check_seeds(seeds: Sequence[int], tuning_seed: int | None = None) -> None:
    """Raises `ConfigError` unless there are seeds, all different, and what is judged is not what was tuned."""
    if not seeds or len(set(seeds)) < len(seeds) or tuning_seed in seeds:
        but = "" if tuning_seed is None else f", none of them {tuning_seed}"
        raise ConfigError(f"seeds are {seeds}, expected different ones{but}")


def check_rates(config: Any, *names: str) -> None:
    """Raises `ConfigError` for a field without learning rates, or with one that is not above 0."""
    for name in names:
        rates = getattr(config, name)
        if not rates or not min(rates) > 0:
            raise ConfigError(f"{name} are {rates}, expected positive ones")


def check_arms(arms: Sequence[str], known: Collection[str]) -> None:
    """Raises `ConfigError` unless there are arms, all known and different."""
    for name in arms:
        if name not in known:
            raise ConfigError(f"no arm '{name}': {nearest(name, known)}")
    if not arms or len(set(arms)) < len(arms):
        raise ConfigError(f"arms are {arms}, expected different ones")
