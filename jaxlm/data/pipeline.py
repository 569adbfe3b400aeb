"""Batches as a pure function of (store, seed, step, schedule), and the iterator that Grain reads them with.

The global batch at a step is the same for any number of processes; process p of P holds its rows p * B / P to
(p + 1) * B / P. So a checkpoint needs the next step and the schedule, resuming is a seek, and any number of
processes may resume. In each epoch, the rows of a source come in an order keyed by seed, source and epoch.
"""

import dataclasses
import operator
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from jaxlm.core.configs import differences
from jaxlm.core.errors import ConfigError, DataError, JaxlmError
from jaxlm.data.mixture import RESOLUTION, Schedule, ScheduledMixture
from jaxlm.data.packing import Batch, count_rows, read_rows, row_plan
from jaxlm.data.permutation import permutation_key, permuted
from jaxlm.data.store import TokenStore
from jaxlm.data.watch import TIMEOUT, Reader

Unit = Literal["tokens", "documents"]


@dataclasses.dataclass(frozen=True, eq=False)
class BatchSource:
    """Random access to training batches: `source[step]` is this process's part of the batch at `step`.

    Each batch is a dict of `inputs, targets, segment_ids, positions` (int32) and `loss_weights` (float32),
    all `[batch_size / process_count, length]`. Sources wrap around, in a new order each epoch.

    Args:
      store: the corpus.
      schedule: mixture weights by step, in `unit`.
      batch_size: rows in the global batch.
      length: tokens predicted in a row.
      seed: of the order of rows.
      unit: what the weights count. A row holds one source, so "tokens" are shares of rows; "documents" become
        tokens through each source's mean document.
      process_index, process_count: which part of each batch to read.
    """

    store: TokenStore
    schedule: Schedule
    _: dataclasses.KW_ONLY
    batch_size: int
    length: int
    seed: int
    unit: Unit = "tokens"
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self):
        if self.unit not in ("tokens", "documents"):
            raise ConfigError(f"mixture weights count {self.unit!r}, expected 'tokens' or 'documents'")
        if self.schedule.names != self.store.source_names:
            raise ConfigError(
                f"a schedule for the sources {', '.join(self.schedule.names)}, but the store has "
                f"{', '.join(self.store.source_names)}"
            )
        if not self.schedule.entries:
            raise ConfigError("the schedule has no entry: expected mixture weights at step 0")
        local_rows(self.batch_size, self.process_index, self.process_count)
        count_rows(self.store, self.length)

    @cached_property
    def mixture(self) -> ScheduledMixture:
        """Global row index to (source, draw from that source)."""
        mean_pairs = self.store.source_pairs / self.store.source_documents
        return self.schedule.mixture(self.batch_size, mean_pairs if self.unit == "documents" else None)

    def __len__(self) -> int:
        # Every index is valid: this is where 64-bit arithmetic in the mixture ends.
        return 2**62 // RESOLUTION // self.batch_size

    def __getitem__(self, step: int) -> Batch:
        local = local_rows(self.batch_size, self.process_index, self.process_count)
        source, row, _ = self.rows(int(step) * self.batch_size + np.arange(local.start, local.stop))
        return read_rows(self.store, source, row, self.length)

    def rows(
        self, indices: Int[np.ndarray, "n"]
    ) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
        """Source, row of the source, and epoch of global rows; step s has those from s * batch_size on."""
        source, drawn = self.mixture.locate(indices)
        source_rows = count_rows(self.store, self.length)
        epoch, position = np.divmod(drawn, source_rows[source])
        keys = {
            (s, e): permutation_key(self.seed, s, e) for s, e in set(zip(source.tolist(), epoch.tolist()))
        }
        key = np.array([keys[pair] for pair in zip(source.tolist(), epoch.tolist())], dtype=np.uint64)
        row = permuted(position, source_rows[source], key)
        return source, row, epoch

    def provenance(self, step: int) -> dict[str, Any]:
        """Where the global batch at `step` comes from, as JSON: all that is needed to make it again.

        `rows` has for each row its source, its place in it, the epoch, the sum of its loss weights and its `pieces`:
        `[document of the store, first pair, pair after the last]`, pair t being tokens t and t + 1.
        """
        source, row, epoch = self.rows(int(step) * self.batch_size + np.arange(self.batch_size))
        weights = read_rows(self.store, source, row, self.length)["loss_weights"].sum(axis=1)
        plan = row_plan(self.store, source, row, self.length)
        rows = [
            {
                "source": self.store.source_names[s],
                "row": int(r),
                "epoch": int(e),
                "weight": float(w),
                "pieces": [list(map(int, piece)) for piece in pieces],
            }
            for s, r, e, w, pieces in zip(source, row, epoch, weights, plan)
        ]
        return {"index": int(step), "mixture": self.schedule.weights_at(step), **self.identity(), "rows": rows}

    def identity(self) -> dict[str, Any]:
        """What must not change between saving and resuming (the number of processes may)."""
        return {
            "fingerprint": self.store.fingerprint,
            "sources": list(self.store.source_names),
            "seed": self.seed,
            "batch_size": self.batch_size,
            "length": self.length,
            "unit": self.unit,
        }


class TrainIterator:
    """Endless training batches in order of step, read ahead by Grain; its state is a few numbers.

    Batches that were read ahead are not part of the state: a restored iterator continues with the step after
    the last batch that `next` returned. Made by `make_train_iterator`.
    """

    def __init__(self, source: BatchSource, *, workers: int = 0, buffer: int = 2, timeout: float = TIMEOUT):
        self.source = source
        self.next_step = 0
        self._workers, self._buffer = workers, buffer
        self._iterator = None
        self._reader = Reader(timeout)

    def __iter__(self) -> "TrainIterator":
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = self._open()
        try:
            batch = self._reader(self._iterator.__next__, self._what)
        except JaxlmError:
            # It cannot be closed: that would wait for a read that hangs.
            self._iterator = None
            raise
        except Exception as error:
            raise DataError(f"{self._what()}: reading failed: {type(error).__name__}: {error}") from error
        self.next_step += 1
        return batch

    def provenance(self, step: int) -> dict[str, Any]:
        """As `BatchSource.provenance`, with the schedule as it is now."""
        return self.source.provenance(step)

    def get_state(self) -> dict[str, Any]:
        """JSON for a checkpoint; the same on all processes."""
        return {
            "next_step": self.next_step, "schedule": self.source.schedule.to_json(), **self.source.identity()
        }  # fmt: skip

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues where the iterator with that state was, with its schedule, on any number of processes.

        Raises `DataError` if the state belongs to other data, or to another seed, batch size or length.
        """
        saved = {key: state.get(key) for key in self.source.identity()}
        if changed := differences(saved, self.source.identity()):
            raise DataError(f"the checkpoint was trained on other data: {'; '.join(changed)}")
        try:
            schedule = Schedule.from_json(self.source.schedule.names, state["schedule"])
            step = operator.index(state["next_step"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"the checkpoint's place in the data is damaged: {error!r}") from error
        if step < 0:
            raise DataError(f"the checkpoint's place in the data is damaged: next_step is {step}")
        self._restart(dataclasses.replace(self.source, schedule=schedule), step)

    def reweight(self, step: int, weights: Sequence[float]) -> None:
        """Changes the mixture weights from `step` on; all processes must do the same.

        Batches already read ahead are dropped and read again. Raises `ConfigError` for a step that was handed
        out already, or that is not after the last change.
        """
        if step < self.next_step:
            raise ConfigError(
                f"new mixture weights at step {step}, but steps up to {self.next_step - 1} are out"
            )
        schedule = Schedule(self.source.schedule.names, self.source.schedule.entries)
        schedule.append(step, weights)
        self._restart(dataclasses.replace(self.source, schedule=schedule), self.next_step)

    def close(self) -> None:
        """Stops threads and worker processes; the next `next` starts them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None
        self._reader.close()

    def _what(self) -> str:
        """The batch that is being read, for errors."""
        first = self.next_step * self.source.batch_size
        sources, _, _ = self.source.rows(np.arange(first, first + self.source.batch_size))
        names = ", ".join(f"'{self.source.store.source_names[s]}'" for s in np.unique(sources))
        return f"batch of step {self.next_step + 1} from {names} in {self.source.store.folder}"

    def _restart(self, source: BatchSource, next_step: int) -> None:
        self.close()
        self.source, self.next_step = source, next_step

    def _open(self) -> Any:
        import grain

        data = grain.MapDataset.source(self.source)[self.next_step :]
        threads = 1 if self._buffer else 0
        data = data.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=self._buffer))
        if self._workers:
            from absl import flags

            # Grain's workers read absl flags, which raise unless a main program has parsed them.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(
                num_workers=self._workers, per_worker_buffer_size=max(self._buffer, 1)
            )
            data = data.mp_prefetch(options)
        return iter(data)


def make_train_iterator(
    store: TokenStore,
    *,
    batch_size: int,
    length: int,
    seed: int,
    weights: Sequence[float] | None = None,
    unit: Unit = "tokens",
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    buffer: int = 2,
    timeout: float = TIMEOUT,
) -> TrainIterator:
    """An iterator over training batches from step 0; `set_state` moves it.

    Args:
      store, batch_size, length, seed, unit, process_index, process_count: as in `BatchSource`.
      weights: of the mixture from step 0; by default the sizes, so that all sources finish an epoch together.
      workers: processes to read in. Reading rows is far faster than training on them, so 0, a thread in this
        process, is right unless transforms are added.
      buffer: batches to read ahead; 0 reads when asked.
      timeout: seconds that a batch may take; 0 waits for ever. It and a reading process that died are `DataError`s
        that name the sources.
    """
    if weights is None:
        weights = store.source_pairs if unit == "tokens" else store.source_documents
    schedule = Schedule(store.source_names, [(0, weights)])
    source = BatchSource(
        store, schedule, batch_size=batch_size, length=length, seed=seed, unit=unit,
        process_index=process_index, process_count=process_count,
    )  # fmt: skip
    return TrainIterator(source, workers=workers, buffer=buffer, timeout=timeout)


def eval_batches(
    store: TokenStore,
    source: int | str,
    *,
    batch_size: int,
    length: int,
    max_batches: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """One pass over a source in the store's order, the same every time; each pair occurs once.

    Rows that fill the last batch up are zeros, with zero `loss_weights`. The store holds documents in a
    random order, so the first `max_batches` are a fair sample.
    """
    local = local_rows(batch_size, process_index, process_count)
    index = store.source_index(source)
    total = int(count_rows(store, length)[index])
    batches = -(-total // batch_size)
    return (
        _padded(store, index, np.arange(local.start, local.stop) + batch * batch_size, total, length)
        for batch in range(batches if max_batches is None else min(batches, max_batches))
    )


def local_rows(batch_size: int, process_index: int, process_count: int) -> range:
    """The rows of the global batch that a process holds; `ConfigError` if they cannot be shared evenly."""
    if not 0 <= process_index < process_count:
        raise ConfigError(f"process {process_index} of {process_count}: expected 0 <= index < count")
    if batch_size < 1 or batch_size % process_count:
        raise ConfigError(f"batch size {batch_size} is not a multiple of the {process_count} processes")
    share = batch_size // process_count
    return range(process_index * share, (process_index + 1) * share)


def _padded(store: TokenStore, source: int, rows: np.ndarray, total: int, length: int) -> Batch:
    here = rows[rows < total]
    batch = read_rows(store, source, here, length)
    missing = len(rows) - len(here)
    return (
        {name: np.pad(array, ((0, missing), (0, 0))) for name, array in batch.items()} if missing else batch
    )
