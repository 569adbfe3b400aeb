"""Parts of the standard library: what is in one is not in the other, and files keep their names."""

import dataclasses

import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.data import corpora
from jaxlm.data.prepare import DataConfig, source_names

SOURCE = '''"""Module text.

More of it."""
import os  # kept

def add(a, b=1, *, c: int = 2):
    """Return the sum
    of both.

    Details.
    """
    return a + b

class Empty:
    "Class text."

def short(): "Inline."; return 1
'''


def test_lines_are_those_that_python_counts(tmp_path, monkeypatch):
    """A form feed between functions, and an old line end."""
    monkeypatch.setattr(corpora, "standard_library_files", lambda include_tests=False: [(tmp_path / "a.py", "a.py")])
    (tmp_path / "a.py").write_bytes('x = 1\n\x0c\ny = "\x85"\r\nclass A:\r    """Text."""\r    z = 3\n'.encode())
    (document,) = corpora.standard_library(part="code")
    assert document.text == 'x = 1\n\x0c\ny = "\x85"\r\nclass A:\r    z = 3\n'


@pytest.fixture
def library(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text(SOURCE)
    (tmp_path / "b.py").write_text("x = 1\n")
    (tmp_path / "c.py").write_text("print 'of another Python'\n")
    files = [(tmp_path / name, name) for name in ("a.py", "b.py", "c.py")]
    monkeypatch.setattr(corpora, "standard_library_files", lambda include_tests=False: files)


def test_parts(library):
    parts = {
        part: {d.name: d.text for d in corpora.standard_library(part=part)} for part in corpora.LIBRARY_PARTS
    }  # fmt: skip
    assert parts["source"]["a.py"] == SOURCE
    assert parts["code"] == {
        "a.py": "import os  # kept\n\ndef add(a, b=1, *, c: int = 2):\n    return a + b\n\nclass Empty:\n\n"
        'def short(): "Inline."; return 1\n',
        "b.py": "x = 1\n",
        "c.py": "print 'of another Python'\n",
    }
    docstrings = "Module text.\n\nMore of it.\n\nReturn the sum\nof both.\n\nDetails.\n\nClass text.\n\nInline."
    assert parts["docstrings"] == {"a.py": docstrings}
    assert parts["instructions"] == {
        "a.py": "Question: what does add(a, b=1, *, c: int=2) do?\nAnswer: Return the sum of both.\n\n"
        "Question: what does short() do?\nAnswer: Inline.\n"
    }


def test_parts_are_chosen_by_name():
    assert source_names(DataConfig(library="code")) == ("standard_library_code",)
    for wrong, said in (
        ({"library": "docstring"}, "did you mean 'docstrings'"),
        ({"library": "code", "path": ("x.txt",)}, "leave path and hf out"),
    ):
        with pytest.raises(ConfigError, match=said):
            dataclasses.replace(DataConfig(), **wrong)
    with pytest.raises(ConfigError, match="no part 'docs'"):
        list(corpora.standard_library(part="docs"))
