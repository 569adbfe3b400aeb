"""Training under a precision policy: the pieces of a step, fitted to a policy.

    recipe = low_precision(CausalLM(model), tx, precision_policy("fp8_delayed"), model.axes())
    step = make_step(recipe.objective, recipe.tx, apply_updates=recipe.apply_updates)
    params = recipe.prepare(model.init(key)["params"])
    state = init_state(params, recipe.tx, key, extra=recipe.extra(params))

The step itself stays as it is: the policy rides on the kernels (`jaxlm.weights.LowPrecision`), its scaling state is in
`extra`, where it is overwritten and never optimized.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from jaxlm.core.errors import ConfigError
from jaxlm.core.formats import number_format
from jaxlm.core.keys import fold
from jaxlm.core.policies import PrecisionPolicy
from jaxlm.core.trees import named_leaves
from jaxlm.objectives.base import Aux, Batch, Objective, StepContext
from jaxlm.optim import roles
from jaxlm.optim.low_precision import apply_rounded_updates, keep_state_in
from jaxlm.weights import Weight, require_native, under_policy

FIRST_LOSS_SCALE, LARGEST_LOSS_SCALE, LOSS_SCALE_PERIOD = 2.0**16, 2.0**40, 2000
"""A loss scale starts there, doubles after so many finite steps on end, and is halved by a step that is not finite."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What takes the place of a step's parts. `prepare` rounds fresh parameters to the format they are kept in;
    `extra` makes the scaling state of parameters."""

    policy: PrecisionPolicy
    objective: Any
    tx: optax.GradientTransformation
    apply_updates: Callable[..., Any]
    prepare: Callable[[Any], Any]
    extra: Callable[[Any], Any]

    def served(self, params: Any) -> Any:
        """The parameters as inference has them: under the policy if that is what the model was trained for."""
        return self.objective.evaluated(params) if self.policy.is_for_inference else params


def kernels_under_policy(axes: Any) -> tuple[str, ...]:
    """The paths of the kernels that a policy holds for: those of role `matrix`, the projections of blocks."""
    return tuple(path for path, role in named_leaves(roles.roles(axes)) if role == "matrix")


def low_precision(
    objective: Objective, tx: optax.GradientTransformation, policy: PrecisionPolicy, axes: Any
) -> Recipe:
    """A step's parts under a policy; under `float32` they are those given.

    Raises:
      ConfigError: no such kernel, or native products that the ambient platform does not have.
    """
    require_native(policy)
    extra: Callable[[Any], Any] = lambda params: None  # noqa: E731
    if not policy.is_plain or policy.loss_scaling:
        kernels = kernels_under_policy(axes)
        if not kernels:
            raise ConfigError(f"precision policy '{policy.name}': there is no kernel of role 'matrix'")
        objective = LowPrecisionObjective(objective, policy, kernels)
        extra = objective.init_extra
    tx = keep_state_in(tx, policy.optimizer_state, wide=policy.master != "float32")
    apply_updates: Callable[..., Any] = optax.apply_updates
    prepare: Callable[[Any], Any] = lambda params: params  # noqa: E731
    if policy.master != "float32":
        prepare = functools.partial(_rounded, name=policy.master)
        apply_updates = functools.partial(apply_rounded_updates, to=policy.master, rounding=policy.rounding)
    return Recipe(policy, objective, tx, apply_updates, prepare, extra)


@dataclasses.dataclass(frozen=True)
class LowPrecisionObjective:
    """An objective whose model multiplies the kernels of these paths as a policy says (an `Observer`).

    Its `extra` is a dict: `scaling`, for each kernel `scale` `(..., 3)` and `history` `(..., 3, steps)` of the largest
    magnitudes of input, kernel and gradient; `loss_scale`, `scale` and the number of finite steps since it changed;
    `inner`, the objective's own. Each is `None` where there is no use for it.

    Without a step (`sums`, `totals`) products are those of `policy.for_evaluation()`.
    """

    objective: Any
    policy: PrecisionPolicy
    kernels: tuple[str, ...]

    @property
    def model(self) -> Any:
        return self.objective.model

    def init_extra(self, params: Any, inner: Any = None) -> dict[str, Any]:
        """The state before the first step: scales 1 and histories of zeros."""
        scaling, loss_scale = None, None
        if self.policy.history:
            known = dict(named_leaves(params, is_leaf=lambda x: isinstance(x, Weight)))
            scaling = [_fresh_scaling(known[path].shape[:-2], self.policy.history) for path in self.kernels]
        if self.policy.loss_scaling:
            loss_scale = {"scale": jnp.full((), FIRST_LOSS_SCALE), "finite": jnp.zeros((), jnp.int32)}
        return {"scaling": scaling, "loss_scale": loss_scale, "inner": inner}

    def meters(self, extra: Mapping[str, Any]) -> Any:
        own = extra["scaling"] and [jnp.zeros_like(state["scale"]) for state in extra["scaling"]]
        inner = getattr(self.objective, "meters", lambda extra: None)(extra["inner"])
        return {"amax": own, "inner": inner}

    def observe(self, extra: Mapping[str, Any], measured: Any, finite: Bool[Array, ""]) -> dict[str, Any]:
        scaling, loss_scale, inner = extra["scaling"], extra["loss_scale"], extra["inner"]
        if scaling is not None:
            new = [record_amax(s, m, self.policy) for s, m in zip(scaling, measured["amax"], strict=True)]
            scaling = jax.tree.map(functools.partial(jnp.where, finite), new, scaling)
        if loss_scale is not None:
            loss_scale = _next_loss_scale(loss_scale, finite)
        if hasattr(self.objective, "observe"):
            inner = self.objective.observe(inner, measured["inner"], finite)
        return {"scaling": scaling, "loss_scale": loss_scale, "inner": inner}

    def totals(self, params: Any, batch: Batch, ctx: StepContext) -> Any:
        return self.objective.totals(self.evaluated(params), batch, self._inner(ctx))

    def loss(self, params: Any, batch: Batch, ctx: StepContext, totals: Any) -> tuple[Float[Array, ""], Aux]:
        state = ctx.extra["scaling"]
        options = {}
        if state is not None:
            options["scales"] = dict(zip(self.kernels, [delayed_scales(s, self.policy) for s in state], strict=True))
            options["meters"] = dict(zip(self.kernels, ctx.meters["amax"], strict=True))
        key = None if ctx.key is None else fold(ctx.key, "precision")
        loss_scale = ctx.extra["loss_scale"] and ctx.extra["loss_scale"]["scale"]
        if loss_scale is not None:
            # Gradients are larger by the scale from the loss down to the parameters, and there alone.
            params = jax.tree.map(lambda p: _scale_gradient(p, 1 / loss_scale) if _is_float(p) else p, params)
        params = under_policy(params, self.kernels, self.policy, key=key, **options)
        value, aux = self.objective.loss(params, batch, self._inner(ctx), totals)
        metrics = dict(aux.metrics)
        if loss_scale is not None:
            value = _scale_gradient(value, loss_scale)
            metrics["loss_scale"] = (loss_scale, jnp.ones((), jnp.float32))
        extra = None if aux.extra is None else {**ctx.extra, "inner": aux.extra}
        return value, Aux(metrics, extra)

    def sums(self, params: Any, batch: Batch) -> Any:
        """The objective's own, of the model as it is evaluated."""
        return self.objective.sums(self.evaluated(params), batch)

    def evaluated(self, params: Any) -> Any:
        """The parameters under the policy as it is without a step."""
        return under_policy(params, self.kernels, self.policy.for_evaluation())

    def _inner(self, ctx: StepContext) -> StepContext:
        meters = None if ctx.meters is None else ctx.meters["inner"]
        inner = None if ctx.extra is None else ctx.extra["inner"]
        return dataclasses.replace(ctx, extra=inner, meters=meters)


def delayed_scales(state: Mapping[str, Array], policy: PrecisionPolicy) -> Float[Array, "*batch 3"]:
    """The scales of this step: the largest magnitude in the history becomes the largest value of the format.

    Where that is zero or not finite, the scale stays what it was.

    Source: Transformer Engine's delayed scaling, margin 0, as in `flax.linen.fp8_ops`.
    """
    forms = (policy.forward.lhs, policy.forward.rhs, policy.dgrad.lhs)
    largest = jnp.array([number_format(q.format).largest for q in forms], jnp.float32)
    largest = largest.reshape((1,) * (state["scale"].ndim - 1) + (3,))
    top = jnp.max(state["history"], axis=-1)
    usable = (top > 0) & jnp.isfinite(top)
    return jnp.where(usable, 1 / (largest / jnp.where(usable, top, 1.0)), state["scale"])


def record_amax(
    state: Mapping[str, Array], amax: Float[Array, "*batch 3"], policy: PrecisionPolicy
) -> dict[str, Array]:
    """The state after a step that measured `amax`: its scales are kept, the oldest entry of the history goes."""
    history = jnp.roll(state["history"], -1, axis=-1).at[..., 0].set(amax)
    return {"scale": delayed_scales(state, policy), "history": history}


def _fresh_scaling(leading: tuple[int, ...], length: int) -> dict[str, Array]:
    return {"scale": jnp.ones((*leading, 3)), "history": jnp.zeros((*leading, 3, length))}


def _next_loss_scale(state: Mapping[str, Array], finite: Array) -> dict[str, Array]:
    count = jnp.where(finite, state["finite"] + 1, 0)
    grow = count >= LOSS_SCALE_PERIOD
    larger = jnp.where(grow, jnp.minimum(2 * state["scale"], LARGEST_LOSS_SCALE), state["scale"])
    scale = jnp.where(finite, larger, jnp.maximum(state["scale"] / 2, 1.0))
    return {"scale": scale, "finite": jnp.where(grow, 0, count)}


def _rounded(params: Any, name: str) -> Any:
    dtype = getattr(number_format(name), "dtype", None)

    def one(p: Array) -> Array:
        if not _is_float(p):
            return p
        y = number_format(name).round(p)
        return y.astype(dtype or p.dtype)

    return jax.tree.map(one, params)


def _is_float(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


@jax.custom_vjp
def _scale_gradient(x: Array, factor: Array) -> Array:
    return x


_scale_gradient.defvjp(
    lambda x, factor: (x, factor), lambda factor, g: ((g.astype(jnp.float32) * factor).astype(g.dtype), None)
)
