"""Fine-tuning batches from examples in memory: a pure function of (fingerprint, seed, step), so resume is a seek.

Each class is an iterator as the training loop and checkpoints expect it (`next`, `get_state`, `set_state`, `close`).
In each epoch, rows come in an order keyed by seed and epoch; batches run on over the end of an epoch.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxlm.core.configs import differences
from jaxlm.core.errors import ConfigError, DataError
from jaxlm.data.chat_examples import Labeled
from jaxlm.data.packing import Batch, Piece, Plan, fill_rows, pack_best_fit_decreasing
from jaxlm.data.permutation import permutation_key, permuted
from jaxlm.data.pipeline import local_rows


class ExampleBatches:
    """Endless batches of rows of examples. `source[step]` is the batch at a step; `next` gives them in order.

    A subclass sets `count`, the number of rows, and writes `gather` and `pieces`.

    Args:
      examples: what rows are made of; their contents decide the fingerprint.
      batch_size: rows in the global batch.
      length: pairs in a row.
      seed: of the order.
      process_index, process_count: which rows of each batch this process reads.
    """

    kind = ""
    count: int

    def __init__(
        self,
        examples: Sequence[Batch],
        *,
        batch_size: int,
        length: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if not examples:
            raise DataError("no examples to make batches of")
        longest = max(len(example["inputs"]) for example in examples)
        if longest > length:
            raise DataError(f"an example has {longest} pairs, but rows hold {length}: drop or truncate it first")
        self.examples, self.batch_size, self.length, self.seed = examples, batch_size, length, seed
        self.local = local_rows(batch_size, process_index, process_count)
        self.next_step = 0
        self.fingerprint = _fingerprint(examples)

    def gather(self, rows: Int[np.ndarray, "rows"], following: Int[np.ndarray, "rows"]) -> Batch:
        """The arrays of some rows, axis 0 being the rows; `following[i]` comes after `rows[i]` in the batch."""
        raise NotImplementedError

    def pieces(self, row: int) -> list[Piece]:
        """The examples that a row is made of."""
        raise NotImplementedError

    @property
    def steps_per_epoch(self) -> float:
        """Batches in which every row occurs once."""
        return self.count / self.batch_size

    def __getitem__(self, step: int) -> Batch:
        rows = self.row_indices(step)
        local = slice(self.local.start, self.local.stop)
        return self.gather(rows[local], np.roll(rows, -1)[local])

    def row_indices(self, step: int) -> Int[np.ndarray, "batch_size"]:
        """The rows in the global batch at a step."""
        return self._in_order(int(step) * self.batch_size, self.batch_size)

    def one_pass(self) -> Iterator[Batch]:
        """Every row once, in order, for evaluation; the last batch is filled up with zeros."""
        for start in range(0, self.count, self.batch_size):
            mine = np.arange(self.local.start, self.local.stop) + start
            rows = np.minimum(mine, self.count - 1)
            batch = self.gather(rows, (rows + 1) % self.count)
            kept = mine < self.count
            yield {name: x * kept.reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype) for name, x in batch.items()}

    def __iter__(self) -> "ExampleBatches":
        return self

    def __next__(self) -> Batch:
        batch = self[self.next_step]
        self.next_step += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """JSON for a checkpoint; the same on all processes."""
        return {"next_step": self.next_step, **self.identity()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues where the iterator with that state was; `DataError` if it read other data or otherwise."""
        saved = {name: state.get(name) for name in self.identity()}
        if changed := differences(saved, self.identity()):
            raise DataError(f"the checkpoint was trained on other data: {'; '.join(changed)}")
        step = state.get("next_step")
        if type(step) is not int or step < 0:
            raise DataError(f"the checkpoint's place in the data is damaged: next_step is {step!r}")
        self.next_step = step

    def provenance(self, step: int) -> dict[str, Any]:
        """Where the global batch at `step` comes from, as JSON: for each row its number, its epoch, the sum of its
        loss weights, and its `pieces`: `[example, first pair, pair after the last]`."""
        rows = self.row_indices(step)
        weights = self.gather(rows, np.roll(rows, -1))["loss_weights"].reshape(len(rows), -1).sum(axis=1)
        described = [
            {
                "row": int(row),
                "epoch": (int(step) * self.batch_size + i) // self.count,
                "weight": float(weight),
                "pieces": [list(map(int, piece)) for piece in self.pieces(int(row))],
            }
            for i, (row, weight) in enumerate(zip(rows, weights))
        ]
        return {"index": int(step), **self.identity(), "rows": described}

    def identity(self) -> dict[str, Any]:
        """What must not change between saving and resuming (the number of processes may)."""
        return {
            "kind": self.kind,
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "length": self.length,
        }

    def close(self) -> None:
        """Nothing to stop: everything is in memory."""

    def _in_order(self, start: int, number: int) -> Int[np.ndarray, "number"]:
        """So many of `count` things from place `start` of the endless order on."""
        epoch, position = np.divmod(start + np.arange(number), self.count)
        key = np.array([permutation_key(self.seed, self.kind, e) for e in epoch.tolist()], dtype=np.uint64)
        return permuted(position, self.count, key)


class ChatBatches(ExampleBatches):
    """Examples packed whole by best fit decreasing (Ding et al. 2024, arXiv 2404.10830): `inputs, targets,
    loss_weights, segment_ids, positions`, each `[batch, length]`. With `pack=False` each has a row to itself."""

    kind = "chat"

    def __init__(self, examples: Sequence[Batch], *, pack: bool = True, **settings: Any):
        super().__init__(examples, **settings)
        lengths = [len(example["inputs"]) for example in examples]
        if pack:
            self.plan = pack_best_fit_decreasing(lengths, self.length)
        else:
            self.plan = [[Piece(i, 0, n)] for i, n in enumerate(lengths)]
        self.pack = pack
        self.count = len(self.plan)

    def gather(self, rows, following):
        return fill_rows(self.examples, [self.plan[r] for r in rows], self.length)

    def pieces(self, row):
        return self.plan[row]

    def identity(self):
        return {**super().identity(), "pack": self.pack}


class SampleBatches(ExampleBatches):
    """Batches of exactly `samples` examples: the effective batch counts samples, however many fit into a row.

    The examples of a batch are packed whole, by best fit decreasing, into rows that are the same number in all batches:
    as many as the batch that needs most among the first `steps` (of the run), rounded up to a multiple of
    `row_multiple` (devices times micro-batches) and of the processes. What is not needed is padding, without weight.

    Arrays are those of `ChatBatches`. Raises `ConfigError` for numbers below 1.
    """

    kind = "samples"

    def __init__(
        self,
        examples: Sequence[Batch],
        *,
        samples: int,
        steps: int,
        length: int,
        seed: int,
        row_multiple: int = 1,
        process_index: int = 0,
        process_count: int = 1,
    ):
        for name, value in (("samples", samples), ("steps", steps), ("row_multiple", row_multiple)):
            if value < 1:
                raise ConfigError(f"{name} is {value}, expected at least 1")
        multiple = math.lcm(row_multiple, process_count)
        place = {"process_index": process_index, "process_count": process_count}
        super().__init__(examples, batch_size=multiple, length=length, seed=seed, **place)
        self.samples, self.steps, self.count = samples, steps, len(examples)
        self.lengths = [len(example["inputs"]) for example in examples]
        needed = max(len(self._pack(step)) for step in range(steps))
        self.batch_size = -(-needed // multiple) * multiple
        self.local = local_rows(self.batch_size, process_index, process_count)

    @property
    def steps_per_epoch(self) -> float:
        return self.count / self.samples

    def plan(self, step: int) -> Plan:
        """What the rows of the global batch at a step are made of; empty rows come last.

        Raises `DataError` for a later batch than those planned for that needs more rows than there are.
        """
        found = self._pack(step)
        if len(found) > self.batch_size:
            raise DataError(
                f"the {self.samples} samples of batch {step} need {len(found)} rows, but there are {self.batch_size}, "
                f"as the first {self.steps} batches need: plan for more steps"
            )
        return found + [[] for _ in range(self.batch_size - len(found))]

    def row_indices(self, step):
        """The examples in the global batch at a step, before they are packed."""
        return self._in_order(int(step) * self.samples, self.samples)

    def __getitem__(self, step):
        return self._fill(self.plan(step))

    def one_pass(self):
        plan = pack_best_fit_decreasing(self.lengths, self.length)
        for start in range(0, len(plan), self.batch_size):
            rows = plan[start : start + self.batch_size]
            yield self._fill(rows + [[] for _ in range(self.batch_size - len(rows))])

    def provenance(self, step):
        plan = self.plan(step)
        weights = fill_rows(self.examples, plan, self.length)["loss_weights"].sum(axis=1)
        epoch = int(step) * self.samples // self.count
        described = [
            {"row": i, "epoch": epoch, "weight": float(weight), "pieces": [list(map(int, piece)) for piece in pieces]}
            for i, (pieces, weight) in enumerate(zip(plan, weights))
        ]
        return {"index": int(step), **self.identity(), "rows": described}

    def identity(self):
        # A run that goes on for more steps may need more rows; its batches hold the same examples.
        return {**{k: v for k, v in super().identity().items() if k != "batch_size"}, "samples": self.samples}

    def _pack(self, step: int) -> Plan:
        drawn = self.row_indices(step)
        plan = pack_best_fit_decreasing([self.lengths[i] for i in drawn], self.length)
        return [[piece._replace(example=int(drawn[piece.example])) for piece in row] for row in plan]

    def _fill(self, plan: Plan) -> Batch:
        return fill_rows(self.examples, plan[self.local.start : self.local.stop], self.length)


class PairBatches(ExampleBatches):
    """Preference pairs: arrays `[batch, 2, length]`, chosen first. More arrays in the examples (stored
    `reference_log_probs`, say) come along."""

    kind = "pairs"

    def __init__(self, pairs: Sequence[tuple[Batch, Batch]], **settings: Any):
        super().__init__([example for pair in pairs for example in pair], **settings)
        self.count = len(pairs)

    def gather(self, rows, following):
        plan = _whole(self.examples, np.stack([2 * rows, 2 * rows + 1], axis=1).reshape(-1))
        filled = fill_rows(self.examples, plan, self.length)
        return {name: x.reshape(len(rows), 2, self.length) for name, x in filled.items()}

    def pieces(self, row):
        return [piece for (piece,) in _whole(self.examples, [2 * row, 2 * row + 1])]


class LabeledBatches(ExampleBatches):
    """KTO's batches: arrays `[batch, length]`, `labels` `[batch]` (float32, 1 desirable), and under `kl_...` each
    row's prompt with the completion of the row after it in the global batch, cut to `length`.

    Raises `ConfigError` for batches of one row, which have no other completion, `DataError` for one example.
    """

    kind = "labeled"

    def __init__(self, data: Labeled, **settings: Any):
        super().__init__(data.examples, **settings)
        if self.batch_size < 2:
            raise ConfigError("batch size is 1: KTO needs another row's completion, so 2 or more")
        if len(data.examples) < 2:
            raise DataError("one example: KTO needs another one's completion")
        self.data, self.count = data, len(data.examples)
        text = f"{self.fingerprint} {data.prompt_tokens} {data.labels}"
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]

    def gather(self, rows, following):
        batch = fill_rows(self.examples, _whole(self.examples, rows), self.length)
        mixed = [self._mismatched(int(r), int(f)) for r, f in zip(rows, following)]
        kl = fill_rows(mixed, _whole(mixed, np.arange(len(mixed))), self.length)
        labels = np.asarray([self.data.labels[r] for r in rows], dtype=np.float32)
        return {**batch, **{f"kl_{name}": x for name, x in kl.items()}, "labels": labels}

    def pieces(self, row):
        return [piece for (piece,) in _whole(self.examples, [row])]

    def _mismatched(self, row: int, other: int) -> Batch:
        """The prompt of one example and the completion of another: pair t has token t + 1 as its target."""
        start, other_start = self.data.prompt_tokens[row], self.data.prompt_tokens[other]
        mine, theirs = self.examples[row], self.examples[other]
        first = mine["inputs"][:1] if start else theirs["inputs"][:0]
        prompt = np.concatenate([first, mine["targets"][: max(start - 1, 0)]])
        completion = theirs["targets"][other_start - 1 :] if other_start else theirs["targets"]
        weights = theirs["loss_weights"][other_start - 1 :] if other_start else theirs["loss_weights"]
        tokens = np.concatenate([prompt, completion])
        weights = np.concatenate([np.zeros(len(prompt), np.float32), weights])
        pairs = {"inputs": tokens[:-1], "targets": tokens[1:], "loss_weights": weights[1:]}
        return {name: x[: self.length] for name, x in pairs.items()}


def _whole(examples: Sequence[Batch], indices: Sequence[int]) -> Plan:
    """A plan with one example a row."""
    return [[Piece(int(i), 0, len(examples[int(i)]["inputs"]))] for i in indices]


def _fingerprint(examples: Sequence[Batch]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        for name in sorted(example):
            array = np.ascontiguousarray(example[name])
            digest.update(f"{name} {array.dtype} {array.shape};".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()[:16]
