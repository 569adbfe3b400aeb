"""One runnable module per paper, the main jobs (pretrain, finetune, generate, evaluate) and benchmarks.

`python -m experiments list` shows them all. Nothing in here is imported by `jaxlm`.
"""

import sys

if sys.argv[:1] == ["-m"]:  # `python -m experiments....` is starting, and JAX is not imported yet
    from experiments import launch

    launch.prepare()
