"""Text in, verdict out: running generated programs, extracting and comparing answers. Imports no JAX."""
