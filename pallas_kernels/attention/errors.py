"""Errors of this package. Each names the argument, what was found, and what was expected."""

from pallas_kernels.target import KernelError


class AttentionError(KernelError):
    """Arguments that do not make sense together: shapes that disagree, lengths of zero, unknown names."""


class UnsupportedError(AttentionError):
    """A forced implementation cannot do what is asked; the message says why."""
