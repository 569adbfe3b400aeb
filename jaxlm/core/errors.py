"""The errors that bad input raises. Each says what was found, where, and what was expected."""

import difflib
from collections.abc import Iterable
from typing import Any


class JaxlmError(Exception):
    """Base class of every error that jaxlm raises on purpose."""


class ConfigError(JaxlmError, ValueError):
    """A configuration that cannot work: an unknown name, a bad value, sizes that do not fit together."""


class DataError(JaxlmError, ValueError):
    """Input text or a stored data set that cannot be used; names the file and the line or offset."""


class CheckpointError(JaxlmError, RuntimeError):
    """A checkpoint or run folder that is missing, damaged, or belongs to another configuration."""


class NonFiniteError(JaxlmError, FloatingPointError):
    """A loss or gradient became NaN or infinite; names the step."""


class ProcessLostError(JaxlmError, RuntimeError):
    """Another process of a run on several hosts has ended or cannot be reached; the same command resumes."""


def nearest(name: str, options: Iterable[str]) -> str:
    """A sentence that lists the options, the nearest first: `"did you mean 'x'? (valid: x, y)"`."""
    options = [str(o) for o in options]
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.4)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}(valid: {', '.join(sorted(options))})"


def shown(value: Any) -> str:
    """A value as a message has it: 60 characters of its `repr` at most."""
    if isinstance(value, int) and abs(value) >= 1 << 4096:
        return "an integer of thousands of digits"  # which Python does not print
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
