"""Runs that differ in their seed alone, as members of one program.

The arrays of their states and batches are stacked over a first axis, R (runs), which is spread over the mesh axis
`data`: a device updates its own members, and nothing is exchanged. What is the same for all members (the number of
updates done, the teacher's outputs on the training chains, the weights of the loss) is there once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rtd_jax.base.means import Metrics
from rtd_jax.base.sharding import mesh_spec, replicated
from rtd_jax.base.types import Batch
from rtd_jax.methods.term import Coefficients
from rtd_jax.train.state import TrainState
from rtd_jax.train.teacher_table import Places, TeacherTable, outputs_at
from rtd_jax.train.update import TrainStep

AXIS = "data"  # of the mesh, over which members are spread
NO_ENSEMBLE = 3  # exit status of a command that was asked for an ensemble of runs that have to be trained one by one
# (state, table or None, batches, sources, coefficients) -> (state, metrics): arrays of members have R in front, but
# for `state.step`, which they share.
EnsembleStep = Callable[..., tuple[TrainState, Metrics]]


class _Own(NamedTuple):
    """What a member has to itself."""

    params: Any
    opt_state: Any
    rng: Any
    batch: Batch
    source: Any


def over_members(
    function: Callable[[Any, Any], Any], mesh: Mesh, side_by_side: int | None = None
) -> Callable[[Any, Any], Any]:
    """Makes (own of one member, shared) -> found into the same on stacked `own`, [R, ...], giving stacked results.

    Args:
      side_by_side: members of a device that are computed together, by `jax.vmap`; the others follow one another in a
        loop. None computes all of them together on accelerators, and one after another on CPUs, where the arrays of
        one member fit into the processor's cache and those of many do not.
    """

    def on_a_device(own: Any, shared: Any) -> Any:
        (members,) = {len(leaf) for leaf in jax.tree.leaves(own)}
        together = side_by_side or (1 if jax.default_backend() == "cpu" else members)
        return jax.lax.map(lambda one: function(one, shared), own, batch_size=min(together, members))

    def everywhere(own: Any, shared: Any) -> Any:
        spec = _spec(mesh, len(jax.tree.leaves(own)[0]))
        spread = jax.shard_map(
            on_a_device, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec, check_vma=False
        )
        return spread(own, shared)

    return everywhere


def make_ensemble_step(update: TrainStep, mesh: Mesh, side_by_side: int | None = None) -> EnsembleStep:
    """Builds the update of all members, which donates the state.

    Args:
      update: of one run (`train.update.make_update`), made without a mesh, of a student that constrains no activations.
      mesh: over whose axis `data` members are spread, where it divides them; each device has all of them otherwise.
      side_by_side: as in `over_members`.
    """

    def one(own: _Own, shared: tuple[Any, TeacherTable | None, dict[str, Coefficients]]) -> tuple[Any, Any, Metrics]:
        steps, table, coefficients = shared
        source = own.source
        if isinstance(source, Places):
            assert table is not None, "places are those of a table"
            source = outputs_at(table, source)
        state = TrainState(steps, own.params, own.opt_state, own.rng)
        state, metrics = update(state, source, own.batch, coefficients)
        return state.params, state.opt_state, metrics

    def step(
        state: TrainState,
        table: TeacherTable | None,
        batch: Batch,
        source: Any,
        coefficients: dict[str, Coefficients],
    ) -> tuple[TrainState, Metrics]:
        own = _Own(state.params, state.opt_state, state.rng, batch, source)
        params, opt_state, metrics = over_members(one, mesh, side_by_side)(own, (state.step, table, coefficients))
        done = jax.lax.with_sharding_constraint(state.step + 1, replicated(mesh))
        return TrainState(done, params, opt_state, state.rng), metrics

    return jax.jit(step, donate_argnums=0)


def put_members(tree: Any, mesh: Mesh) -> Any:
    """Stacked arrays, [R, ...], spread over the devices member by member where that divides them."""
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, _spec(mesh, len(x)))), tree)


def put_state(state: TrainState, mesh: Mesh) -> TrainState:
    """The state of all members, spread like `put_members`; `step`, which they share, is on every device."""
    _, *arrays = state
    return TrainState(jax.device_put(state.step, replicated(mesh)), *put_members(arrays, mesh))


def of_member(tree: Any, member: int, mesh: Mesh) -> Any:
    """The arrays of one member, on every device."""
    return jax.tree.map(lambda x: jax.device_put(x[member], replicated(mesh)), tree)


def _spec(mesh: Mesh, members: int) -> PartitionSpec:
    return mesh_spec((members,), (AXIS,), mesh)
