"""jaxlm: small language models in JAX, one composable part per published method.

Importing this package imports nothing heavy: reach for the part you need, as in
`from jaxlm.models import Decoder` or `from jaxlm.optim import warmup_stable_decay`.
"""

__version__ = "0.1.0"
