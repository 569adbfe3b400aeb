"""What can be run, read from the modules' source without importing them: area, slug and the one-line claim.

An experiment is a module here, or in the folder of its area, that ends with `if __name__ == "__main__":`.
The first line of its docstring is what the list shows.
"""

import ast
import dataclasses
import difflib
from pathlib import Path

HOME = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Entry:
    """One runnable module: `python -m {module}`. `area` is empty for the main jobs."""

    area: str
    slug: str
    claim: str

    @property
    def name(self) -> str:
        """How the module is named below `experiments`: `"optimization.scale"`."""
        return f"{self.area}.{self.slug}" if self.area else self.slug

    @property
    def module(self) -> str:
        return f"experiments.{self.name}"


def entries(home: Path = HOME) -> list[Entry]:
    """Every runnable module, the main jobs first, then by area and slug."""
    found = []
    for path in sorted([*home.glob("*.py"), *home.glob("*/*.py")]):
        if path.name.startswith("_"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        if any(map(_is_main_block, tree.body)):
            area = "" if path.parent == home else path.parent.name
            claim = (ast.get_docstring(tree) or "(no docstring)").splitlines()[0]
            found.append(Entry(area, path.stem, claim))
    return sorted(found, key=lambda entry: (entry.area, entry.slug))


def unknown(module: str, home: Path = HOME) -> str:
    """What to say about a module that does not exist, with those that were probably meant."""
    known = entries(home)
    name = module.removeprefix("experiments.")
    in_area = [entry.module for entry in known if entry.area == name]
    if in_area:
        return f"'{module}' is an area, with {', '.join(in_area)}"
    slug = name.rsplit(".", 1)[-1]
    slugs = difflib.get_close_matches(slug, {entry.slug for entry in known}, n=3, cutoff=0.6)
    near = [entry.module for close in slugs for entry in known if entry.slug == close]
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"no experiment '{module}': {hint}(all of them: python -m experiments list)"


def _is_main_block(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).replace('"', "'") == "__name__ == '__main__'"
