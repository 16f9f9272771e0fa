"""Whether a recipe fits on given hardware, what an update costs there, and which resource limits its speed."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from rtd_jax.apps.plan.cost import Plan, compile_plan, traced
from rtd_jax.apps.plan.drawing import Draw, DrawingPlan, abstract_queue, drawing_rows, plan_drawing, writing
from rtd_jax.apps.plan.program import matmul_flops
from rtd_jax.apps.plan.targets import Target, find_target, prepare_backends
from rtd_jax.base.console import print_table
from rtd_jax.base.files import write_json
from rtd_jax.base.settings import check_ranges
from rtd_jax.base.sharding import make_mesh
from rtd_jax.data.by_length import round_up
from rtd_jax.eval.decoding import PROMPT_MULTIPLE, GenerateSettings
from rtd_jax.eval.decoding.placement import deployed_shapes, for_writing
from rtd_jax.methods.own_chains import OnPolicySettings
from rtd_jax.methods.term import reads_of
from rtd_jax.models.config import DecoderConfig
from rtd_jax.train.abstract import Abstract, abstract_step, bytes_on_device
from rtd_jax.train.recipe import Recipe
from rtd_jax.train.update import make_term_eval

GIB = 2**30
# The limiting resource is never busy all the time. This is the share of its data-sheet rate that large runs reach at
# best.
ACHIEVABLE = 0.55


@dataclass(frozen=True)
class PlanSettings:
    """The hardware that a recipe is planned for."""

    target: str = "a100-80gb:8"  # hardware and how much of it; also tpu-v5p:2x2x2, tpu-v6e:4x4, h100-80gb:8, cpu:8
    dollars_per_device_hour: float | None = None  # price of a device; an assumed one where it is not given
    json: str = ""  # file into which the numbers are written, too; "" writes none

    def __post_init__(self) -> None:
        check_ranges(self, dollars_per_device_hour="[0, 1e6]")


@dataclass(frozen=True)
class Plans:
    """All programs of a recipe on a target, and the arithmetic that an update needs at least."""

    programs: dict[str, Plan]
    updates: dict[str, Plan]  # the update with the teacher "online" and "cached"; one of them is the recipe's own
    ideal_flops: float  # that an update needs at least, over all devices; see `ideal_flops`
    flops_without_remat: float  # of the compiled update if it recomputed nothing, over all devices
    host_bytes: float  # bytes per device that the recipe keeps in host memory; see `_host_bytes`
    drawing: DrawingPlan | None = None  # of the student's own chains


def plan(recipe: Recipe, target: Target) -> Plans:
    """Compiles the recipe's update, validation by the coherence loss, and decoding for the target.

    The update is compiled twice where the method allows it: with the teacher online and with its outputs from a cache.

    Raises:
      ValueError: the recipe's mesh or batch does not suit the number of devices, or the models' sizes are not known.
    """
    mesh = make_mesh(recipe.mesh, target.devices)
    abstract = abstract_step(recipe, mesh)
    # A validation batch has as many rows as a micro-batch, of the data alone.
    of_data = dataclasses.replace(recipe, on_policy=OnPolicySettings())
    validated = abstract_step(dataclasses.replace(of_data, batch_size=recipe.rows_at_once, micro_batches=1), mesh)
    decoder = "student" if abstract.teacher is None else "teacher"
    source = validated.source if abstract.teacher is None else abstract.source
    programs = {"update": traced(abstract.step, *abstract.arguments)}
    if abstract.objective.yardstick is not None and recipe.curriculum.measures == "coherence":
        validation = make_term_eval(abstract.student, abstract.teacher, abstract.objective.yardstick)
        programs["validation"] = traced(validation, abstract.state.params, source, validated.batch)
    programs[f"decoding ({decoder})"] = _decoding(recipe, abstract)
    devices = len(target.devices)
    costs = {}
    for name, (program, arguments) in programs.items():
        print(f"compiling {name} for {devices} x {target.devices[0].device_kind}", flush=True)
        costs[name] = compile_plan(name, program, _resident(abstract, arguments), devices)
    own, other = ("online", "cached") if abstract.teacher is not None else ("cached", "online")
    updates = {own: costs["update"]}
    # A cache has neither states at every token nor the student's own chains.
    if not recipe.own_rows and not reads_of(abstract.objective.terms).teacher_tokens:
        print(f"compiling update with the teacher {other}", flush=True)
        cache = "" if other == "online" else "planned"
        other_recipe = dataclasses.replace(recipe, teacher=dataclasses.replace(recipe.teacher, cache=cache))
        updates[other] = compile_plan("update", _traced_update(other_recipe, mesh), 0.0, devices)
    no_remat = dataclasses.replace(recipe, student=dataclasses.replace(recipe.student, remat="none"))
    without_remat = matmul_flops(_traced_update(no_remat, mesh).jaxpr.jaxpr)
    teacher_config = None if abstract.teacher is None else abstract.teacher_config
    ideal = ideal_flops(recipe, teacher_config, abstract.student.config)
    drawing = None
    if recipe.own_rows:
        student, params = for_writing(abstract.student, abstract.state.params["student"], mesh)
        drawing = plan_drawing(student, params, abstract.vocab_size, _draw(recipe), mesh, _resident(abstract, ()))
        costs["drawing"] = drawing.whole
    return Plans(costs, updates, ideal, without_remat, _host_bytes(recipe, abstract), drawing)


def _draw(recipe: Recipe) -> Draw:
    """What the student writes until new chains are due, if every row holds as many chains as it may."""
    settings, data = recipe.on_policy, recipe.data
    return Draw(
        prompts=settings.updates_per_refresh * recipe.own_rows * data.chains_per_row,
        samples=1,
        prompt_length=max(1, data.row_length // data.chains_per_row - settings.max_new_tokens),
        max_new_tokens=settings.max_new_tokens,
        slots=settings.batch_size,
        updates=settings.updates_per_refresh,
    )


def _traced_update(recipe: Recipe, mesh: Mesh) -> jax.stages.Traced:
    abstract = abstract_step(recipe, mesh)
    return abstract.step.trace(*abstract.arguments)


def ideal_flops(recipe: Recipe, teacher: DecoderConfig | None, student: DecoderConfig) -> float:
    """FLOPs that an update needs at least, over all devices; a multiply-add counts as two.

    The teacher runs forward only, with 2 FLOPs per weight and token, and not at all where it is cached. The student
    runs forward and backward, with 6; with 4 where its weights are frozen and have no gradient, beside an adapter whose
    own arithmetic is not counted. Attention is counted as by Chowdhery et al. 2022 (PaLM, appendix B): 4 x layers x
    heads x head_dim x length per token and forward pass. That the causal mask saves half of it is not counted.
    """
    length = recipe.data.row_length
    tokens = recipe.batch_size * length
    teacher_flops = 0.0 if teacher is None else _forward_flops(teacher, length)
    student_flops = (2 if recipe.student.adapter.rank else 3) * _forward_flops(student, length)
    return tokens * (teacher_flops + student_flops)


def _forward_flops(config: DecoderConfig, length: int) -> float:
    attention = config.width * config.head_dim * (2 * config.heads + 2 * config.kv_heads)
    weights = config.layers * (attention + 3 * config.width * config.mlp_width) + config.width * config.vocab_size
    return 2.0 * weights + 4.0 * config.layers * config.heads * config.head_dim * length


def _decoding(recipe: Recipe, abstract: Abstract) -> tuple[jax.stages.Traced, tuple]:
    """The final evaluation's program, with the slots that it fills: caches count as temporaries."""
    batch, new_tokens = recipe.evaluation.batch_size, recipe.evaluation.max_new_tokens
    mesh = abstract.row_sharding.mesh
    is_cached = abstract.teacher is None
    model = abstract.teacher or abstract.student
    settings = GenerateSettings(new_tokens, (0,), abstract.vocab_size, batch)
    prompt_length = round_up(max(1, recipe.data.row_length - new_tokens), PROMPT_MULTIPLE)
    params: Any = abstract.state.params["student"] if is_cached else abstract.source
    if is_cached and model.adapter is not None:  # a merged copy, beside the state
        model, params = deployed_shapes(model, params, mesh)
    return traced(writing(model, settings, mesh), params, abstract_queue(batch, prompt_length, mesh))


def _host_bytes(recipe: Recipe, abstract: Abstract) -> float:
    """Bytes per device that are in host memory when the recipe runs, although the plans count them as device memory.

    This concerns GPUs: compiling for a GPU that is not here knows no host memory. Compiling for a TPU does.
    """
    moments = abstract.state.opt_state if recipe.optimizer.offload else ()
    layers = abstract.source["layers"] if recipe.teacher.offload and isinstance(abstract.source, dict) else ()
    leaves = [leaf for leaf in jax.tree.leaves((moments, layers)) if leaf.ndim]
    return sum(bytes_on_device(leaf) for leaf in leaves if leaf.sharding.memory_kind != "pinned_host")


def _resident(abstract: Abstract, arguments: tuple) -> float:
    """Bytes per device of weights and optimizer state that stay in memory but are not among a program's arguments."""
    given = {id(leaf) for leaf in jax.tree.leaves(arguments)}
    teacher = () if abstract.teacher is None else abstract.source  # cached outputs are dropped with their batch
    held = jax.tree.leaves((abstract.state, teacher))
    on_device = [leaf for leaf in held if leaf.sharding.memory_kind != "pinned_host"]
    return sum(bytes_on_device(leaf) for leaf in on_device if id(leaf) not in given)


def print_plan(recipe: Recipe, target: Target, plans: Plans) -> None:
    """Prints the plan as tables, and the verdict."""
    programs, ideal = plans.programs, plans.ideal_flops
    chip, devices = target.chip, len(target.devices)
    rows = [
        (
            name,
            *(f"{x / GIB:.1f}" for x in (p.memory.arguments, p.resident, p.memory.temporaries, p.peak)),
            f"{chip.memory / GIB:.1f}",
            "fits" if p.fits(target) else "DOES NOT FIT",
            f"{p.compile_seconds:.0f}",
        )
        for name, p in programs.items()
    ]
    columns = ["program", "arguments", "also resident", "temporaries", "peak", "capacity", "", "compiled in s"]
    print_table(f"Memory per device, GiB ({devices} x {target.devices[0].device_kind})", columns, rows)
    update = programs["update"]
    seconds = update.seconds(target)
    limit = max(seconds, key=lambda name: seconds[name])
    amounts = (
        f"{update.flops / 1e12:.1f} TFLOP",
        *(f"{x / 1e9:.1f} GB" for x in (update.bytes_moved, update.wire_bytes)),
    )
    rows = [(name, amount, f"{seconds[name]:.3f}") for name, amount in zip(seconds, amounts, strict=True)]
    print_table("One update, per device", ["resource", "amount", "seconds at the data sheet's rate"], rows)
    kinds = [(kind, f"{amount / 1e9:.2f}") for kind, amount in sorted(update.collective_bytes.items())]
    print_table("Collectives of one update, results per device", ["kind", "GB"], kinds or [("none", "0")])
    print(
        f"FLOPs of the update over those of an ideal one: {update.flops * devices / ideal:.3f}; without what remat "
        f"recomputes: {plans.flops_without_remat / ideal:.3f}"
    )
    step = seconds[limit] / ACHIEVABLE
    hours = step * recipe.total_updates / 3600
    tokens = recipe.batch_size * recipe.data.row_length
    dollars = f", about ${hours * devices * chip.dollars:,.0f} at ${chip.dollars:.2f} a device-hour"
    print(
        f"bound by {limit}: at best {seconds[limit]:.2f} s an update; at {100 * ACHIEVABLE:.0f}% of that rate "
        f"{step:.2f} s, {tokens / step:,.0f} tokens/s, {hours:,.0f} h for {recipe.total_updates:,} updates"
        + (dollars if chip.dollars else "")
    )
    if len(plans.updates) > 1:
        _print_sources(target, plans.updates)
    if plans.drawing is not None:
        title = "Drawing the student's own chains, per device, if none of them ends early"
        print_table(title, ["", ""], drawing_rows(plans.drawing, target, update))
    if plans.host_bytes:
        print(
            f"kept in host memory: {plans.host_bytes / GIB:.1f} GiB per device. The compiler for GPUs that are not "
            "here knows no host memory, so all of it is counted above; the true peak is lower by up to that much"
        )
    print(verdict(recipe, target, programs))


def _print_sources(target: Target, updates: dict[str, Plan]) -> None:
    """Prints what the update costs with the teacher online and cached, side by side."""
    online, cached = updates["online"], updates["cached"]

    def line(name: str, unit: float, of: Callable[[Plan], float], digits: int = 2) -> tuple[str, ...]:
        amounts = (f"{of(update) / unit:.{digits}f}" for update in (online, cached))
        return name, *amounts, f"{of(cached) / of(online):.2f}"

    print_table(
        "One update, per device: teacher online, and read from a cache",
        ["", "online", "cached", "cached / online"],
        [
            line("peak memory, GiB", GIB, lambda p: p.peak),
            line("arguments, GiB", GIB, lambda p: p.memory.arguments),
            line("arithmetic, TFLOP", 1e12, lambda p: p.flops),
            line("memory traffic, GB", 1e9, lambda p: p.bytes_moved),
            line("seconds at the data sheet's rate", 1, lambda p: max(p.seconds(target).values()), 3),
        ],
    )


def verdict(recipe: Recipe, target: Target, programs: dict[str, Plan]) -> str:
    """Says whether all programs fit, and if not, the first setting to change."""
    too_large = [name for name, p in programs.items() if not p.fits(target)]
    if not too_large:
        spare = min(target.chip.memory - p.peak for p in programs.values())
        return f"FITS on {target.name}, with {spare / GIB:.1f} GiB to spare on every device"
    worst = programs[too_large[0]]
    over = (worst.peak - target.chip.memory) / GIB
    change = _setting_to_change(recipe, target, worst)
    return f"DOES NOT FIT on {target.name}: {worst.program} is {over:.1f} GiB over. Next: {change}"


def _setting_to_change(recipe: Recipe, target: Target, worst: Plan) -> str:
    """The setting that frees the most memory at the least cost, as a flag with its new value."""
    room = target.chip.memory - worst.memory.arguments
    if room < 0.25 * target.chip.memory and recipe.teacher.param_dtype != "int8" and not recipe.teacher.cache:
        return "--config.teacher.param_dtype=int8, which halves the teacher"
    if room < 0.05 * target.chip.memory:
        need = worst.memory.arguments * len(target.devices) / (0.8 * target.chip.memory)
        return f"weights and optimizer alone fill the devices; about {need:.0f} devices hold them"
    if worst.program.startswith("decoding"):
        return f"--config.evaluation.batch_size={max(1, recipe.evaluation.batch_size // 2)}"
    if recipe.student.remat != "full":
        return "--config.student.remat=full"
    micro_batches = 2 * recipe.micro_batches
    if recipe.batch_size % micro_batches == 0:
        return f"--config.micro_batches={micro_batches}, the update stays the same"
    return f"--config.data.row_length={recipe.data.row_length // 2}"


def show_plan(recipe: Recipe, settings: PlanSettings) -> None:
    """Plans a recipe, prints what was found, and writes it where `settings` say.

    Raises:
      ValueError: what `find_target` and `plan` raise.
    """
    prepare_backends(settings.target)
    target = find_target(settings.target)
    if settings.dollars_per_device_hour is not None:
        chip = dataclasses.replace(target.chip, dollars=settings.dollars_per_device_hour)
        target = dataclasses.replace(target, chip=chip)
    plans = plan(recipe, target)
    print_plan(recipe, target, plans)
    if settings.json:
        as_json = {
            "target": target.name,
            "chip": dataclasses.asdict(target.chip),
            "ideal_flops": plans.ideal_flops,
            "flops_without_remat": plans.flops_without_remat,
            "host_bytes": plans.host_bytes,
        }
        for kind, group in (("programs", plans.programs), ("updates", plans.updates)):
            as_json[kind] = {name: dataclasses.asdict(p) | {"seconds": p.seconds(target)} for name, p in group.items()}
        write_json(Path(settings.json), as_json)
