"""Precision policies: which number format is used where in a training step.

    policy = precision_policy("fp8_delayed")

A layer's product `y = x w` becomes three in training: forward (`x` and `w`, summed over the inputs), `dgrad`
(`dx = g w^T`, summed over the outputs) and `wgrad` (`dw = x^T g`, summed over the tokens). A policy says how each
operand of each is stored, and what the weights, the optimizer's state and what devices send each other are kept in.
Embeddings, head, norms, attention and the residual stream stay as the model has them, as in all published recipes.

Source of the grouping: Low-Precision Training of Large Language Models (Hao et al., 2025).
"""

import dataclasses

from jaxlm.core.errors import ConfigError, nearest
from jaxlm.core.formats import number_format
from jaxlm.core.scaled import NVFP4, PLAIN, ROUNDINGS, Quantizer, mx

IMPLEMENTATIONS = ("auto", "emulated", "native")
STORED = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Product:
    """The two operands of a product. `None`: as the forward product had it (the straight-through gradient).

    `hadamard`: both are first multiplied by the same random signs and a Hadamard matrix of this size along the summed
    axis. That leaves the product as it is and spreads outliers over a block.
    """

    lhs: Quantizer | None = PLAIN
    rhs: Quantizer | None = PLAIN
    hadamard: int | None = None

    def __post_init__(self):
        if self.hadamard is not None and (self.hadamard < 2 or self.hadamard & (self.hadamard - 1)):
            raise ConfigError(f"hadamard is {self.hadamard}, expected a power of two from 2")
        if self.hadamard and (self.lhs is None or self.rhs is None):
            raise ConfigError("hadamard transforms operands before they are rounded: neither may be the forward's")

    @property
    def operands(self) -> tuple[Quantizer, ...]:
        return tuple(q for q in (self.lhs, self.rhs) if q is not None)

    @property
    def is_plain(self) -> bool:
        return self.lhs == PLAIN and self.rhs == PLAIN and self.hadamard is None


@dataclasses.dataclass(frozen=True)
class PrecisionPolicy:
    """Formats of a training step.

    `forward`: `x` and `w`; `dgrad`: `g` and `w`; `wgrad`: `x` and `g`. `weights`: what products find the weights in;
    `master`: what updates are added to, float32 or `weights`' own format, where `rounding` then says how the sum is
    rounded. `optimizer_state`: of moments, between steps. `communication`: of gradients that devices add up.
    `loss_scaling`: the loss is multiplied by a factor that grows until something overflows (float16's narrow range).

    `implementation`: `native` products where the hardware multiplies a format (an error where it does not),
    `emulated` in wider ones everywhere, the values being the same; `auto` takes what is there.
    """

    name: str = "float32"
    forward: Product = Product()
    dgrad: Product = Product()
    wgrad: Product = Product()
    weights: str = "float32"
    master: str = "float32"
    rounding: str = "nearest"
    optimizer_state: str = "float32"
    communication: Quantizer | None = None
    loss_scaling: bool = False
    implementation: str = "auto"

    def __post_init__(self):
        for name in ("weights", "master"):
            value = getattr(self, name)
            if value not in STORED and not value.startswith("q"):
                raise ConfigError(f"{name} of a policy is '{value}', expected one of {STORED} or fixed point (q3.13)")
            number_format(value)
        if self.master not in ("float32", self.weights):
            raise ConfigError(f"master is '{self.master}': expected float32 or the weights' own '{self.weights}'")
        if self.optimizer_state not in ("float32", "bfloat16"):
            raise ConfigError(
                f"optimizer_state of a policy is '{self.optimizer_state}', expected float32 or bfloat16 "
                "(for 8 bits: optimizer adamw_8bit)"
            )
        for name, valid in (("rounding", ROUNDINGS), ("implementation", IMPLEMENTATIONS)):
            value = getattr(self, name)
            if value not in valid:
                raise ConfigError(f"{name} of a policy is '{value}': {nearest(value, valid)}")
        if None in (self.forward.lhs, self.forward.rhs):
            raise ConfigError("the forward product of a policy says how both its operands are stored")
        if self.forward.hadamard and None in (self.dgrad.rhs, self.wgrad.lhs):
            raise ConfigError("the forward product of a policy rotates its operands: backward ones store their own")
        if None in (self.dgrad.lhs, self.wgrad.rhs):
            raise ConfigError("the gradient that a policy's dgrad and wgrad multiply is in no forward product")
        # Scales are made for the second of each pair.
        kept = (self.wgrad.lhs, self.forward.lhs), (self.dgrad.rhs, self.forward.rhs), (self.wgrad.rhs, self.dgrad.lhs)
        if any(q is not None and q.history and q != first for q, first in kept):
            raise ConfigError("delayed scaling keeps one history each for x, w and g: each is stored in one way")

    @property
    def products(self) -> tuple[Product, Product, Product]:
        return self.forward, self.dgrad, self.wgrad

    @property
    def is_plain(self) -> bool:
        """Whether products are exactly those without a policy."""
        return all(p.is_plain for p in self.products) and self.weights == self.master

    @property
    def is_for_inference(self) -> bool:
        """Whether the forward product's rounding is meant to stay after training: its gradient is straight-through."""
        return not self.forward.is_plain and self.wgrad.lhs is None

    @property
    def is_random(self) -> bool:
        """Whether products need a random key."""
        return any(p.hadamard or any(q.rounding == "stochastic" for q in p.operands) for p in self.products)

    @property
    def history(self) -> int:
        """The longest history of delayed scaling, 0 without."""
        return max((q.history for p in self.products for q in p.operands), default=0)

    def for_evaluation(self) -> "PrecisionPolicy":
        """The same forward product without randomness and history: rounded to nearest, scaled by what is there."""

        def settled(q: Quantizer) -> Quantizer:
            return dataclasses.replace(q, rounding="nearest", history=0)

        forward = dataclasses.replace(self.forward, lhs=settled(self.forward.lhs), rhs=settled(self.forward.rhs))
        return dataclasses.replace(self, forward=forward, dgrad=Product(), wgrad=Product())


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    """A precision policy as settings of a run."""

    name: str = "float32"
    """`float32` changes nothing. Floating point: `bfloat16`, `float16` (with loss scaling), `fp8_current`,
    `fp8_delayed`, `fp8_block`, `mxfp8`, `mxfp6`, `mxfp4`, `mxfp4_stochastic`, `nvfp4`. Integers: `int8_switchback`,
    `int8_vector`, `int8_block`. Trained for low-precision inference: `qat_w4a8`, `bitnet`. Weights that have no wider
    copy: `bf16_weights`, `fixed16_weights`, and `..._stochastic`."""
    implementation: str = "auto"
    """`native`, `emulated`, or `auto`: native where the hardware has the format."""
    optimizer_state: str | None = None
    """Format of the optimizer's moments between steps, `float32` or `bfloat16`; by default the policy's."""
    communication: str | None = None
    """Format of the gradients that devices add up: `int8` or `e4m3` with a scale for each 128 of them, or `bfloat16`.
    For meshes that have `data` alone."""

    def __post_init__(self):
        self.policy()

    def policy(self) -> PrecisionPolicy:
        """The policy that this names. `ConfigError` for unknown names."""
        policy = dataclasses.replace(precision_policy(self.name), implementation=self.implementation)
        if self.optimizer_state is not None:
            policy = dataclasses.replace(policy, optimizer_state=self.optimizer_state)
        if self.communication is not None:
            block = None if self.communication in STORED else (1, 128)  # What has float32's range needs no scale.
            policy = dataclasses.replace(policy, communication=Quantizer(self.communication, block))
        return policy


def precision_policy(name: str) -> PrecisionPolicy:
    """The published recipe of this name; `ConfigError` for names that there are not."""
    if name not in POLICIES:
        raise ConfigError(f"no precision policy '{name}': {nearest(name, POLICIES)}")
    return POLICIES[name]


def _everywhere(name: str, x: Quantizer, w: Quantizer, g: Quantizer, **more) -> PrecisionPolicy:
    """One way of storing each of the three tensors, in whatever product."""
    return PrecisionPolicy(name, Product(x, w), Product(g, w), Product(x, g), **more)


def _plain_backward(name: str, x: Quantizer, w: Quantizer) -> PrecisionPolicy:
    """Quantized forward, gradients as if rounding were the identity: what inference will compute is what is trained."""
    return PrecisionPolicy(name, Product(x, w), Product(PLAIN, None), Product(None, PLAIN))


def _unscaled(name: str) -> Quantizer:
    return Quantizer(name, None)


_TENSOR, _VECTOR = (None, None), (1, None)


def _hybrid(name: str, history: int) -> PrecisionPolicy:
    forward = Quantizer("e4m3", _TENSOR, history=history)
    return _everywhere(name, forward, forward, Quantizer("e5m2", _TENSOR, history=history))


def _fp8_block() -> PrecisionPolicy:
    tile, square = Quantizer("e4m3", (1, 128)), Quantizer("e4m3", (128, 128))
    return _everywhere("fp8_block", tile, square, tile)


def _switchback() -> PrecisionPolicy:
    row, tensor = Quantizer("int8", _VECTOR), Quantizer("int8", _TENSOR)
    return PrecisionPolicy("int8_switchback", Product(row, tensor), Product(row, tensor))


def _mxfp4_stochastic() -> PrecisionPolicy:
    back = mx("e2m1", rounding="stochastic", shrink=0.75)
    rotated = Product(back, back, hadamard=32)
    return PrecisionPolicy("mxfp4_stochastic", Product(mx("e2m1"), mx("e2m1")), rotated, rotated)


def _nvfp4() -> PrecisionPolicy:
    gradient = dataclasses.replace(NVFP4, rounding="stochastic")
    return PrecisionPolicy(
        "nvfp4", Product(NVFP4, NVFP4), Product(gradient, NVFP4), Product(NVFP4, gradient, hadamard=16)
    )


def _named(*policies: PrecisionPolicy) -> dict[str, PrecisionPolicy]:
    return {policy.name: policy for policy in policies}


POLICIES: dict[str, PrecisionPolicy] = _named(
    PrecisionPolicy(),
    _everywhere("bfloat16", *[_unscaled("bfloat16")] * 3),
    # Mixed Precision Training (Micikevicius et al., 2018, arXiv 1710.03740).
    _everywhere("float16", *[_unscaled("float16")] * 3, loss_scaling=True),
    # Stable and low-precision training for large-scale vision-language models (Wortsman et al., 2023, arXiv
    # 2304.13013): the weights' gradient, which sums over all tokens, stays wide.
    _switchback(),
    # A scale a token and a scale an output channel, in all three products.
    _everywhere("int8_vector", *[Quantizer("int8", _VECTOR)] * 3),
    # Jetfire (Xi et al., 2024, arXiv 2403.12422).
    _everywhere("int8_block", *[Quantizer("int8", (32, 32))] * 3),
    # Micikevicius et al., 2022: E4M3 forward, E5M2 for gradients. History as in Transformer Engine.
    _hybrid("fp8_current", 0),
    _hybrid("fp8_delayed", 1024),
    # DeepSeek-V3 (2024, arXiv 2412.19437): tiles of 128 activations, squares of weights, E4M3 throughout.
    _fp8_block(),
    # OCP Microscaling (Rouhani et al., 2023, arXiv 2310.10537).
    _everywhere("mxfp8", *[mx("e4m3")] * 3),
    _everywhere("mxfp6", mx("e2m3"), mx("e2m3"), mx("e3m2")),
    _everywhere("mxfp4", *[mx("e2m1")] * 3),
    # Training LLMs with MXFP4 (Tseng et al., 2025, arXiv 2502.20586): unbiased gradients. Here forward products are
    # in MXFP4 as well, which theirs are not.
    _mxfp4_stochastic(),
    # Pretraining LLMs with NVFP4 (NVIDIA, 2025, arXiv 2509.25149), here without its two-dimensional weight scales.
    _nvfp4(),
    _plain_backward("qat_w4a8", Quantizer("int8", _VECTOR), Quantizer("int4", _VECTOR)),
    # The Era of 1-bit LLMs (Ma et al., 2024, arXiv 2402.17764).
    _plain_backward("bitnet", Quantizer("int8", _VECTOR), Quantizer("ternary", _TENSOR, "mean")),
    PrecisionPolicy("bf16_weights", weights="bfloat16", master="bfloat16"),
    PrecisionPolicy("bf16_weights_stochastic", weights="bfloat16", master="bfloat16", rounding="stochastic"),
    # Gupta et al., 2015: 16 bits, here 3 before the point, that of the sign among them.
    PrecisionPolicy("fixed16_weights", weights="q3.13", master="q3.13"),
    PrecisionPolicy("fixed16_weights_stochastic", weights="q3.13", master="q3.13", rounding="stochastic"),
)
"""Published recipes by name."""
