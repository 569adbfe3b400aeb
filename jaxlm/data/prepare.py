"""From a `DataConfig` to a tokenizer and two token stores, all cached by their inputs."""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jaxlm.core.configs import fingerprint
from jaxlm.core.errors import ConfigError, DataError, nearest
from jaxlm.data.cache import atomic_folder, cache_folder
from jaxlm.data.corpora import LIBRARY_PARTS, hash_fraction, standard_library, standard_library_files
from jaxlm.data.mixture import check_weights, epoch_cap, temperature
from jaxlm.data.pipeline import Unit
from jaxlm.data.sources import Document, huggingface_documents, list_files, read_documents
from jaxlm.data.store import FORMAT, TokenStore, build_store, open_store
from jaxlm.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer, train_sentencepiece
from jaxlm.data.watch import TIMEOUT, watched

Documents = Callable[[], Iterator[Document]]
# Of the hash that holds documents out: never the run's seed, so that all runs are judged on the same text.
_SALT = "validation"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to train on. Without `path` and `hf`: the Python standard library's own source."""

    path: tuple[str, ...] = ()
    """Files, folders or globs, each one source: .txt, .md, .py, .jsonl (also .gz), .parquet, ArrayRecord."""
    hf: str | None = None
    """One more source: a Hugging Face data set (needs `pip install 'jaxlm[hf]'`), or a folder with one."""
    hf_subset: str | None = None
    """Configuration of that data set, where it has several."""
    hf_split: str = "train"
    """Split of that data set."""
    hf_documents: int = 100_000
    """Documents of it to fetch (in its order) and keep in the cache."""
    text_field: str = "text"
    """Field with the text, in JSON lines, Parquet and data sets."""
    weights: tuple[float, ...] = ()
    """Mixture weight of each source, `path` in order and then `hf`. Empty: in proportion to their sizes."""
    unit: Unit = "tokens"
    """What the weights count: shares of the tokens, or of the documents."""
    temperature: float = 1.0
    """Flattens the weights to weight ** (1 / temperature); large values approach equal shares."""
    max_epochs: float | None = None
    """Repeats no source more often than this; the others take its share. None: no limit."""
    tokenizer: str = "sentencepiece"
    """'sentencepiece' (trained on the training split), 'byte', or the path of a saved tokenizer."""
    vocab_size: int = 4096
    """Vocabulary of a tokenizer that is trained here."""
    sequence_length: int = 256
    """Tokens predicted in a row."""
    validation_fraction: float = 0.05
    """Share of each source that is held out: documents by a hash of their name, or, where a source has fewer
    than 1 / fraction of them, the end of each."""
    timeout: float = TIMEOUT
    """Seconds that a source may take for its next document or batch, before the run stops with its name; 0: none."""
    library: str = "source"
    """Of the standard library: its `source`, or the `code`, `docstrings` or `instructions` alone
    (`jaxlm.data.corpora.standard_library`)."""

    def __post_init__(self):
        if not self.timeout >= 0:
            raise ConfigError(f"timeout is {self.timeout}, expected seconds, or 0 for no limit")
        if not 0 < self.validation_fraction < 1:
            raise ConfigError(f"validation_fraction is {self.validation_fraction}, expected between 0 and 1")
        if self.hf_documents < 1:
            raise ConfigError(f"hf_documents is {self.hf_documents}, expected 1 or more")
        if self.sequence_length < 1:
            raise ConfigError(f"sequence_length is {self.sequence_length}, expected 1 or more")
        if self.max_epochs is not None and not self.max_epochs > 0:
            raise ConfigError(f"max_epochs is {self.max_epochs}, expected above 0")
        if self.library not in LIBRARY_PARTS:
            raise ConfigError(f"library is '{self.library}': {nearest(self.library, LIBRARY_PARTS)}")
        if self.library != "source" and (self.path or self.hf):
            raise ConfigError(f"library '{self.library}' is a part of the standard library: leave path and hf out")
        if self.weights:
            check_weights(self.weights, source_names(self))


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What `prepare_data` made."""

    tokenizer: Tokenizer
    train: TokenStore
    validation: TokenStore

    @property
    def source_names(self) -> tuple[str, ...]:
        """The sources, in the order of the configuration; the same in both stores."""
        return self.train.source_names


def prepare_data(
    config: DataConfig, cache: str | Path | None = None, *, seed: int = 0, progress: bool = True
) -> Prepared:
    """Trains or loads the tokenizer and builds or opens the stores.

    Everything is kept in `cache`, keyed by the configuration and by the name, size and time of each file. A
    second start only opens files; after an interrupted one, the parts that were finished are kept.

    Args:
      config: of the data.
      cache: folder for what is derived; default as in `jaxlm.data.cache`.
      seed: of the order of documents in the stores. Rows are shuffled at reading with the run's own seed, so
        this one need not change with it.
      progress: shows bars on the terminal.

    Raises:
      DataError, ConfigError: as the readers, tokenizers and stores do, each by name.
    """
    cache = cache_folder(cache)
    names = source_names(config)
    given = _given_tokenizer(config)
    sources, inputs, size = _sources(config, names, _fetch(config, cache, progress))
    kind = given.fingerprint if given else [config.tokenizer, config.vocab_size]
    key = fingerprint([FORMAT, inputs, kind, config.text_field, config.validation_fraction, seed])
    folder = cache / "corpora" / f"{names[0][:40]}-{key}"
    if (folder / "train").exists() and (folder / "validation").exists():
        tokenizer = load_tokenizer(folder / "tokenizer")
        return Prepared(
            tokenizer, open_store(folder / "train", tokenizer), open_store(folder / "validation", tokenizer)
        )

    splits = {
        name: _split(documents, config.validation_fraction, name) for name, documents in sources.items()
    }
    if not (folder / "tokenizer").exists():
        texts = (document.text for train, _ in splits.values() for document in train())
        tokenizer = given or train_sentencepiece(texts, config.vocab_size, cache=cache)
        with atomic_folder(folder / "tokenizer") as temporary:
            tokenizer.save(temporary)
    tokenizer = load_tokenizer(folder / "tokenizer")

    def store(side: str, index: int, share: float) -> TokenStore:
        if (folder / side).exists():
            return open_store(folder / side, tokenizer)
        documents = {name: split[index]() for name, split in splits.items()}
        total = None if size is None else int(size * share)
        return build_store(
            folder / side, documents, tokenizer, seed=seed, progress=progress, total_bytes=total
        )

    held_out = config.validation_fraction
    return Prepared(tokenizer, store("train", 0, 1 - held_out), store("validation", 1, held_out))


def prepare_evaluation(
    config: DataConfig, tokenizer: Tokenizer, cache: str | Path | None = None, *, progress: bool = True
) -> TokenStore:
    """A store of all documents of the configuration, none held out, for a tokenizer that exists already."""
    cache = cache_folder(cache)
    names = source_names(config)
    sources, inputs, size = _sources(config, names, _fetch(config, cache, progress))
    key = fingerprint([FORMAT, inputs, tokenizer.fingerprint, config.text_field])
    folder = cache / "corpora" / f"{names[0][:40]}-{key}" / "whole"
    if folder.exists():
        return open_store(folder, tokenizer)
    documents = {name: read() for name, read in sources.items()}
    return build_store(folder, documents, tokenizer, seed=0, progress=progress, total_bytes=size)


def source_names(config: DataConfig) -> tuple[str, ...]:
    """A name for each source of the configuration: the file or folder without its extension, made unique."""
    found = [_name(path) for path in config.path]
    if config.hf:
        found.append(config.hf.strip("/").split("/")[-1])
    names: list[str] = []
    part = "" if config.library == "source" else f"_{config.library}"
    for name in found or [f"standard_library{part}"]:
        candidates = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
        names.append(next(c for c in candidates if c not in names))
    return tuple(names)


def mixture_weights(
    config: DataConfig, store: TokenStore, budget_tokens: float | None = None
) -> tuple[float, ...]:
    """The shares of the sources, in `config.unit`, after temperature and the limit on epochs.

    Args:
      config: of the data.
      store: to train on.
      budget_tokens: tokens that the run will predict; needed for `config.max_epochs`.
    """
    sizes = store.source_pairs if config.unit == "tokens" else store.source_documents
    shares = check_weights(config.weights or sizes.tolist(), store.source_names)
    shares = temperature(shares, config.temperature)
    if config.max_epochs is not None:
        if budget_tokens is None:
            raise ConfigError("max_epochs needs the number of tokens that the run will predict")
        per_unit = store.source_pairs / sizes
        tokens = epoch_cap(shares * per_unit, store.source_pairs, budget_tokens, config.max_epochs)
        shares = tokens / per_unit
    return tuple((shares / shares.sum()).tolist())


def _name(path: str) -> str:
    fixed = [part for part in Path(path).parts if not set(part) & set("*?[")]
    last = Path(*fixed).resolve().name if fixed else Path.cwd().name
    return last.split(".")[0] or "text"


def _given_tokenizer(config: DataConfig) -> Tokenizer | None:
    if config.tokenizer == "byte":
        return ByteTokenizer()
    if config.tokenizer == "sentencepiece":
        return None
    if not Path(config.tokenizer).exists():
        raise ConfigError(
            f"tokenizer is {config.tokenizer!r}, expected 'sentencepiece', 'byte' or the path of one"
        )
    return load_tokenizer(config.tokenizer)


def _sources(
    config: DataConfig, names: Sequence[str], fetched: Path | None
) -> tuple[dict[str, Documents], Any, int | None]:
    """How to read each source, what identifies the inputs, and about how many bytes they are."""
    readers: list[Documents] = []
    files: list[list[tuple[Path, str]]] = []
    for path in config.path:
        readers.append(partial(read_documents, path, config.text_field))
        files.append(list_files(path))
    if fetched is not None:
        readers.append(partial(read_documents, fetched))
        files.append([(fetched, config.hf)])
    elif config.hf:
        options = {"split": config.hf_split, "text_field": config.text_field}
        readers.append(partial(huggingface_documents, config.hf, **options))
        folder = Path(config.hf)
        files.append(
            [(p, p.relative_to(folder).as_posix()) for p in sorted(folder.rglob("*")) if p.is_file()]
        )
    if not readers:
        readers.append(partial(standard_library, part=config.library))
        files.append(standard_library_files())
    inputs = [
        [[name, (stat := file.stat()).st_size, stat.st_mtime_ns] for file, name in of_source]
        for of_source in files
    ]
    plain = all(
        file.suffix in (".txt", ".md", ".py", ".jsonl") for of_source in files for file, _ in of_source
    )
    total = sum(size for of_source in inputs for _, size, _ in of_source) if plain else None
    limited = {
        name: partial(_watched, read, name, config.timeout) for name, read in zip(names, readers, strict=True)
    }
    part = [] if config.library == "source" else [config.library]
    return limited, [names, inputs, config.hf_split, *part], total


def _watched(read: Documents, name: str, timeout: float) -> Iterator[Document]:
    return watched(read(), name, timeout)


def _fetch(config: DataConfig, cache: Path, progress: bool) -> Path | None:
    """The first documents of a data set on the hub as a local file of JSON lines, fetched once."""
    if config.hf is None or Path(config.hf).is_dir():
        return None
    chosen = [config.hf, config.hf_subset, config.hf_split, config.hf_documents, config.text_field]
    folder = cache / "hub" / fingerprint(chosen)
    if not folder.exists():
        from rich.progress import track

        documents = huggingface_documents(
            config.hf, split=config.hf_split, subset=config.hf_subset, text_field=config.text_field
        )
        with (
            atomic_folder(folder) as temporary,
            open(temporary / "documents.jsonl", "w", encoding="utf-8") as out,
        ):
            numbers = track(range(config.hf_documents), f"fetching {config.hf}", disable=not progress)
            for _, document in zip(numbers, watched(documents, config.hf, config.timeout)):
                out.write(json.dumps({"text": document.text}) + "\n")
    return folder / "documents.jsonl"


def _split(documents: Documents, fraction: float, source: str) -> tuple[Documents, Documents]:
    """Training and validation documents of a source; each side reads the source anew.

    By hash of the name where there are enough documents; a source with few is cut inside each document, since
    a hash could put all of its text on one side.
    """
    enough = math.ceil(10 / fraction)
    first = [document.name for _, document in zip(range(enough), documents())]
    if len(first) < 1 / fraction:
        return partial(_ends, documents, fraction, source, 0), partial(_ends, documents, fraction, source, 1)
    # A side expected to get 10 documents or more is not missed; of fewer, the lowest is taken in any case.
    lowest = min(hash_fraction(name, _SALT) for name in first) if len(first) < enough else 0.0
    limit = max(fraction, math.nextafter(lowest, 1))
    return partial(_side, documents, limit, 0), partial(_side, documents, limit, 1)


def _side(documents: Documents, limit: float, side: int) -> Iterator[Document]:
    return (d for d in documents() if (hash_fraction(d.name, _SALT) < limit) == bool(side))


def _ends(documents: Documents, fraction: float, source: str, side: int) -> Iterator[Document]:
    empty = True
    for text, name in documents():
        at = int(len(text) * (1 - fraction))
        # After a line, if one ends shortly before.
        cut = text.rfind("\n", int(0.9 * at), at) + 1 or at
        part = (text[:cut], text[cut:])[side]
        if part:
            empty = False
            yield Document(part, f"{name}#{'validation' if side else 'train'}")
    if empty:
        raise DataError(f"source '{source}' has too little text to hold out {fraction} of it")
