"""python -m experiments list | gallery

list      shows every experiment: area, name and claim
gallery   writes experiments/README.md from experiments/results/*.json

python -m experiments.<area>.<name> --help   shows the options of one experiment
python -m experiments.<area>.<name>          runs it (preset `small`: minutes on two CPU cores)
"""

import os
import shutil
import sys
import textwrap
from collections.abc import Sequence

from jaxlm.core.errors import JaxlmError, nearest


def main(argv: Sequence[str]) -> int:
    """Runs one command; returns the exit code."""
    commands = {"list": show_list, "gallery": write_gallery}
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(__doc__.strip())
        return 0
    name, *rest = argv
    if name not in commands:
        from experiments import catalog

        if any(name in (entry.slug, entry.name, entry.module) for entry in catalog.entries()):
            hint = next(e.module for e in catalog.entries() if name in (e.slug, e.name, e.module))
            return fail(f"'{name}' is an experiment: run it with python -m {hint}")
        return fail(f"no command '{name}': {nearest(name, commands)}")
    if rest:
        return fail(f"'{name}' takes no more words, but got: {' '.join(rest)}")
    try:
        commands[name]()
        sys.stdout.flush()
    except JaxlmError as error:
        return fail(str(error))
    except BrokenPipeError:  # `list | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def show_list() -> None:
    """Prints every experiment by area, with the first line of its docstring."""
    from experiments import catalog

    known = catalog.entries()
    width = max((len(entry.slug) for entry in known), default=0) + 2
    columns = max(60, min(shutil.get_terminal_size().columns, 140))
    area = None
    for entry in known:
        if entry.area != area:
            print("" if area is None else "\n", end="")
            area = entry.area
            print(f"{area or 'main jobs'}   python -m experiments.{area + '.' if area else ''}<name>")
        print(
            textwrap.fill(
                f"{entry.slug:<{width}}{entry.claim}",
                columns,
                initial_indent="  ",
                subsequent_indent=" " * (width + 2),
            )
        )
    if not known:
        print("no experiments yet")


def write_gallery() -> None:
    """Writes the table of claims."""
    from experiments import gallery

    print(gallery.write())


def fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
