"""What it costs that the student writes texts between updates: its own chains, by continuous batching.

The whole program is compiled for its memory. How often its loops run is known only when it runs, so what a call of it
costs is put together from two programs more: one step, which adds a token to every slot, and one reading of prompts.
No text is taken to end early, so the plan is an upper bound: with texts that end at half of `max_new_tokens` on
average, drawing takes half of the steps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rtd_jax.apps.plan.cost import Plan, compile_plan
from rtd_jax.apps.plan.targets import Target
from rtd_jax.base.settings import check_ranges
from rtd_jax.base.sharding import replicated, row_sharding
from rtd_jax.base.types import Array, Params
from rtd_jax.data.by_length import round_up
from rtd_jax.eval.decoding import PROMPT_MULTIPLE, GenerateSettings, Sampling
from rtd_jax.eval.decoding.slots import Progress, Queue, advance, rows_read, shardings, start, with_next_token
from rtd_jax.models.model import DecoderModel


@dataclass(frozen=True)
class Draw:
    """What is drawn at one time."""

    prompts: int  # problems
    samples: int  # texts of each
    prompt_length: int  # tokens
    max_new_tokens: int  # of a text
    slots: int  # texts that are written together
    updates: int = 1  # optimizer updates until texts are drawn again

    def __post_init__(self) -> None:
        sizes = ("prompts", "samples", "prompt_length", "max_new_tokens", "slots", "updates")
        check_ranges(self, **dict.fromkeys(sizes, "[1, 1e9]"))

    @property
    def steps(self) -> float:
        """How often a token is added to every slot: a slot is free for one time in 32 on average, and then refilled."""
        texts = self.prompts * self.samples
        return self.max_new_tokens * max(1.0, texts / self.slots)


@dataclass(frozen=True)
class DrawingPlan:
    """The programs of drawing, with what a call of them costs."""

    draw: Draw
    whole: Plan  # of which only the memory is meant
    step: Plan  # a token in every slot, attending to the longest text
    reading: Plan  # of as many prompts as are read together
    readings: float  # how many of these

    @property
    def flops(self) -> float:
        """Of all texts, per device."""
        return self._sum(lambda plan: plan.flops)

    @property
    def bytes_moved(self) -> float:
        """Of all texts, per device."""
        return self._sum(lambda plan: plan.bytes_moved)

    def seconds(self, target: Target) -> float:
        """Seconds of drawing, if in each program the slowest resource were the only limit, at its data-sheet rate."""
        return self._sum(lambda plan: max(plan.seconds(target).values()))

    def limit(self, target: Target) -> str:
        """The resource that limits a step."""
        seconds = self.step.seconds(target)
        return max(seconds, key=lambda name: seconds[name])

    def share(self, target: Target, update: Plan) -> float:
        """Share of an update's time that is drawing, where drawing is spread over the updates that its texts last."""
        drawing = self.seconds(target) / self.draw.updates
        return drawing / (drawing + max(update.seconds(target).values()))

    def _sum(self, of: Callable[[Plan], float]) -> float:
        return self.draw.steps * of(self.step) + self.readings * of(self.reading)


def plan_drawing(
    model: DecoderModel, params: Params, vocab_size: int, draw: Draw, mesh: Mesh, resident: float = 0.0
) -> DrawingPlan:
    """Compiles drawing for the devices of a mesh.

    Args:
      params: the student's, as shapes with shardings; see `rtd_jax.eval.decoding.placement` for how to place them.
      resident: bytes per device that are in memory beside them.
    """
    rows, devices, length = row_sharding(mesh), mesh.size, round_up(draw.prompt_length, PROMPT_MULTIPLE)
    settings = GenerateSettings(draw.max_new_tokens, (0,), vocab_size, draw.slots, sampling=Sampling())
    queue = abstract_queue(draw.prompts * draw.samples, length, mesh)
    shapes = jax.eval_shape(
        lambda p, q: start(model, p, q, slots=draw.slots, settings=settings, rows=rows), params, queue
    )
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings(shapes, model, rows)
    )
    read = rows_read(draw.slots, rows)

    @jax.jit
    def step(params: Params, slots: Any) -> Any:
        return with_next_token(model, params, slots, length + draw.max_new_tokens, settings)

    @jax.jit
    def reading(params: Params, prompts_WP: jax.Array, lengths_W: jax.Array) -> Any:
        return model.prefill(params, prompts_WP, lengths_W, length)

    prompts_WP = jax.ShapeDtypeStruct((read, length), jnp.int32, sharding=replicated(mesh))
    lengths_W = jax.ShapeDtypeStruct((read,), jnp.int32, sharding=replicated(mesh))
    programs = {
        "drawing": writing(model, settings, mesh).trace(params, queue),
        "drawing, a step": step.trace(params, state.slots),
        "drawing, reading prompts": reading.trace(params, prompts_WP, lengths_W),
    }
    plans = {}
    for name, program in programs.items():
        print(f"compiling {name} for {devices} x {mesh.devices.flat[0].device_kind}", flush=True)
        plans[name] = compile_plan(name, program, resident, devices)
    whole, one_step, one_reading = plans.values()
    return DrawingPlan(draw, whole, one_step, one_reading, math.ceil(draw.prompts / read))


def drawing_rows(plan: DrawingPlan, target: Target, update: Plan) -> list[tuple[str, str]]:
    """Rows of a table: what drawing costs per device, and its share of an update."""
    draw, step = plan.draw, plan.step
    texts = draw.prompts * draw.samples
    seconds = plan.seconds(target)
    return [
        ("texts, new tokens at most", f"{texts}, {texts * draw.max_new_tokens:,}"),
        ("peak memory, GiB", f"{plan.whole.peak / 2**30:.1f}"),
        ("arithmetic, TFLOP", f"{plan.flops / 1e12:.1f}"),
        ("memory traffic, GB", f"{plan.bytes_moved / 1e9:.1f}"),
        ("memory traffic of a step, GB", f"{step.bytes_moved / 1e9:.2f}"),
        ("at least: weights and caches once, GB", f"{step.memory.arguments / 1e9:.2f}"),
        ("links of a step, GB", f"{step.wire_bytes / 1e9:.3f}"),
        ("a step is bound by", plan.limit(target)),
        ("a step, ms at the data sheet's rate", f"{1e3 * max(step.seconds(target).values()):.2f}"),
        ("seconds of drawing", f"{seconds:.2f}"),
        (f"seconds an update, drawn every {draw.updates}", f"{seconds / draw.updates:.3f}"),
        ("share of an update's time", f"{100 * plan.share(target, update):.1f}%"),
    ]


def writing(model: DecoderModel, settings: GenerateSettings, mesh: Mesh) -> Any:
    """All texts of a queue, from start to end, as one jitted function of (params, queue)."""

    def write(params: Params, queue: Queue) -> tuple[Array, Array]:
        rows, never = row_sharding(mesh), jnp.int32(2**31 - 1)
        nothing = start(model, params, queue, slots=settings.batch_size, settings=settings, rows=rows)
        written: Progress = advance(model, params, queue, nothing, never, never, settings=settings, rows=rows)
        return written.new_QN, written.counts_Q

    return jax.jit(write)


def abstract_queue(texts: int, prompt_length: int, mesh: Mesh) -> Queue:
    """A queue as shapes; every device has it whole."""

    def shape(*sizes: int) -> Any:
        return jax.ShapeDtypeStruct(sizes, jnp.int32, sharding=replicated(mesh))

    of_texts = shape(texts)
    return Queue(shape(texts, prompt_length), of_texts, of_texts, of_texts, of_texts, shape())
