"""The tokenized store: a corpus encoded once, memory-mapped ever after.

A store is a folder. `tokens.bin` holds the documents of the first source in a seeded permutation, then those
of the second, and so on, each document as its ids with BOS and EOS. `offsets.bin` (int64, documents + 1) says
where each begins, `sources.bin` (int32) and `bytes.bin` (int64) its source and its size as text;
`manifest.json` holds the rest: sizes, the tokenizer's fingerprint, a digest of each source's documents, and
the store's own fingerprint over all of its content.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxlm.core.configs import differences, fingerprint
from jaxlm.core.errors import DataError, nearest
from jaxlm.core.json_files import read_object
from jaxlm.data.cache import atomic_folder
from jaxlm.data.permutation import permutation_key, permuted
from jaxlm.data.sources import Document
from jaxlm.data.tokenizers.protocol import Tokenizer, utf8

FORMAT = 1
_MANIFEST = "manifest.json"
_BATCH_BYTES = 1 << 21
_STRETCH = 1 << 20


class TokenStore:
    """A store on disk, opened by `open_store`; copies that travel to other processes map the same files.

    Attributes:
      source_names: the sources, in the order of their indices.
      fingerprint: equal for two stores exactly if their content is.
      tokens: uint16 or uint32 `[tokens]`, memory-mapped.
      offsets: int64 `[documents + 1]`.
      source_ids: int32 `[documents]`.
      byte_counts: int64 `[documents]`, UTF-8 bytes of each document's text.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]):
        self.folder = folder
        self.manifest = manifest
        self.source_names: tuple[str, ...] = tuple(s["name"] for s in manifest["sources"])
        self.fingerprint: str = manifest["fingerprint"]
        self.vocab_size: int = manifest["settings"]["vocab_size"]
        self.tokens = self._map("tokens.bin", np.dtype(manifest["dtype"]))
        self.offsets = self._map("offsets.bin", np.int64)
        self.source_ids = self._map("sources.bin", np.int32)
        self.byte_counts = self._map("bytes.bin", np.int64)

    def source_index(self, source: int | str) -> int:
        """The index of a source, by name or index; `DataError` for an unknown one."""
        if isinstance(source, str):
            if source not in self.source_names:
                raise DataError(
                    f"no source '{source}' in {self.folder}: {nearest(source, self.source_names)}"
                )
            return self.source_names.index(source)
        if not 0 <= source < len(self.source_names):
            raise DataError(f"no source {source} in {self.folder}: it has {len(self.source_names)}")
        return int(source)

    @cached_property
    def document_starts(self) -> np.ndarray:
        """int64 `[sources + 1]`: the documents of source s are those from `[s]` to `[s + 1]`."""
        return np.cumsum([0, *(s["documents"] for s in self.manifest["sources"])])

    @cached_property
    def pair_starts(self) -> np.ndarray:
        """int64 `[documents + 1]`: where each document begins when n tokens count as n - 1 predictions."""
        return np.asarray(self.offsets) - np.arange(len(self.offsets))

    @cached_property
    def source_pairs(self) -> np.ndarray:
        """int64 `[sources]`: (input, target) pairs of each source: what an epoch of it predicts."""
        return np.diff(self.pair_starts[self.document_starts])

    @cached_property
    def source_documents(self) -> np.ndarray:
        """int64 `[sources]`: documents of each source."""
        return np.diff(self.document_starts)

    def document(self, index: int) -> np.ndarray:
        """The ids of one document, BOS and EOS included."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def _map(self, name: str, dtype: Any) -> np.ndarray:
        # A plain array over the map: indexing np.memmap itself costs several times more.
        return np.asarray(np.memmap(self.folder / name, dtype=dtype, mode="r"))

    def __reduce__(self):
        return open_store, (self.folder,)


def build_store(
    folder: str | Path,
    sources: Mapping[str, Iterable[Document]],
    tokenizer: Tokenizer,
    *,
    seed: int,
    add_bos: bool = True,
    add_eos: bool = True,
    progress: bool = True,
    total_bytes: int | None = None,
) -> TokenStore:
    """Encodes `sources` into a store at `folder`, or opens the one that is there if it holds the same.

    A store that exists is compared without encoding anything: settings first, then a digest of every
    document. The new one is written beside `folder` and renamed, so an interrupted build leaves nothing.

    Args:
      folder: to be created.
      sources: name to documents; each is read once.
      tokenizer: encodes in batches with the threads of its own engine.
      seed: of the permutation of documents in each source.
      add_bos, add_eos: whether documents begin with BOS and end with EOS. One with fewer than two tokens
        predicts nothing and is left out.
      progress: shows a bar on the terminal.
      total_bytes: of text, if known, for the bar.

    Raises:
      DataError: a source without documents, or a store at `folder` with other content; says what differs.
    """
    folder = Path(folder)
    special = {role: tokenizer.special_ids[role] for role in ("bos", "eos")}
    settings = {
        "tokenizer": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size, "special_ids": special,
        "seed": seed, "add_bos": add_bos, "add_eos": add_eos, "sources": list(sources),
    }  # fmt: skip
    if not sources:
        raise DataError("the corpus is empty: no sources")
    if folder.exists():
        return _reuse(folder, sources, settings)
    with atomic_folder(folder) as temporary:
        with _bar(total_bytes) if progress else nullcontext() as advance:
            written = _write(temporary, sources, tokenizer, settings, advance)
        manifest = {"format": FORMAT, "settings": settings, **written}
        manifest["files"] = {f.name: f.stat().st_size for f in sorted(temporary.iterdir())}
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=1))
    return open_store(folder, tokenizer)


def open_store(folder: str | Path, tokenizer: Tokenizer | None = None) -> TokenStore:
    """Opens a store that `build_store` wrote.

    Raises `DataError` if there is none, if its files are not as long as its manifest says, if another version
    of the format wrote it, or if it was encoded with another tokenizer than `tokenizer`.
    """
    folder = Path(folder)
    if not (folder / _MANIFEST).exists():
        raise DataError(f"no tokenized store at {folder}: {_MANIFEST} is missing")
    try:
        manifest = read_object(folder / _MANIFEST)
    except DataError as error:
        raise DataError(f"{folder / _MANIFEST} is damaged ({error}): delete the folder to rebuild it") from error
    if manifest.get("format") != FORMAT:
        raise DataError(
            f"{folder} has format {manifest.get('format')}, expected {FORMAT}: delete it to rebuild"
        )
    _check_manifest(folder, manifest)
    for name, size in manifest["files"].items():
        found = (folder / name).stat().st_size if (folder / name).exists() else 0
        if found != size:
            raise DataError(
                f"{folder / name} holds {found} bytes, expected {size}: delete the folder to rebuild it"
            )
    if tokenizer is not None and tokenizer.fingerprint != manifest["settings"]["tokenizer"]:
        raise DataError(
            f"{folder} was encoded with the tokenizer {manifest['settings']['tokenizer']}, "
            f"expected {tokenizer.fingerprint}"
        )
    store = TokenStore(folder, manifest)
    _check_offsets(store)
    return store


def _check_offsets(store: TokenStore) -> None:
    """`DataError` unless offsets and sources divide the tokens as the manifest says."""
    offsets, counts = store.offsets, [source["documents"] for source in store.manifest["sources"]]
    whole = offsets[0] == 0 and offsets[-1] == len(store.tokens) and bool((offsets[1:] >= offsets[:-1]).all())
    if not whole or not np.array_equal(store.source_ids, np.repeat(np.arange(len(counts)), counts)):
        raise DataError(f"{store.folder} is damaged (offsets or sources of documents): delete the folder to rebuild it")


def _check_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """`DataError` unless a manifest has what a store is read by, and its files are those of a store, as long as it
    says they are."""

    def require(holds: bool, what: str) -> None:
        if not holds:
            raise DataError(f"{folder / _MANIFEST} is damaged ({what}): delete the folder to rebuild it")

    settings, sources, files = (manifest.get(name) for name in ("settings", "sources", "files"))
    require(isinstance(manifest.get("fingerprint"), str), "fingerprint")
    require(manifest.get("dtype") in ("uint16", "uint32"), "dtype")
    require(isinstance(settings, dict) and isinstance(settings.get("tokenizer"), str), "settings")
    require(type(settings.get("vocab_size")) is int and 0 < settings["vocab_size"] < 1 << 32, "settings.vocab_size")
    require(isinstance(sources, list) and len(sources) > 0, "sources")
    for source in sources:
        counts = [source.get(n) for n in ("documents", "tokens", "read", "bytes")] if isinstance(source, dict) else []
        require(bool(counts) and all(type(n) is int and 0 <= n < 1 << 62 for n in counts), "sources: counts")
        require(all(isinstance(source.get(n), str) for n in ("name", "digest")), "sources: names")
    require(len({source["name"] for source in sources}) == len(sources), "sources: a name twice")
    documents, tokens = (sum(source[name] for source in sources) for name in ("documents", "tokens"))
    width = np.dtype(manifest["dtype"]).itemsize
    sizes = {
        "tokens.bin": tokens * width, "offsets.bin": 8 * (documents + 1), "sources.bin": 4 * documents,
        "bytes.bin": 8 * documents,
    }  # fmt: skip
    require(files == sizes, "files")
    require(documents > 0, "sources: no documents")


def _reuse(
    folder: Path, sources: Mapping[str, Iterable[Document]], settings: Mapping[str, Any]
) -> TokenStore:
    store = open_store(folder)
    changed = differences(store.manifest["settings"], settings)
    if not changed:
        for known, documents in zip(store.manifest["sources"], sources.values()):
            digest = _Digest()
            for document in documents:
                digest.add(document)
            now = {"read": digest.count, "bytes": digest.bytes, "digest": digest.hexdigest()}
            changed += differences({key: known[key] for key in now}, now, known["name"])
    if changed:
        raise DataError(
            f"the store {folder} was built from other data or settings ({'; '.join(changed)}): "
            "delete it, or build in another folder"
        )
    return store


Advance = Callable[[int], None] | None


def _write(
    folder: Path,
    sources: Mapping[str, Iterable[Document]],
    tokenizer: Tokenizer,
    settings: Mapping[str, Any],
    advance: Advance,
) -> dict[str, Any]:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    content = hashlib.sha256()
    described, all_lengths, all_bytes = [], [np.zeros(1, np.int64)], []
    arrival = folder / "arrival.bin"
    with open(folder / "tokens.bin", "wb") as out:
        for index, (name, documents) in enumerate(sources.items()):
            digest = _Digest()
            with open(arrival, "wb") as raw:
                lengths, sizes = _encode(documents, tokenizer, settings, dtype, digest, raw, advance)
            if not len(lengths):
                raise DataError(f"the source '{name}' is empty: {digest.count} documents, nothing to predict")
            order = permuted(np.arange(len(lengths)), len(lengths), permutation_key(settings["seed"], index))
            _permute(arrival, dtype, lengths, order, out, content)
            all_lengths.append(lengths[order])
            all_bytes.append(sizes[order])
            described.append(
                {
                    "name": name,
                    "documents": len(lengths),
                    "tokens": int(lengths.sum()),
                    "read": digest.count,
                    "bytes": digest.bytes,
                    "digest": digest.hexdigest(),
                }
            )
    arrival.unlink()
    arrays = {
        "offsets.bin": np.cumsum(np.concatenate(all_lengths)),
        "sources.bin": np.repeat(
            np.arange(len(sources), dtype=np.int32), [s["documents"] for s in described]
        ),
        "bytes.bin": np.concatenate(all_bytes),
    }
    for file, array in arrays.items():
        array.tofile(folder / file)
        content.update(array.tobytes())
    return {
        "dtype": dtype.name,
        "sources": described,
        "fingerprint": fingerprint([FORMAT, settings["tokenizer"], settings["sources"], content.hexdigest()]),
    }


class _Digest:
    """A running digest of documents: their number, their bytes, and a hash of names and texts."""

    def __init__(self):
        self.count, self.bytes, self._hash = 0, 0, hashlib.sha256()

    def add(self, document: Document) -> int:
        try:
            text, name = utf8(document.text), utf8(document.name)
        except DataError as error:
            raise DataError(f"{document.name!r}: {error}") from error
        self._hash.update(len(name).to_bytes(8, "little") + name + len(text).to_bytes(8, "little") + text)
        self.count += 1
        self.bytes += len(text)
        return len(text)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _encode(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    settings: Mapping[str, Any],
    dtype: np.dtype,
    digest: _Digest,
    out: BinaryIO,
    advance: Advance,
) -> tuple[np.ndarray, np.ndarray]:
    """Writes the documents as they come; returns the tokens and bytes of each."""
    before = [settings["special_ids"]["bos"]] if settings["add_bos"] else []
    after = [settings["special_ids"]["eos"]] if settings["add_eos"] else []
    lengths: list[int] = []
    kept_sizes: list[int] = []
    for texts, sizes in _batches(documents, digest):
        stretches = [list(_stretches(text)) for text in texts]
        encoded = iter(tokenizer.encode_batch(list(itertools.chain.from_iterable(stretches))))
        batch = []
        for size, parts in zip(sizes, stretches):
            ids = [*before, *itertools.chain.from_iterable(itertools.islice(encoded, len(parts))), *after]
            if len(ids) >= 2:
                batch.append(ids)
                lengths.append(len(ids))
                kept_sizes.append(size)
        count = sum(map(len, batch))
        np.fromiter(itertools.chain.from_iterable(batch), dtype, count).tofile(out)
        if advance is not None:
            advance(sum(sizes))
    return np.asarray(lengths, dtype=np.int64), np.asarray(kept_sizes, dtype=np.int64)


def _batches(documents: Iterable[Document], digest: _Digest) -> Iterator[tuple[list[str], list[int]]]:
    texts: list[str] = []
    sizes: list[int] = []
    limit = digest.bytes + _BATCH_BYTES
    for document in documents:
        sizes.append(digest.add(document))
        texts.append(document.text)
        if digest.bytes >= limit:
            yield texts, sizes
            texts, sizes, limit = [], [], digest.bytes + _BATCH_BYTES
    if texts:
        yield texts, sizes


def _stretches(text: str) -> Iterator[str]:
    """The text in parts that any tokenizer encodes in bounded memory, cut before a line where possible."""
    start = 0
    while len(text) - start > _STRETCH:
        line = text.rfind("\n", start, start + _STRETCH) + 1
        end = line if line > start else start + _STRETCH
        yield text[start:end]
        start = end
    yield text[start:] if start else text


def _permute(
    arrival: Path, dtype: np.dtype, lengths: np.ndarray, order: np.ndarray, out: BinaryIO, content: Any
) -> None:
    """Appends the documents of `arrival` to `out` in `order`, and to the hash `content`."""
    tokens = np.asarray(np.memmap(arrival, dtype=dtype, mode="r"))
    starts = np.cumsum(lengths) - lengths
    for part in np.array_split(order, max(1, len(tokens) // (1 << 22))):
        block = np.concatenate([tokens[starts[d] : starts[d] + lengths[d]] for d in part])
        block.tofile(out)
        content.update(block.tobytes())


@contextmanager
def _bar(total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar over bytes of text; gives the function that advances it."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("tokenizing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("tokenizing", total=total)
        yield lambda size: progress.advance(task, size)
