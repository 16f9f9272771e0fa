"""One jitted, donated update, and the forward passes that measure without changing anything."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from rtd_jax.base.boundaries import shifted_labels, transition_boundaries
from rtd_jax.base.means import Mean, mean_per_chain, safe_divide
from rtd_jax.base.sharding import row_sharding
from rtd_jax.base.types import Array, Batch, Params, TeacherOutputs
from rtd_jax.losses import LossWeights, cross_entropy_sums, denominators, rtd, transition_losses, transition_mask
from rtd_jax.losses.every_token import intermediate, token_alignment, token_counts
from rtd_jax.losses.objective import Metrics
from rtd_jax.losses.policy import Rollouts, policy_sums
from rtd_jax.losses.trajectory import TransitionForm
from rtd_jax.models.model import LlamaModel
from rtd_jax.teacher.online import states_at_boundaries, teacher_outputs
from rtd_jax.train.state import TrainState, projections, state_shardings


@dataclass(frozen=True)
class StepSettings:
    """What is compiled into the step (the loss weights are not: they are traced)."""

    micro_batches: int = 1  # per update; the gradient does not depend on it
    anchor_prompt: bool = True  # whether the prompt's end is h_0, so that a one-step problem has a transition
    hidden_layer: int = -1  # teacher layer whose states are matched; -1 final normed
    student_hidden_layer: int = -1
    transition_form: TransitionForm = "direction"  # what of a transition is compared; see `transition_losses`
    chunk_length: int = 32  # positions of each row whose logits exist at one time
    token_alignment: bool = False  # whether states are aligned at every token of a completion
    intermediate: tuple[tuple[int, int], ...] = ()  # (student layer, teacher layer) matched at every token
    labels_only: bool = False  # cross-entropy with the labels and nothing else: the teacher is not run
    policy_temperature: float = 1.0  # at which the student's own chains are drawn
    policy_clip: float = 0.2  # by which a probability's ratio may leave 1 before its gradient stops
    offload_optimizer: bool = False  # whether the optimizer's moments lie in host memory between updates

    def token_layers(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Layers needed at every token, of student and teacher: the aligned pair first, if any."""
        aligned = ((self.student_hidden_layer, self.hidden_layer),) if self.token_alignment else ()
        pairs = (*aligned, *self.intermediate)
        return tuple(student for student, _ in pairs), tuple(teacher for _, teacher in pairs)


# Where a step's teacher comes from: its weights, or its outputs on the very batch, read back from a cache.
TeacherSource = Params | TeacherOutputs
# (state, teacher, batch, loss weights[, the student's own chains]) -> (state, metrics)
TrainStep = Callable[..., tuple[TrainState, Metrics]]


def make_train_step(
    student: LlamaModel,
    teacher: LlamaModel | None,
    optimizer: optax.GradientTransformation,
    settings: StepSettings,
    vocab_size: int,
    mesh: Mesh | None = None,
) -> TrainStep:
    """Builds the RTD update. The teacher's params are an argument: closed over, they would be copied into the program.

    Without a `teacher` the argument in their place is its outputs on the batch (`TeacherOutputs` with `top_k`), rows
    lying as the batch's do; with `settings.labels_only` it is not read. Given `Rollouts`, the policy term is added.

    Gradients of micro-batches are added under denominators counted over the whole batch, so the update does not depend
    on `settings.micro_batches`, on the mesh, or on how chains are packed into rows.
    """
    student_layers, teacher_layers = settings.token_layers()
    if teacher is None and teacher_layers:
        raise ValueError(
            "a cache has no teacher states at every token: set loss.token_alignment_weight and "
            "loss.intermediate_weight to 0, or train with the teacher online (teacher.cache='')"
        )

    def loss_of(
        params: Params, source: TeacherSource, part: tuple, weights: LossWeights, totals: Any
    ) -> tuple[Array, Metrics]:
        batch, _, rollouts = part
        imitate = labels_loss if settings.labels_only else teacher_loss
        loss, metrics = imitate(params, source, batch, weights, totals)
        if rollouts is not None:
            term, of_policy = policy_loss(params, rollouts, totals[2])
            loss, metrics = loss + weights.reward * term, metrics | of_policy
        return loss, metrics | {"loss": Mean(loss, jnp.ones(()))}

    def labels_loss(
        params: Params, _: TeacherSource, batch: Batch, weights: LossWeights, totals: Any
    ) -> tuple[Array, Metrics]:
        """(1 - alpha) CE, as in the whole objective, without anything that it has of the teacher."""
        total, weight = cross_entropy_sums(
            student.hidden(params["student"], batch.tokens_BL, batch.positions_BL, batch.chain_ids_BL),
            student.head(params["student"]),
            *shifted_labels(batch),
            vocab_size=vocab_size,
            chunk_length=settings.chunk_length,
            mesh=mesh,
        )
        loss = (1.0 - weights.alpha) * safe_divide(total, totals[0].tokens)
        return loss, {"distill/hard_loss": Mean(jax.lax.stop_gradient(total), weight)}

    def policy_loss(params: Params, rollouts: Rollouts, tokens: Array) -> tuple[Array, Metrics]:
        batch = rollouts.batch
        sums = policy_sums(
            student.hidden(params["student"], batch.tokens_BL, batch.positions_BL, batch.chain_ids_BL),
            student.head(params["student"]),
            *shifted_labels(batch),
            *(jnp.pad(x[:, 1:], ((0, 0), (0, 1))) for x in (rollouts.old_log_probs_BL, rollouts.advantages_BL)),
            temperature=settings.policy_temperature,
            clip=settings.policy_clip,
            vocab_size=vocab_size,
            chunk_length=settings.chunk_length,
            mesh=mesh,
        )
        measured = {"policy_loss": sums.loss, "clip_fraction": sums.clipped, "policy_kl": sums.kl}
        means = {f"reward/{name}": Mean(jax.lax.stop_gradient(x), sums.weight) for name, x in measured.items()}
        return safe_divide(sums.loss, tokens), means

    def teacher_loss(
        params: Params, source: TeacherSource, batch: Batch, weights: LossWeights, totals: Any
    ) -> tuple[Array, Metrics]:
        with jax.named_scope("student"):
            hidden_BLS, states_BCKS, everywhere = states_at_boundaries(
                student, params["student"], batch, settings.student_hidden_layer, student_layers
            )
        of_teacher, teacher_head = teacher_on(teacher, source, batch, settings.hidden_layer, teacher_layers)
        loss, metrics = rtd(
            hidden_BLS,
            states_BCKS,
            student.head(params["student"]),
            of_teacher,
            teacher_head,
            batch,
            projections=projections(params),
            weights=weights,
            totals=totals[0],
            vocab_size=vocab_size,
            anchor_prompt=settings.anchor_prompt,
            transition_form=settings.transition_form,
            chunk_length=settings.chunk_length,
            mesh=mesh,
        )
        pairs = list(zip(everywhere, of_teacher.token_states, strict=True))
        if settings.token_alignment:
            term, metrics["distill/token_alignment"] = token_alignment(
                *pairs.pop(0), batch, projections(params).f, totals[1]
            )
            loss += weights.token_alignment * term
        if pairs:
            students, teachers = zip(*pairs, strict=True)
            term, metrics["distill/intermediate"] = intermediate(
                students, teachers, batch, params["regressors"], totals[1]
            )
            loss += weights.intermediate * term
        return loss, metrics

    def step(
        state: TrainState, source: TeacherSource, batch: Batch, weights: LossWeights, rollouts: Rollouts | None = None
    ) -> tuple[TrainState, Metrics]:
        if settings.offload_optimizer:
            state = _moved(state, optimizer, mesh, offload=False)
        drawn = None if rollouts is None else jnp.sum(shifted_labels(rollouts.batch)[1])
        totals = (denominators(batch, anchor_prompt=settings.anchor_prompt), token_counts(batch), drawn)
        is_params = teacher is not None or settings.labels_only
        gradients, metrics = accumulate(
            lambda params, part: loss_of(params, source if is_params else part[1], part, weights, totals),
            state.params,
            split_rows((batch, None if is_params else source, rollouts), settings.micro_batches, mesh),
            None if mesh is None else state_shardings(state, optimizer, mesh).params,
        )
        state, metrics = apply_update(optimizer, state, gradients, metrics)
        if mesh is not None:
            # Where it came from. Left to choose, the compiler spreads norms, and the next update is compiled anew.
            state = jax.lax.with_sharding_constraint(state, state_shardings(state, optimizer, mesh))
        return _moved(state, optimizer, mesh, offload=True) if settings.offload_optimizer else state, metrics

    return jax.jit(step, donate_argnums=0)


def teacher_on(
    teacher: LlamaModel | None,
    source: TeacherSource,
    batch: Batch,
    hidden_layer: int,
    token_layers: tuple[int, ...] = (),
) -> tuple[TeacherOutputs, Array | None]:
    """The teacher's outputs on a batch, computed or as given, and its head where it has one; no gradient flows."""
    if teacher is None:
        assert isinstance(source, TeacherOutputs), "without a teacher the step takes its outputs"
        return jax.lax.stop_gradient(source), None
    assert isinstance(source, dict), "with a teacher the step takes its params"
    return teacher_outputs(teacher, source, batch, hidden_layer, token_layers), teacher.head(source)


def _moved(state: TrainState, optimizer: optax.GradientTransformation, mesh: Mesh | None, offload: bool) -> TrainState:
    """The state with the optimizer's moments in host memory, or on the devices."""
    if mesh is None:
        raise ValueError("an optimizer in host memory needs a mesh; give make_train_step one")
    placed = state_shardings(state, optimizer, mesh, offload)
    return state._replace(opt_state=jax.device_put(state.opt_state, placed.opt_state))


# (state, batch) -> (state, metrics)
PretrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_pretrain_step(
    model: LlamaModel, optimizer: optax.GradientTransformation, vocab_size: int, chunk_length: int = 32
) -> PretrainStep:
    """Builds the plain language-model update, cross-entropy per predicted token; used to make the bundled teacher."""

    def loss_of(params: Params, batch: Batch) -> tuple[Array, Metrics]:
        hidden_BLD = model.hidden(params["student"], batch.tokens_BL, batch.positions_BL, batch.chain_ids_BL)
        labels_BL, weights_BL = shifted_labels(batch)
        total, weight = cross_entropy_sums(
            hidden_BLD,
            model.head(params["student"]),
            labels_BL,
            weights_BL,
            vocab_size=vocab_size,
            chunk_length=chunk_length,
        )
        loss = total / jnp.maximum(weight, 1.0)
        return loss, {"loss": Mean(loss, jnp.ones(())), "distill/hard_loss": Mean(total, weight)}

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        gradients, metrics = jax.grad(loss_of, has_aux=True)(state.params, batch)
        return apply_update(optimizer, state, gradients, metrics)

    return jax.jit(step, donate_argnums=0)


def make_boundary_reader(
    student: LlamaModel, teacher: LlamaModel | None, settings: StepSettings
) -> Callable[[Params, TeacherSource, Batch], tuple[Array, Array]]:
    """Builds (params, teacher, batch) -> states at the boundaries of the matched layers, [B, C, K, S] and [B, C, K, D].

    The teacher is given as in `make_train_step`; of cached outputs only the boundary states are read.
    """

    @jax.jit
    def read(params: Params, source: TeacherSource, batch: Batch) -> tuple[Array, Array]:
        _, student_states, _ = states_at_boundaries(student, params["student"], batch, settings.student_hidden_layer)
        return student_states, teacher_on(teacher, source, batch, settings.hidden_layer)[0].boundary_states_BCKD

    return read


def make_coherence_eval(
    student: LlamaModel, teacher: LlamaModel | None, settings: StepSettings
) -> Callable[[Params, TeacherSource, Batch], Mean]:
    """Builds (params, teacher, batch) -> the student's coherence loss as (sum over chains, chains).

    The teacher is given as in `make_train_step`; of cached outputs only the boundary states are read.
    """

    read = make_boundary_reader(student, teacher, settings)

    @jax.jit
    def evaluate(params: Params, source: TeacherSource, batch: Batch) -> Mean:
        student_states, teacher_states = read(params, source, batch)
        mask_BCK = transition_boundaries(batch.boundary_mask_BCK, settings.anchor_prompt)
        maps, form = projections(params), settings.transition_form
        losses = transition_losses(student_states, teacher_states, mask_BCK, maps.g, form)
        means_BC, has_any_BC = mean_per_chain(losses, transition_mask(mask_BCK))
        return Mean(jnp.sum(means_BC), jnp.sum(has_any_BC).astype(jnp.float32))

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
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    one = jnp.ones(())
    metrics |= {"loss": Mean(metrics["loss"].sum, one), "grad_norm": Mean(optax.tree.norm(gradients), one)}
    return TrainState(state.step + 1, params, opt_state, state.rng), metrics
