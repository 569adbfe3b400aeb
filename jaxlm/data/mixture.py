"""Which source each row of training comes from: closed form, exact shares, and a log of changes.

The interleave is deterministic: n draws at weights w give source i within len(w) of n * w_i, for every n.
Index to (source, index in the source) takes no state, so resuming is a seek, and weights may change at any
index not drawn yet. (`grain.MapDataset.mix` draws in the same way, but refuses zero weights, stops at the
first exhausted source, and keeps one set of weights for good.)

Weight rules: examples-proportional with a limit and temperature as in T5 (arXiv 1910.10683, section 3.5.2).
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxlm.core.errors import ConfigError

# Weights become integers that sum to about this; the draws up to index 2**63 / RESOLUTION fit int64.
RESOLUTION = 10**6


def check_weights(weights: Sequence[float], names: Sequence[str]) -> Float[np.ndarray, "sources"]:
    """Weights as shares that sum to 1.

    Raises `ConfigError` for a wrong number of them, or a negative, infinite or NaN one, or if all are zero.
    """
    if len(weights) != len(names):
        raise ConfigError(
            f"{len(weights)} mixture weights for {len(names)} sources ({', '.join(names)}), expected one each"
        )
    for weight, name in zip(weights, names):
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(f"mixture weight of '{name}' is {weight}, expected >= 0")
    total = math.fsum(weights)
    if total <= 0:
        raise ConfigError(f"all mixture weights are zero (sources: {', '.join(names)}), expected one above 0")
    return np.asarray(weights, dtype=np.float64) / total


class ScheduledMixture:
    """Draws from several sources, with weights that may change at given indices.

    Has the two methods of Grain's `DatasetSelectionMap`, so `MapDataset.select_from_datasets` takes it.

    Args:
      names: of the sources.
      segments: `(start, weights)` in order, as `append` takes them.
    """

    def __init__(self, names: Sequence[str], segments: Sequence[tuple[int, Sequence[float]]] = ()):
        self.names = tuple(names)
        self._starts: list[int] = []
        self._weights: list[np.ndarray] = []
        self._base: list[np.ndarray] = []
        for start, weights in segments:
            self.append(start, weights)

    def append(self, start: int, weights: Sequence[float]) -> None:
        """Sets the weights from index `start` on; zeros are allowed.

        `start` must lie beyond every index that was drawn under earlier weights, which only the caller knows;
        here it must be beyond the start of the last segment.
        """
        shares = check_weights(weights, self.names)
        if all(float(w).is_integer() for w in weights) and sum(weights) <= RESOLUTION:
            scaled = np.asarray(weights).astype(np.int64)  # exact: thirds are thirds
        else:
            # A source that was given a weight is drawn, however small it is.
            scaled = np.maximum(np.round(shares * RESOLUTION), shares > 0).astype(np.int64)
        if not self._starts:
            if start != 0:
                raise ConfigError(f"the first mixture weights start at index {start}, expected 0")
            base = np.zeros(len(self.names), dtype=np.int64)
        elif start <= self._starts[-1]:
            raise ConfigError(
                f"mixture weights from index {start} after ones from index {self._starts[-1]}, expected a later index"
            )
        else:
            base = self.counts(start)
        self._starts.append(int(start))
        self._weights.append(scaled)
        self._base.append(base)

    def counts(self, n: int) -> Int[np.ndarray, "sources"]:
        """Draws from each source among the first `n` indices."""
        r = max(int(np.searchsorted(self._starts, n, side="right")) - 1, 0)
        return self._base[r] + _counts(np.array([n - self._starts[r]]), self._weights[r])[:, 0]

    def locate(self, indices: Int[np.ndarray, "n"]) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
        """The source of each index, and how many earlier indices drew from the same source."""
        indices = np.asarray(indices, dtype=np.int64)
        source, local = np.empty_like(indices), np.empty_like(indices)
        segment = np.searchsorted(self._starts, indices, side="right") - 1
        for r in np.unique(segment):
            here = segment == r
            k = indices[here] - self._starts[r]
            before, after = _counts(k, self._weights[r]), _counts(k + 1, self._weights[r])
            source[here] = drawn = np.argmax(after > before, axis=0)
            local[here] = self._base[r][drawn] + before[drawn, np.arange(len(k))]
        return source, local

    def __len__(self) -> int:
        return 2**63 // (RESOLUTION + len(self.names)) - 1

    def __getitem__(self, index: int) -> tuple[int, int]:
        source, local = self.locate(np.array([index]))
        return int(source[0]), int(local[0])


def _counts(n: Int[np.ndarray, "n"], weights: Int[np.ndarray, "sources"]) -> Int[np.ndarray, "sources n"]:
    """Draws from each source among the first n: each takes its share of what the earlier ones left."""
    left, remaining = n, int(weights.sum())
    counts = np.zeros((len(weights), len(n)), dtype=np.int64)
    for i, weight in enumerate(weights.tolist()):
        if not weight:
            continue
        rest = left * (remaining - weight) // remaining
        counts[i] = left - rest
        left, remaining = rest, remaining - weight
    return counts


class Schedule:
    """The append-only log `[(step, weights)]` of a mixture, as checkpoints keep it.

    All processes must append the same entries. Entry 0 is at step 0.
    """

    def __init__(self, names: Sequence[str], entries: Sequence[tuple[int, Sequence[float]]]):
        self.names = tuple(names)
        self.entries: list[tuple[int, tuple[float, ...]]] = []
        for step, weights in entries:
            self.append(step, weights)

    def append(self, step: int, weights: Sequence[float]) -> None:
        """Sets the weights from `step` on. `step` must be after the last entry's."""
        check_weights(weights, self.names)
        if not self.entries and step != 0:
            raise ConfigError(f"the first entry of a schedule is at step {step}, expected 0")
        if self.entries and step <= self.entries[-1][0]:
            raise ConfigError(
                f"schedule entry at step {step} after one at step {self.entries[-1][0]}, expected a later one"
            )
        self.entries.append((int(step), tuple(float(w) for w in weights)))

    def mixture(self, batch_size: int, scale: Sequence[float] | None = None) -> ScheduledMixture:
        """The mixture over rows; `scale` multiplies the weights (mean rows per document, say)."""
        scale = np.ones(len(self.names)) if scale is None else np.asarray(scale)
        return ScheduledMixture(
            self.names, [(step * batch_size, np.asarray(weights) * scale) for step, weights in self.entries]
        )

    def weights_at(self, step: int) -> dict[str, float]:
        """The weight of each source at a step, as it was given."""
        weights = next(weights for start, weights in reversed(self.entries) if start <= step)
        return dict(zip(self.names, weights))

    def to_json(self) -> list[Any]:
        """Plain lists; the inverse of `from_json`."""
        return [[step, list(weights)] for step, weights in self.entries]

    @classmethod
    def from_json(cls, names: Sequence[str], entries: Sequence[Any]) -> "Schedule":
        return cls(names, [(int(step), weights) for step, weights in entries])


def examples_proportional(sizes: Sequence[float], cap: float = math.inf) -> Float[np.ndarray, "sources"]:
    """Shares proportional to sizes, none counted above `cap` (T5's artificial limit)."""
    limited = np.minimum(np.asarray(sizes, dtype=np.float64), cap)
    if not (limited >= 0).all() or not limited.sum() > 0:
        raise ConfigError(f"sizes {list(sizes)} with cap {cap}: expected numbers >= 0, not all zero")
    return limited / limited.sum()


def temperature(weights: Sequence[float], t: float) -> Float[np.ndarray, "sources"]:
    """Shares proportional to weights to the power 1 / t.

    t = 1 changes nothing, t -> infinity gives equal shares; a zero weight stays zero.
    """
    if not t > 0:
        raise ConfigError(f"mixture temperature is {t}, expected > 0")
    weights = np.asarray(weights, dtype=np.float64)
    powers = (weights / weights.max()) ** (1 / t)  # of ratios, so that nothing overflows
    return powers / powers.sum()


def epoch_cap(
    weights: Sequence[float], sizes: Sequence[float], budget: float, max_epochs: float
) -> Float[np.ndarray, "sources"]:
    """Shares under which `budget` draws repeat no source more than `max_epochs` times.

    Water-filling: sources that would exceed their limit get exactly it, and what they leave goes to the
    others in proportion to their weights, until none exceeds.

    Raises `ConfigError` if the sources with a weight cannot supply the budget.
    """
    weights, limits = np.asarray(weights, dtype=np.float64), max_epochs * np.asarray(sizes, dtype=np.float64)
    capacity = limits[weights > 0].sum()
    if capacity < budget:
        raise ConfigError(
            f"{max_epochs} epochs of the sources with a weight hold {capacity:.0f} tokens, fewer than the "
            f"budget of {budget:.0f}: allow more epochs, train less, or add data"
        )
    draws = budget * weights / weights.sum()
    frozen = np.zeros(len(weights), dtype=bool)
    while (over := ~frozen & (draws > limits)).any():
        frozen |= over
        draws[frozen] = limits[frozen]
        free = ~frozen & (weights > 0)
        left = budget - draws[frozen].sum()
        if free.any():
            draws[free] = left * weights[free] / weights[free].sum()
    return draws / draws.sum()
