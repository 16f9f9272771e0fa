"""Losses on the trajectory of hidden states through reasoning steps: boundary alignment and reasoning coherence.

Both compare directions. With h_i the state of step i (at its end, or a mean over its tokens: `base.boundaries`) and
delta_i = h_{i+1} - h_i the transition between steps,

    alignment = mean_i       1 - cos(f(h^S_i), h^T_i)              (the waypoints)
    coherence = mean_i      (1 - cos(g(delta^S_i), delta^T_i))^2   (the way between them)

mean_i runs over one chain's boundaries or transitions; the loss is the mean of that over the chains that have any. f
and g are learned linear maps from student width to teacher width. With distance="squared" lengths count beside
directions, of which the article says nothing:

    alignment = mean_i      |f(h^S_i) - h^T_i|^2 / |h^T_i|^2
    coherence = mean_i      |g(delta^S_i) - delta^T_i|^2 / |delta^T_i|^2

Source: "Reasoning Trace Distillation: Preserving
Multi-Step Logic in Compressed Student Models" (KriraAI), sections "Step-Boundary Representation Alignment" and "The
Reasoning Coherence Loss".

The plain functions (`alignment`, `coherence`) return one scalar. The per-item forms (`boundary_losses`,
`transition_losses`) return what each boundary or transition contributes, for people who reduce differently: under
micro-batches or a sharded batch the denominators have to be counted over the global batch.
"""

from collections.abc import Callable
from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp

from rtd_jax.base.means import Mean, mean_per_chain, within
from rtd_jax.base.types import Array

Distance = Literal["cosine", "squared"]
Projection = Array | Callable[[Array], Array] | None  # a [S, D] matrix, a function [..., S] -> [..., D], or identity


def alignment(
    student_states: Array,
    teacher_states: Array,
    mask: Array,
    projection: Projection = None,
    distance: Distance = "cosine",
) -> Array:
    """Mean over chains of the mean over a chain's boundaries of 1 - cos(f(h_S), h_T).

    Args:
      student_states: [..., K, S] student hidden states at K boundaries.
      teacher_states: [..., K, D] teacher hidden states at the same boundaries.
      mask: bool [..., K], True where the boundary exists.
      projection: f; a [S, D] matrix, a callable, or None when S == D.
      distance: how two states are compared, see `boundary_losses`.

    Returns:
      float32 scalar, in [0, 2] unless distance="squared": the mean over chains that have a boundary; 0 if none has.

    Raises:
      ValueError: the distance is unknown, the widths differ and there is no projection, or the projection does not fit.
    """
    return alignment_sums(student_states, teacher_states, mask, projection, distance).value()


def coherence(
    student_states: Array,
    teacher_states: Array,
    mask: Array,
    projection: Projection = None,
    distance: Distance = "cosine",
) -> Array:
    """Mean over chains of the mean over a chain's transitions of (1 - cos(g(delta_S), delta_T))^2.

    Args:
      student_states: [..., K, S] student hidden states at K boundaries.
      teacher_states: [..., K, D] teacher hidden states at the same boundaries.
      mask: bool [..., K], True where the boundary exists; transitions join neighbouring ones that do.
      projection: g; a [S, D] matrix, a callable, or None when S == D.
      distance: how two transitions are compared, see `transition_losses`.

    Returns:
      float32 scalar, in [0, 4] unless distance="squared": the mean over chains that have a transition; 0 if none has.

    Raises:
      ValueError: the distance is unknown, the widths differ and there is no projection, or the projection does not fit.
    """
    return coherence_sums(student_states, teacher_states, mask, projection, distance).value()


def alignment_sums(
    student_states: Array,
    teacher_states: Array,
    mask: Array,
    projection: Projection = None,
    distance: Distance = "cosine",
) -> Mean:
    """`alignment` as (sum over chains of the chain's mean, chains that have a boundary); arguments as there."""
    return _sum_over_chains(boundary_losses(student_states, teacher_states, mask, projection, distance), mask)


def coherence_sums(
    student_states: Array,
    teacher_states: Array,
    mask: Array,
    projection: Projection = None,
    distance: Distance = "cosine",
) -> Mean:
    """`coherence` as (sum over chains of the chain's mean, chains that have a transition); arguments as there."""
    losses_K = transition_losses(student_states, teacher_states, mask, projection, distance)
    return _sum_over_chains(losses_K, transition_mask(mask))


def count_chains(mask_K: Array) -> Array:
    """Chains of which the mask keeps anything: bool [..., K] -> float32 scalar."""
    return jnp.sum(jnp.any(mask_K, axis=-1)).astype(jnp.float32)


@jax.named_scope("alignment")
def boundary_losses(
    student_states: Array,
    teacher_states: Array,
    mask: Array,
    projection: Projection = None,
    distance: Distance = "cosine",
) -> Array:
    """1 - cos(f(h_S_i), h_T_i) per boundary, in [0, 2]; float32 [..., K].

    Exactly 0, with zero gradient, where masked or where either vector has zero length.

    distance="squared" gives |f(h_S_i) - h_T_i|^2 / |h_T_i|^2 instead, at least 0 and without an upper bound; 0 where
    masked or where the teacher's state has zero length.

    Raises:
      ValueError: the distance is unknown, the widths differ and there is no projection, or the projection does not fit.
    """
    _check(student_states, teacher_states, mask, distance)
    student_states = _cleared(student_states, mask)
    if distance == "squared":
        teacher_states = _cleared(teacher_states, mask)
        if not callable(projection):
            scale = power_scale(teacher_states, -1)
            student_states, teacher_states = student_states * scale, teacher_states * scale
        return _relative_error(_project(student_states, teacher_states, projection), teacher_states, mask)
    if not callable(projection):  # a function may be other than linear
        student_states = student_states * power_scale(student_states, -1)
    return _cosine_distance(_project(student_states, teacher_states, projection), teacher_states, mask)


@jax.named_scope("coherence")
def transition_losses(
    student_states: Array,
    teacher_states: Array,
    mask: Array,
    projection: Projection = None,
    distance: Distance = "cosine",
) -> Array:
    """Squared cosine distance between consecutive boundary states' differences, per transition, in [0, 4].

    (1 - cos(g(h_S[i+1] - h_S[i]), h_T[i+1] - h_T[i]))^2; float32 [..., K-1]. The square forgives small deviations
    and is smooth at zero. Exactly 0, with zero gradient, where masked or where either transition has zero length.

    distance="squared" gives |g(delta_S) - delta_T|^2 / |delta_T|^2 instead, at least 0 and without an upper bound; 0
    where masked or where the teacher's transition has zero length.

    Raises:
      ValueError: the distance is unknown, the widths differ and there is no projection, or the projection does not fit.
    """
    _check(student_states, teacher_states, mask, distance)
    student_states, teacher_states = (_cleared(x, mask) for x in (student_states, teacher_states))
    of_student, of_teacher = (power_scale(x, (-2, -1)) for x in (student_states, teacher_states))
    if distance == "squared":
        of_student = of_teacher  # lengths are compared
    if not callable(projection):
        student_states, teacher_states = student_states * of_student, teacher_states * of_teacher
    student_deltas, teacher_deltas = transitions(student_states), transitions(teacher_states)
    projected = _project(student_deltas, teacher_deltas, projection)
    if distance == "squared":
        return _relative_error(projected, teacher_deltas, transition_mask(mask))
    return jnp.square(_cosine_distance(projected, teacher_deltas, transition_mask(mask)))


def transitions(states: Array) -> Array:
    """delta_i = h_{i+1} - h_i along the boundary axis, in float32: [..., K, D] -> [..., K-1, D].

    The difference is taken in float32: two neighbouring bfloat16 states share most of their leading bits.
    """
    states = jnp.asarray(states, jnp.float32)
    return states[..., 1:, :] - states[..., :-1, :]


def transition_mask(mask: Array) -> Array:
    """A transition exists where both of its boundaries do: bool [..., K] -> [..., K-1]."""
    return mask[..., 1:] & mask[..., :-1]


def power_scale(states: Array, axes: int | tuple[int, ...]) -> Array:
    """A factor that brings very long or very short states to where their squares are in float32's range.

    A power of two, so that no digit changes, and 1 where the largest entry is from 1e-12 to 1e12. Of the states' dtype.
    """
    if float(jnp.finfo(states.dtype).max) < 2.0**96:  # float16 holds no such states, and no such factor
        return jnp.ones((), states.dtype)
    largest = jnp.max(jnp.abs(states), axis=axes, keepdims=True, initial=0.0).astype(jnp.float32)
    scale = jnp.where(largest > 2.0**40, 2.0**-96, jnp.where(largest < 2.0**-40, 2.0**96, 1.0))
    return jax.lax.stop_gradient(scale.astype(states.dtype))


def _sum_over_chains(losses_K: Array, mask_K: Array) -> Mean:
    return Mean(jnp.sum(mean_per_chain(losses_K, mask_K)), count_chains(mask_K))


def _cosine_distance(a: Array, b: Array, mask: Array) -> Array:
    """1 - cos(a, b) over the last axis, in float32; 0 with zero gradient where masked or degenerate."""
    a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    # d|x|/dx is 0/0 at x = 0, and a NaN survives a where() on the result only. So the operand is replaced first, and
    # then the result.
    usable = mask & jnp.any(a != 0, axis=-1) & jnp.any(b != 0, axis=-1)
    a, b = (jnp.where(usable[..., None], x, 1.0) for x in (a, b))
    # Scaling by the largest entry keeps the squares of very short and very long vectors inside float32's range. Before
    # it a power of two: XLA may multiply by 1 / 1e38, which is 0 where tiny numbers are flushed.
    a, b = (x * power_scale(x, -1) for x in (a, b))
    a, b = (x / jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True)) for x in (a, b))
    dot = jnp.sum(a * b, axis=-1)
    norms = jnp.sqrt(jnp.sum(jnp.square(a), axis=-1)) * jnp.sqrt(jnp.sum(jnp.square(b), axis=-1))
    return jnp.where(usable, within(1.0 - dot / norms, 0.0, 2.0), 0.0)


def _relative_error(a: Array, b: Array, mask: Array) -> Array:
    """|a - b|^2 / |b|^2 over the last axis, in float32; 0 with zero gradient where masked or where b is 0."""
    a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    usable = mask & jnp.any(b != 0, axis=-1)
    a, b = (jnp.where(usable[..., None], x, 1.0) for x in (a, b))
    scale = power_scale(b, -1)
    a, b = a * scale, b * scale
    scale = jax.lax.stop_gradient(jnp.max(jnp.abs(b), axis=-1, keepdims=True))
    a, b = a / scale, b / scale
    return jnp.where(usable, jnp.sum(jnp.square(a - b), axis=-1) / jnp.sum(jnp.square(b), axis=-1), 0.0)


def _cleared(states: Array, mask: Array) -> Array:
    # Masked slots may hold anything, even NaN; cleared before the projection, they cannot reach its gradient.
    return jnp.where(mask[..., None], states, jnp.zeros((), states.dtype))


def _project(student: Array, teacher: Array, projection: Projection) -> Array:
    widths = f"student width {student.shape[-1]}, teacher width {teacher.shape[-1]}"
    if projection is None:
        if student.shape[-1] != teacher.shape[-1]:
            raise ValueError(f"{widths}: pass a projection, a [{student.shape[-1]}, {teacher.shape[-1]}] matrix")
        return student
    if callable(projection):
        projected = projection(student)
    else:
        if jnp.shape(projection) != (student.shape[-1], teacher.shape[-1]):
            raise ValueError(f"projection has shape {jnp.shape(projection)}, but {widths}")
        # Accumulated in float32 whatever the inputs are: the cosine of a bfloat16 sum would lose three digits.
        projected = jnp.einsum("...s,sd->...d", jnp.asarray(student, jnp.float32), jnp.asarray(projection, jnp.float32))
    if projected.shape != teacher.shape:
        raise ValueError(f"projection gives {projected.shape}, but the teacher's states are {teacher.shape}")
    return projected


def _check(student_states: Array, teacher_states: Array, mask: Array, distance: Distance) -> None:
    if distance not in get_args(Distance):
        raise ValueError(f"distance is {distance!r}; use one of {', '.join(get_args(Distance))}")
    chex.assert_type([student_states, teacher_states], float)
    chex.assert_type(mask, bool)
    chex.assert_equal_shape_prefix([student_states, teacher_states], jnp.ndim(student_states) - 1)
    chex.assert_shape(mask, student_states.shape[:-1])
