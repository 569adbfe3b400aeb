"""Documents from files: text, JSON lines, Parquet, ArrayRecord, and Hugging Face data sets.

Every reader yields documents in a fixed order, and every error names the file and the place in it.
"""

import contextlib
import glob
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from jaxlm.core.errors import ConfigError, DataError
from jaxlm.core.json_files import read_object

_MAX_DOCUMENT = 1 << 30


class Document(NamedTuple):
    """A text, and a name that says where it came from and does not change when the corpus is moved."""

    text: str
    name: str


def read_documents(path: str | Path, text_field: str = "text") -> Iterator[Document]:
    """The documents of a file, of a folder (recursively, in order of path), or of the files a glob matches.

    A `.txt`, `.md` or `.py` file is one document, byte for byte; `.jsonl` holds one per line (an object),
    `.parquet` one per row, `.array_record` and `.arecord` one per record (UTF-8 text, or a JSON object).
    `.txt` and `.jsonl` may be gzipped. Names are paths relative to the folder (or to the fixed part of the
    glob), with `:n` for the n-th line, row or record, from 1.

    Raises:
      DataError: nothing at the path, no document with text, an unknown file name extension, a file that is
        not UTF-8, truncated gzip, malformed JSON, or a record without `text_field`.
    """
    empty = True
    for file, name in list_files(path):
        for document in _reader(file)(file, name, text_field):
            empty = empty and not document.text
            yield document
    if empty:
        raise DataError(f"the corpus {path} is empty: no document has any text")


def huggingface_documents(
    name: str,
    *,
    split: str = "train",
    subset: str | None = None,
    text_field: str = "text",
    data_files: str | list[str] | None = None,
) -> Iterator[Document]:
    """The documents of a Hugging Face data set, streamed; needs the extra `jaxlm[hf]`.

    Args:
      name: of a data set on the hub, or a local folder: one that `save_to_disk` wrote, or files as a data set
        repository holds them (those with the split's name in their path, where any has). Local folders are
        read without the extra.
      split: such as "train".
      subset: the configuration of the data set, where it has several.
      data_files: files of the data set to read instead of its split's.
    """
    if Path(name).is_dir():
        yield from _local_data_set(Path(name), split, text_field)
        return
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ConfigError(
            f"reading the data set '{name}' needs the package 'datasets': pip install 'jaxlm[hf]'"
        ) from error
    # Loading scripts are code from the data set's author; trust_remote_code stays at its default, False.
    rows = load_dataset(name, subset, split=split, data_files=data_files, streaming=True)
    index = 0
    for index, row in enumerate(rows, 1):
        yield Document(_field(row, text_field, f"{name} [{split}] row {index}"), f"{name}/{split}:{index}")
    if not index:
        raise DataError(f"the data set '{name}' has no rows in split '{split}'")


def list_files(path: str | Path) -> list[tuple[Path, str]]:
    """The files that `read_documents(path)` reads, each with its name; `DataError` if there is none."""
    path = Path(path)
    if path.is_file():
        found, root = [path], path.parent
    elif path.is_dir():
        inside = [p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path))]
        found, root = [p for p in inside if _extension(p)], path
        if not found:
            raise DataError(f"no text in the folder {path}: no file ends in one of {_known()}")
    elif glob.has_magic(str(path)):
        fixed = [i for i, part in enumerate(path.parts) if glob.has_magic(part)][0]
        root = Path(*path.parts[:fixed])
        found = [Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()]
        if not found:
            raise DataError(f"no file matches {path}")
    else:
        raise DataError(f"no such file or folder: {path}")
    named = sorted((p.relative_to(root).as_posix(), p) for p in found)
    for _, file in named:
        _reader(file)
    return [(file, name) for name, file in named]


def json_lines(file: Path) -> Iterator[tuple[int, Any]]:
    """The values of a `.jsonl` or `.jsonl.gz` file with their line numbers, from 1; blank lines are skipped.

    Raises `DataError` for a line that is not UTF-8 or not JSON, and for truncated gzip.
    """
    offset = 0
    with _open(file) as stream:
        for number, line in enumerate(_lines(stream, file), 1):
            text = _decode(line, file, offset)
            offset += len(line)
            if number == 1:
                text = text.removeprefix("\ufeff")
            if not text.strip():
                continue
            try:
                value = json.loads(text)
            except (ValueError, RecursionError) as error:  # ValueError: integers of thousands of digits, too
                at = f" at column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else ""
                raise DataError(f"{file} line {number}: malformed JSON{at}") from error
            yield number, value


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


Reader = Callable[[Path, str, str], Iterator[Document]]


def _reader(file: Path) -> Reader:
    extension = _extension(file)
    if extension is None:
        raise DataError(f"{file}: unknown kind of file, expected one that ends in {_known()}")
    return _READERS[extension]


def _extension(file: Path) -> str | None:
    # Longest first, so that .jsonl.gz is not taken for a .gz of something else.
    return next((e for e in sorted(_READERS, key=len, reverse=True) if file.name.lower().endswith(e)), None)


def _known() -> str:
    return ", ".join(_READERS)


def _read_text(file: Path, name: str, text_field: str) -> Iterator[Document]:
    with _open(file) as stream:
        text, size = [], 0
        for block in _blocks(stream, file):
            text.append(block)
            size += len(block)
            _check_size(size, file)
        yield Document(_decode(b"".join(text), file, 0), name)


def _read_json_lines(file: Path, name: str, text_field: str) -> Iterator[Document]:
    for number, row in json_lines(file):
        yield Document(_field(row, text_field, f"{file} line {number}"), f"{name}:{number}")


def _read_parquet(file: Path, name: str, text_field: str) -> Iterator[Document]:
    pyarrow = _pyarrow(file)
    from pyarrow import parquet

    with _arrow_errors(file, pyarrow, "a Parquet file"), parquet.ParquetFile(file) as table:
        _require_column(file, text_field, table.schema_arrow.names)
        batches = table.iter_batches(batch_size=256, columns=[text_field])
        yield from _column_documents(batches, file, name, text_field)


def _read_arrow_stream(file: Path, name: str, text_field: str) -> Iterator[Document]:
    pyarrow = _pyarrow(file)
    with _arrow_errors(file, pyarrow, "an Arrow stream"), pyarrow.OSFile(str(file)) as source:
        stream = pyarrow.ipc.open_stream(source)
        _require_column(file, text_field, stream.schema.names)
        yield from _column_documents(stream, file, name, text_field)


@contextlib.contextmanager
def _arrow_errors(file: Path, pyarrow: Any, kind: str) -> Iterator[None]:
    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not {kind}, or a truncated one: {error}") from error


def _require_column(file: Path, text_field: str, columns: list[str]) -> None:
    if text_field not in columns:
        raise DataError(f"{file}: no field '{text_field}' (fields present: {', '.join(columns)})")


def _column_documents(batches: Iterable, file: Path, name: str, text_field: str) -> Iterator[Document]:
    number = 0
    for batch in batches:
        for text in batch.column(text_field).to_pylist():
            number += 1
            yield Document(_text(text, text_field, f"{file} row {number}"), f"{name}:{number}")


def _read_array_record(file: Path, name: str, text_field: str) -> Iterator[Document]:
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(file))
    if not reader.ok():
        raise DataError(f"{file}: not an ArrayRecord file, or a truncated one")
    count = reader.num_records()
    try:
        for start in range(0, count, 256):
            try:
                records = reader.read(start, min(start + 256, count))
            except RuntimeError as error:
                raise DataError(f"{file}: damaged in records {start + 1} and on: {error}") from error
            for number, record in enumerate(records, start + 1):
                where = f"{file} record {number}"
                text = _decode(record, where, 0)
                row = _json_object(text)
                yield Document(text if row is None else _field(row, text_field, where), f"{name}:{number}")
    finally:
        reader.close()


def _json_object(text: str) -> dict | None:
    if not text.lstrip().startswith("{"):
        return None
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


_READERS: dict[str, Reader] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".py": _read_text,
    ".txt.gz": _read_text,
    ".jsonl": _read_json_lines,
    ".jsonl.gz": _read_json_lines,
    ".parquet": _read_parquet,
    ".array_record": _read_array_record,
    ".arecord": _read_array_record,
}


def _local_data_set(folder: Path, split: str, text_field: str) -> Iterator[Document]:
    if (folder / "dataset_dict.json").exists():
        splits = read_object(folder / "dataset_dict.json").get("splits")
        shown = ", ".join(map(str, splits)) if isinstance(splits, list) else splits
        if not isinstance(splits, list) or split not in splits:
            raise DataError(f"{folder} has no split '{split}' (splits: {shown})")
        folder = folder / _inside(split, folder / "dataset_dict.json")
    if (folder / "state.json").exists():
        files = read_object(folder / "state.json").get("_data_files")
        if not isinstance(files, list) or not all(isinstance(f, dict) for f in files):
            raise DataError(f"{folder / 'state.json'}: no list '_data_files' of files")
        for name in [_inside(f.get("filename"), folder / "state.json") for f in files]:
            yield from _read_arrow_stream(folder / name, name, text_field)
        return
    files = list_files(folder)
    of_split = [(file, name) for file, name in files if split in name]
    for file, name in of_split or files:
        yield from _reader(file)(file, name, text_field)


def _inside(name: Any, where: Path) -> str:
    """The name of a file or folder beside `where`, which says it: nothing that leads elsewhere."""
    if (
        not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\")
        or not name.isprintable() or len(name.encode()) > 255
    ):  # fmt: skip
        raise DataError(f"{where} names {name!r}, expected a file in its folder")
    return name


def _field(row: Any, text_field: str, where: str) -> str:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with a field '{text_field}', got {type(row).__name__}")
    if text_field not in row:
        raise DataError(f"{where}: no field '{text_field}' (fields present: {', '.join(row) or 'none'})")
    return _text(row[text_field], text_field, where)


def _text(value: Any, text_field: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: field '{text_field}' holds {type(value).__name__}, expected text")
    return value


def _decode(raw: bytes, where: Path | str, offset: int) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise DataError(f"{where}: not UTF-8: byte 0x{raw[error.start]:02X} at offset {at}") from error


def _open(file: Path) -> BinaryIO:
    return gzip.open(file) if file.name.lower().endswith(".gz") else open(file, "rb")


def _blocks(stream: BinaryIO, file: Path) -> Iterator[bytes]:
    """The stream in blocks; a gzip that breaks off or is damaged is an error with the offset reached."""
    done = 0
    while True:
        try:
            block = stream.read(1 << 16)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(
                f"{file}: truncated or damaged gzip of {file.stat().st_size} bytes, "
                f"after {done} uncompressed bytes: {error}"
            ) from error
        if not block:
            return
        done += len(block)
        yield block


def _check_size(size: int, file: Path) -> None:
    # A gzip can stand for a thousand times its size.
    if size > _MAX_DOCUMENT:
        raise DataError(f"{file}: a document of more than {_MAX_DOCUMENT:,} bytes: cut it into several")


def _lines(stream: BinaryIO, file: Path) -> Iterator[bytes]:
    pending = io.BytesIO()
    for block in _blocks(stream, file):
        *lines, rest = block.split(b"\n")
        for line in lines:
            pending.write(line + b"\n")
            yield pending.getvalue()
            pending = io.BytesIO()
        pending.write(rest)
        _check_size(pending.tell(), file)
    if pending.tell():
        yield pending.getvalue()


def _pyarrow(file: Path) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise ConfigError(f"reading {file} needs the package 'pyarrow': pip install 'jaxlm[parquet]'") from error
    import pyarrow.ipc

    return pyarrow
