"""One jitted, donated update for any objective, and the forward passes that measure without changing anything."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from rtd_jax.base.means import Mean, Metrics
from rtd_jax.base.sharding import row_sharding
from rtd_jax.base.types import Array, Batch, Params, StepState, StudentOutputs, TeacherOutputs
from rtd_jax.methods.term import Coefficients, Objective, Outputs, Reads, Term, reads_of, weighted_sum
from rtd_jax.models.model import DecoderModel
from rtd_jax.teacher.online import student_outputs, teacher_outputs
from rtd_jax.train.state import TrainState, state_shardings, with_base, without_base


@dataclass(frozen=True)
class UpdateSettings:
    """What is compiled into an update beside its objective."""

    micro_batches: int = 1  # per update; the gradient does not depend on it
    offload_optimizer: bool = False  # whether the optimizer's moments lie in host memory between updates


# Where an update's teacher comes from: its weights, or its outputs on the very batch, read back from a cache.
TeacherSource = Params | TeacherOutputs
# (state, teacher, batch, coefficients of the objective[, the student's own chains]) -> (state, metrics)
TrainStep = Callable[..., tuple[TrainState, Metrics]]


def make_train_step(
    student: DecoderModel,
    teacher: DecoderModel | None,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    settings: UpdateSettings = UpdateSettings(),
    mesh: Mesh | None = None,
) -> TrainStep:
    """Builds the update as a program of its own, which donates the state. Arguments and errors as in `make_update`."""
    return jax.jit(make_update(student, teacher, optimizer, objective, settings, mesh), donate_argnums=0)


def make_update(
    student: DecoderModel,
    teacher: DecoderModel | None,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    settings: UpdateSettings = UpdateSettings(),
    mesh: Mesh | None = None,
) -> TrainStep:
    """Builds the update. The teacher's params are an argument: closed over, they would be copied into the program.

    Without a `teacher` the argument in their place is its outputs on the batch (`TeacherOutputs` with `top_k`), rows
    lying as the batch's do; it may be an empty dict where no term reads the teacher. Terms about the student's own
    chains take part in updates that are given such chains (a `Batch`, or with a field `batch` for the rows). An update
    whose rows are all own chains has None for the batch.

    Gradients of micro-batches are added under denominators counted over the whole batch, so the update does not depend
    on `settings.micro_batches`, on the mesh, or on how chains are packed into rows.

    Raises:
      ValueError: there is no teacher, and a term reads of it what no cache has.
    """
    if teacher is None:
        reading = [term for term in objective.terms if term.reads.teacher]
        by_token = [term.setting for term in reading if term.reads.teacher_tokens]
        is_on_policy = any(term.text == "own" for term in reading)
        for lacking, keys in (
            ("teacher states at every token", by_token),
            ("outputs on chains that the student draws", ["on_policy.fraction"] if is_on_policy else []),
        ):
            if keys:
                raise ValueError(
                    f"a cache has no {lacking}: set {' and '.join(keys)} to 0, or train with the teacher online "
                    "(teacher.cache='')"
                )

    def loss_of(
        params: Params,
        weights: Params | None,
        part: tuple[Batch | None, TeacherOutputs | None, Any],
        coefficients: Mapping[str, Coefficients],
        denominators: Mapping[str, Array],
    ) -> tuple[Array, Metrics]:
        """Loss and metrics of a micro-batch; `weights` are the teacher's."""
        batch, cached, own = part
        loss, metrics = jnp.zeros(()), Metrics()
        for text, chains in (("data", batch), ("own", own)):
            terms = [term for term in objective.terms if term.text == text]
            if chains is None or not terms:
                continue
            reads, rows = reads_of(terms), chains if isinstance(chains, Batch) else chains.batch
            of_student = _student_on(student, params["student"], rows, reads)
            of_teacher = teacher_on(teacher, weights if cached is None else cached, rows, reads)
            outputs = Outputs(of_student, of_teacher, chains)
            value, measured = weighted_sum(terms, outputs, params, coefficients, denominators)
            loss, metrics = loss + value, metrics | measured
        return loss, metrics | {"loss": Mean(loss, jnp.ones(()))}

    def step(
        state: TrainState,
        source: TeacherSource,
        batch: Batch | None,
        coefficients: Mapping[str, Coefficients],
        own: Any = None,
    ) -> tuple[TrainState, Metrics]:
        axes = objective.param_axes()
        if settings.offload_optimizer:
            state = _moved(state, optimizer, mesh, axes, offload=False)
        denominators = objective.denominators(batch, own)
        weights, cached = (None, source) if isinstance(source, TeacherOutputs) else (source, None)
        gradients, metrics = accumulate(
            lambda trained, part: loss_of(with_base(trained, state.params), weights, part, coefficients, denominators),
            without_base(state.params),
            split_rows((batch, cached, own), settings.micro_batches, mesh),
            None if mesh is None else without_base(state_shardings(state, optimizer, mesh, axes).params),
        )
        state, metrics = apply_update(optimizer, state, gradients, metrics)
        if mesh is not None:
            # Where it came from. Left to choose, the compiler spreads norms, and the next update is compiled anew.
            state = jax.lax.with_sharding_constraint(state, state_shardings(state, optimizer, mesh, axes))
        return _moved(state, optimizer, mesh, axes, offload=True) if settings.offload_optimizer else state, metrics

    return step


def teacher_on(
    teacher: DecoderModel | None, source: TeacherSource | None, batch: Batch, reads: Reads
) -> TeacherOutputs:
    """The teacher's outputs on a batch, computed or as given; empty where nothing of it is read. No gradient flows."""
    if not reads.teacher:
        return TeacherOutputs(None, None, {}, {})
    if isinstance(source, TeacherOutputs):
        return jax.lax.stop_gradient(source)
    assert teacher is not None, "without a teacher an update takes its outputs"
    assert source is not None
    return teacher_outputs(teacher, source, batch, reads.teacher_boundaries, reads.teacher_tokens, reads.step_state)


def _student_on(student: DecoderModel, params: Params, batch: Batch, reads: Reads) -> StudentOutputs:
    return student_outputs(student, params, batch, reads.student_boundaries, reads.student_tokens, reads.step_state)


def _moved(
    state: TrainState,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None,
    axes: Mapping[str, tuple[str, ...]],
    offload: bool,
) -> TrainState:
    """The state with the optimizer's moments in host memory, or on the devices."""
    if mesh is None:
        raise ValueError("an optimizer in host memory needs a mesh; give make_train_step one")
    placed = state_shardings(state, optimizer, mesh, axes, offload)
    return state._replace(opt_state=jax.device_put(state.opt_state, placed.opt_state))


def make_boundary_reader(
    student: DecoderModel, teacher: DecoderModel | None, layers: tuple[int, int], step_state: StepState = "end"
) -> Callable[[Params, TeacherSource, Batch], tuple[Array, Array]]:
    """Builds (params, teacher, batch) -> states of steps in two layers, [B, C, K, S] and [B, C, K, D].

    Args:
      teacher: given as in `make_train_step`; of cached outputs only the boundary states are read.
      layers: (student's, teacher's).
      step_state: of which tokens the state of a step is made (`base.boundaries.step_states`).
    """
    reads = Reads(student_boundaries=layers[:1], teacher_boundaries=layers[1:], step_state=step_state)

    @jax.jit
    def read(params: Params, source: TeacherSource, batch: Batch) -> tuple[Array, Array]:
        of_student = _student_on(student, params["student"], batch, reads)
        of_teacher = teacher_on(teacher, source, batch, reads)
        return of_student.boundary_states[layers[0]], of_teacher.boundary_states[layers[1]]

    return read


def make_term_eval(
    student: DecoderModel, teacher: DecoderModel | None, term: Term
) -> Callable[[Params, TeacherSource, Batch], Mean]:
    """Builds (params, teacher, batch) -> a term of the objective as (sum, denominator), nothing else computed.

    The teacher is given as in `make_train_step`; of cached outputs only what the term reads is read.
    """

    @jax.jit
    def evaluate(params: Params, source: TeacherSource, batch: Batch) -> Mean:
        of_student = _student_on(student, params["student"], batch, term.reads)
        of_teacher = teacher_on(teacher, source, batch, term.reads)
        total, _ = term.sums(Outputs(of_student, of_teacher, batch), params, term.coefficients())
        return Mean(total, term.denominator(batch))

    return evaluate


def accumulate(
    loss: Callable[[Params, Any], tuple[Array, Metrics]], params: Params, parts: Any, shardings: Any = None
) -> tuple[Params, Metrics]:
    """Gradients of `loss(params, part)` and metrics, both added over the leading axis of `parts`.

    The backward pass adds to one set of sums, layer by layer as it goes. Added afterwards, a part's own gradients would
    all be there beside the sums: 15 GiB more on each of two devices for an 8B student. One part is not scanned.

    Args:
      shardings: where the sums lie: with the params. Left to choose, the compiler may keep them whole.
    """
    one = jax.tree.map(lambda x: x[0], parts)
    if jax.tree.leaves(parts)[0].shape[0] == 1:
        return jax.grad(loss, has_aux=True)(params, one)
    zeros = jax.tree.map(jnp.zeros_like, params)
    if shardings is not None:
        zeros = jax.lax.with_sharding_constraint(zeros, shardings)
    sums = jax.tree.map(jax.new_ref, zeros)

    def body(metrics: Metrics, part: Any) -> tuple[Metrics, None]:
        value, backward, new = jax.vjp(lambda params: loss(params, part), params, has_aux=True)
        backward.with_refs(sums)(jnp.ones_like(value))  # type: ignore[attr-defined]  # its type is narrower
        return jax.tree.map(jnp.add, metrics, new), None

    shapes = jax.eval_shape(lambda part: loss(params, part)[1], one)
    metrics, _ = jax.lax.scan(body, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), parts)
    return jax.tree.map(jax.freeze, sums), metrics


def split_rows(batch: Any, parts: int, mesh: Mesh | None = None) -> Any:
    """Each array, [B, ...] -> [parts, B / parts, ...]. Part p has rows p, p + parts, ..: rows stay on their devices."""

    def split(x: Array) -> Array:
        x = jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)
        if mesh is None:
            return x
        spec = jax.sharding.PartitionSpec(None, *row_sharding(mesh).spec)
        return jax.lax.with_sharding_constraint(x, jax.sharding.NamedSharding(mesh, spec))

    return jax.tree.map(split, batch)


@jax.named_scope("optimizer")
def apply_update(
    optimizer: optax.GradientTransformation, state: TrainState, gradients: Any, metrics: Metrics
) -> tuple[TrainState, Metrics]:
    """One optimizer update; adds the gradient's norm to the metrics, and makes `loss` count once per update."""
    trained = without_base(state.params)
    updates, opt_state = optimizer.update(gradients, state.opt_state, trained)
    params = with_base(optax.apply_updates(trained, updates), state.params)
    one = jnp.ones(())
    metrics |= {"loss": Mean(metrics["loss"].sum, one), "grad_norm": Mean(optax.tree.norm(gradients), one)}
    return TrainState(state.step + 1, params, opt_state, state.rng), metrics
