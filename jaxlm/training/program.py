"""A model, an objective and an optimizer on a mesh: how their state is created, placed, and stepped."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from jaxlm.core import sharding, trees
from jaxlm.core.errors import ConfigError
from jaxlm.core.keys import fold
from jaxlm.core.policies import PrecisionPolicy
from jaxlm.objectives.base import Objective
from jaxlm.training.communication import accumulate_in_few_bits, require_data_parallel
from jaxlm.training.low_precision import Recipe, low_precision
from jaxlm.training.state import TrainState, init_state, state_shardings
from jaxlm.training.step import Build, Metrics, Step, accumulate, make_step


@dataclasses.dataclass(frozen=True)
class Program:
    """Training one model on a mesh. Nothing is compiled or allocated until it is called.

    `model` needs `init(key) -> {"params": ...}`, `axes()`, `abstract_params()` and `config.sharding_rules(mesh)`. All
    its parameters are trained from scratch, or `start`: what is trained of parameters that exist (`None` where a leaf
    is frozen), placed on the mesh. `build` makes the parameters of it and of the step's `frozen` argument. Products,
    weights and optimizer state are as `policy` says; `recipe` holds objective and optimizer as fitted to it. `wrap` may
    make more of the step (`change_every`).
    """

    model: Any
    objective: Objective
    tx: optax.GradientTransformation
    mesh: Mesh
    micro_batches: int = 1
    start: Any = None
    build: Build = trees.merge
    policy: PrecisionPolicy = PrecisionPolicy()
    wrap: Callable[[Step], Step] | None = None

    @functools.cached_property
    def recipe(self) -> Recipe:
        if self.policy.communication is not None:
            require_data_parallel(self.mesh)
        axes = self.model.axes()  # Computes something: the mesh may be one that is not here.
        with sharding.use_mesh(self.mesh, self.rules):
            return low_precision(self.objective, self.tx, self.policy, axes)

    @functools.cached_property
    def rules(self) -> Mapping[str, Any]:
        return self.model.config.sharding_rules(self.mesh)

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """The state's shapes, with the shardings it has on the mesh: what a checkpoint is restored to."""
        shapes = jax.eval_shape(functools.partial(self._fresh, self.recipe), jax.random.key(0), self.start)
        if self.start is None:
            placed = sharding.shardings(self.mesh, self.model.axes(), self.model.abstract_params(), self.rules)
        else:
            placed = jax.tree.map(lambda x: x.sharding, self.start)
        places = state_shardings(self.mesh, shapes, placed)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places)

    @functools.cached_property
    def shardings(self) -> TrainState:
        return jax.tree.map(lambda x: x.sharding, self.abstract_state)

    def init(self, seed: int) -> TrainState:
        """The state before the first step, created in place; the same on every mesh, up to the last bit."""
        fresh = functools.partial(self._fresh, self.recipe)
        with sharding.use_mesh(self.mesh, self.rules):
            return jax.jit(fresh, out_shardings=self.shardings)(jax.random.key(seed), self.start)

    @functools.cached_property
    def step(self) -> Callable[[TrainState, Any, Mapping[str, jax.Array]], tuple[TrainState, Metrics]]:
        """The compiled step; it donates the state it is given."""
        gradients = functools.partial(accumulate, micro_batches=self.micro_batches)
        if self.policy.communication is not None:
            sent = {"quantizer": self.policy.communication, "micro_batches": self.micro_batches}
            gradients = functools.partial(accumulate_in_few_bits, **sent)
        parts = {"build": self.build, "gradients": gradients, "apply_updates": self.recipe.apply_updates}
        step = make_step(self.recipe.objective, self.recipe.tx, **parts)
        step = self.wrap(step) if self.wrap else step
        return self.jit(step, donate_argnums=0, out_shardings=(self.shardings, None))

    def jit(self, function: Callable, **options: Any) -> Callable:
        """`jax.jit(function)`, traced, lowered and run with this program's mesh and rules ambient."""
        jitted = jax.jit(function, **options)

        def on_mesh(method: Callable) -> Callable:
            def call(*args: Any) -> Any:
                with sharding.use_mesh(self.mesh, self.rules):
                    return method(*args)

            return call

        call = functools.wraps(function)(on_mesh(jitted))
        call.trace, call.lower = on_mesh(jitted.trace), on_mesh(jitted.lower)
        return call

    @functools.cached_property
    def data_share(self) -> tuple[int, int]:
        """Which of how many parts of each batch this process reads and gives to `put`."""
        return sharding.data_share(self.mesh, self.rules)

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's rows of a batch, on the mesh."""
        return sharding.shard_batch(self.mesh, batch)

    def meet(self) -> None:
        """Lets the processes of a mesh of CPUs connect: each group of them that a step may have, one after the other.

        Left to the step, whose collectives begin in any order, they can wait for one another in a circle until all give
        up: a process connects to one group at a time.
        """
        if jax.process_count() == 1 or self.mesh.devices.flat[0].platform != "cpu":
            return
        axes = [name for name, size in self.mesh.shape.items() if size > 1]
        for count in range(1, len(axes) + 1):
            for chosen in itertools.combinations(axes, count):
                total = lambda chosen=chosen: jax.lax.psum(jax.lax.axis_index(chosen), chosen)  # noqa: E731
                whole = PartitionSpec()
                jax.block_until_ready(
                    jax.jit(jax.shard_map(total, mesh=self.mesh, in_specs=(), out_specs=whole, check_vma=False))()
                )

    def check_batch(self, batch_size: int) -> None:
        """Raises `ConfigError` unless a batch of so many rows can be cut over the mesh and into micro-batches."""
        parts = int(np.prod([self.mesh.shape[a] for a in sharding.BATCH_AXES]))
        if self.micro_batches < 1 or batch_size % (parts * self.micro_batches):
            raise ConfigError(
                f"batch of {batch_size} rows is not divisible by {parts} (mesh data x fsdp) x {self.micro_batches} "
                "micro-batches"
            )

    def _fresh(self, recipe: Recipe, key: jax.Array, start: Any) -> TrainState:
        params = self.model.init(fold(key, "init"))["params"] if start is None else start
        params = recipe.prepare(params)
        return init_state(params, recipe.tx, fold(key, "train"), extra=recipe.extra(params))
