#!/usr/bin/env bash
# Makes an environment (4.5 GB, no GPU needed) that compiles programs for GPUs which are not here, and says how to use it:
#     tests/pallas_kernels/make_cuda_environment.sh FOLDER [JAX_VERSION]
set -euo pipefail
folder=${1:?usage: make_cuda_environment.sh FOLDER [JAX_VERSION]}
version=${2:+==$2}
"${PYTHON:-python3.11}" -m venv "$folder"
root=$(cd "$(dirname "$0")/../.." && pwd)
"$folder/bin/pip" install --quiet "jax[cuda13]$version" absl-py "$root[test]"
libraries=$(printf '%s:' "$folder"/lib/python*/site-packages/nvidia/*/lib)
echo "JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 JAX_PLATFORMS=cpu LD_LIBRARY_PATH=$libraries \\"
echo "  $folder/bin/python -m pytest -m gpu_aot -n 0 tests/experiments/test_plan.py tests/pallas_kernels"
