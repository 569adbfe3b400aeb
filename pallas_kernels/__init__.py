"""Pallas kernels for TPUs and GPUs, each with a plain JAX reference and a dispatcher. Needs `jax` and `numpy` alone."""
