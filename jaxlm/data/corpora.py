"""A corpus that every machine has, and a split that does not move when documents are added."""

import ast
import functools
import hashlib
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from jaxlm.core.errors import ConfigError, DataError, nearest
from jaxlm.data.sources import Document

_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}
_TESTS = {"test", "tests", "idle_test"}
LIBRARY_PARTS = ("source", "code", "docstrings", "instructions")


def standard_library(include_tests: bool = False, part: str = "source") -> Iterator[Document]:
    """The source of the running interpreter's own standard library, or a part of it, in order of path.

    About 12 MB in 730 files without tests, 31 MB in 1,800 with them (Python 3.11). Files that are not UTF-8
    are left out (the library tests its handling of other encodings with such files).

    Three parts make two kinds of text, and questions with answers, out of one: `code` is the source without the
    lines of its docstrings, `docstrings` are those (English prose), `instructions` ask for each documented function
    what it does, and answer with the first paragraph of its docstring. Every part of a file has the file's name, so
    a split by name never puts one part on one side and another on the other. A file without the part has no document.
    """
    if part not in LIBRARY_PARTS:
        raise ConfigError(f"no part '{part}' of the standard library: {nearest(part, LIBRARY_PARTS)}")
    for file, name in standard_library_files(include_tests):
        try:
            text = file.read_bytes().decode()
        except UnicodeDecodeError:
            continue
        if part != "source":
            text = _part(text, _documentation(file), part)
        if text or part == "source":
            yield Document(text, name)


def standard_library_files(include_tests: bool = False) -> list[tuple[Path, str]]:
    """The files of `standard_library`, each with its path relative to the library."""
    root = Path(sysconfig.get_path("stdlib"))
    unwanted = _NOT_LIBRARY if include_tests else _NOT_LIBRARY | _TESTS
    relative = (file.relative_to(root) for file in root.rglob("*.py"))
    names = sorted(path.as_posix() for path in relative if not unwanted & set(path.parts))
    if not names:
        raise DataError(f"Python {sys.version.split()[0]} keeps no source of its standard library in {root}")
    return [(root / name, name) for name in names]


def hash_fraction(name: str, salt: str | int = "") -> float:
    """A number in [0, 1), uniform over names and fixed for each."""
    digest = hashlib.sha256(f"{salt}\0{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_by_hash(
    documents: Iterable[Document], fraction: float, salt: str | int = ""
) -> tuple[list[Document], list[Document]]:
    """Training and validation documents; the share `fraction` of the names goes to validation.

    A document's side depends on its name and the salt alone, so other documents may come and go.
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"validation fraction is {fraction}, expected 0 <= fraction < 1")
    sides: tuple[list[Document], list[Document]] = ([], [])
    for document in documents:
        sides[hash_fraction(document.name, salt) < fraction].append(document)
    return sides


class _Documented(NamedTuple):
    """A docstring, its lines (from 1, the last one included) where they hold nothing else, and the signature of the
    function that it documents (empty: a module or class)."""

    text: str
    lines: tuple[int, int] | None
    signature: str


@functools.lru_cache(maxsize=4096)
def _documentation(file: Path) -> tuple[_Documented, ...]:
    source = file.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in string literals
        try:
            tree = ast.parse(source)
        except SyntaxError:  # the library has files for other versions of Python, to test its own tools
            return ()
    lines, found = source.splitlines(), []
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        text = ast.get_docstring(node)
        if not text:
            continue
        at = node.body[0]
        alone = not lines[at.lineno - 1][: at.col_offset].strip() and not lines[at.end_lineno - 1][
            at.end_col_offset :
        ].strip()  # fmt: skip
        signature = ""
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            signature = f"{node.name}({ast.unparse(node.args)})"
        found.append(_Documented(text, (at.lineno, at.end_lineno) if alone else None, signature))
    return tuple(found)


def _part(source: str, documentation: tuple[_Documented, ...], part: str) -> str:
    if part == "code":
        lines = re.split(_LINE_END, source)
        for first, last in (d.lines for d in documentation if d.lines):
            lines[first - 1 : last] = [""] * (last - first + 1)
        return "".join(lines)
    if part == "docstrings":
        return "\n\n".join(d.text for d in documentation)
    return "\n".join(
        f"Question: what does {d.signature} do?\nAnswer: {' '.join(d.text.split(_PARAGRAPH)[0].split())}\n"
        for d in documentation
        if d.signature
    )


_PARAGRAPH = "\n\n"
_LINE_END = re.compile(r"(?<=\n)|(?<=\r)(?!\n)")
"""As Python counts lines: `str.splitlines` also ends them at form feeds, which sources have."""
