"""Plans count loops as often as they run, and collectives by what they deliver; and what the step must not move."""

import dataclasses
import importlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rtd_jax.apps.plan.cost import Plan
from rtd_jax.apps.plan.drawing import Draw, drawing_rows, plan_drawing
from rtd_jax.apps.plan.plan import ideal_flops, plan, print_plan, verdict
from rtd_jax.apps.plan.program import Hlo, Memory, matmul_flops, memory, shape_bytes
from rtd_jax.apps.plan.targets import find_target
from rtd_jax.base.settings import build
from rtd_jax.base.sharding import MeshSettings, make_mesh
from rtd_jax.eval.decoding.placement import for_writing
from rtd_jax.train.abstract import abstract_step, architecture
from rtd_jax.train.recipe import Recipe, TeacherSettings

ROOT = Path(__file__).resolve().parents[1]
# Sizes that occur nowhere else, so that an array is known by its shape.
LAYERS, VOCAB, TEACHER_WIDTH, STUDENT_WIDTH, ROWS, LENGTH, CHUNK = 6, 1056, 96, 80, 16, 128, 16
CONFIG = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": TEACHER_WIDTH,
    "intermediate_size": 192,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 12,
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    folder = tmp_path_factory.mktemp("teacher")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    config = importlib.import_module("configs.rtd_tiny").get_config()
    config.teacher.path = str(folder)
    sizes = {"width": STUDENT_WIDTH, "mlp_width": 160, "heads": 8, "kv_heads": 4, "head_dim": 10}
    config.student.update({"init": "random", "layers": LAYERS, "remat": "full", **sizes})
    config.data.update({"row_length": LENGTH, "chains_per_row": 2})
    config.loss.chunk_length = CHUNK
    config.batch_size = ROWS
    config.evaluation.update({"batch_size": 8, "max_new_tokens": 16})
    return build(Recipe, config.to_dict())


def test_scans_and_recomputation_are_counted_as_often_as_they_run():
    def loss(w_NDD, x_BD):
        @jax.checkpoint
        def layer(x_BD, w_DD):
            return jnp.sin(x_BD @ w_DD), None

        return jnp.sum(jax.lax.scan(layer, x_BD, w_NDD)[0])

    w, x = jax.ShapeDtypeStruct((5, 8, 8), jnp.float32), jax.ShapeDtypeStruct((3, 8), jnp.float32)
    one = 2 * 3 * 8 * 8
    assert matmul_flops(jax.jit(loss).trace(w, x).jaxpr.jaxpr) == 5 * one
    # Forward, recomputed forward, and two products backward.
    assert matmul_flops(jax.jit(jax.grad(loss, argnums=(0, 1))).trace(w, x).jaxpr.jaxpr) == 5 * 4 * one


def test_collectives_in_a_loop_count_once_for_each_turn():
    mesh = make_mesh(MeshSettings(data=1, fsdp=8))
    sharded = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    w = jax.ShapeDtypeStruct((7, 64, 16), jnp.float32, sharding=sharded)
    x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))

    def loop(w_NDE, x_BD):
        def body(x_BD, w_DE):
            whole = jax.lax.with_sharding_constraint(w_DE, NamedSharding(mesh, PartitionSpec()))
            return jnp.sin(x_BD @ whole @ whole.T), None

        return jax.lax.scan(body, x_BD, w_NDE)[0]

    compiled = jax.jit(loop).lower(w, x).compile()
    gathers = [c for c in Hlo(compiled.as_text()).collectives() if c.kind == "all-gather"]
    assert sum(c.bytes * c.times for c in gathers) == 7 * 64 * 16 * 4
    assert memory(compiled).arguments == (7 * 8 * 16 + 64) * 4


def _collective(instruction: str, header: str = "HloModule m, num_partitions=8"):
    (found,) = Hlo(
        f"{header}\n\nENTRY %main (p: f32[4]) -> f32[4] {{\n  %c = f32[100]{{0}} {instruction}\n}}\n"
    ).collectives()
    return found


@pytest.mark.parametrize(
    ("attributes", "group"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", 2),
        ("replica_groups={{0,2,4,6},{1,3,5,7}}, use_global_device_ids=true", 4),
        ("channel_id=1, replica_groups={{0,1,2},{3}}, use_global_device_ids=true", 3),
        ("replica_groups={{0},{1},{2},{3}}", 1),
        ("replica_groups={}, use_global_device_ids=true", None),
        ("dimensions={0}", None),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", 2),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1), use_global_device_ids=true", 2),
        ("replica_groups=[1,8]<=[8]", 8),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}, use_global_device_ids=true", 4),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a','b'}, dimensions={1}", 8),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", 2),
        ("replica_groups=mesh[x=2,y=4] {y}", 4),
        # Of the replicas, of which there is one; all of its partitions take part.
        ("channel_id=3, replica_groups={{0}}", 8),
    ],
)
def test_a_collective_costs_what_its_group_exchanges(attributes, group):
    """In each form in which XLA writes groups; of 400 bytes of results in groups of n, (n - 1) / n come from others."""
    for start in ("", "-start"):
        found = _collective(f'all-gather{start}(%p), metadata={{op_name="replica"}}, {attributes}')
        assert found.group == group
        of_all = 8 if group is None else group
        assert found.wire_bytes(8) == 400 * (of_all - 1) / of_all
    assert _collective(f"all-reduce(%p), {attributes}").wire_bytes(8) == 2 * 400 * (of_all - 1) / of_all
    assert _collective(f"reduce-scatter(%p), {attributes}").wire_bytes(8) == 400 * (of_all - 1)


@pytest.mark.parametrize(
    ("pairs", "sent"),
    [("{{0,1},{1,0}}", 400), ("{{0,0},{1,1}}", 0), ("{{0,0},{1,2},{2,1}}", 400), ("{}", 0)],
)
def test_a_permutation_sends_what_leaves_its_device(pairs, sent):
    found = _collective(f"collective-permute(%p), channel_id=1, source_target_pairs={pairs}")
    assert found.wire_bytes(8) == sent


def test_groups_of_a_mesh_of_two_axes_are_those_of_its_axes():
    """Gathered over 4 of 8 devices and over 2, and summed over 4: as compiled, in whatever form groups are written."""
    mesh = make_mesh(MeshSettings(data=1, fsdp=4, tensor=2))

    def placed(x, *axes):
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))

    def wire(function, *axes):
        x = jax.ShapeDtypeStruct((16, 16), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*axes)))
        found = Hlo(jax.jit(function).lower(x).compile().as_text()).collectives()
        return sum(collective.wire_bytes(8) * collective.times for collective in found)

    assert wire(lambda x: placed(x, None, "tensor"), "fsdp", "tensor") == 16 * 16 * 4 / 2 * 3 / 4
    assert wire(lambda x: placed(x, "fsdp", None), "fsdp", "tensor") == 16 * 16 * 4 / 4 / 2
    assert wire(lambda x: placed(jnp.sum(x, axis=0), "tensor"), "fsdp", "tensor") == 2 * (16 / 2 * 4) * 3 / 4


def test_bytes_of_shapes():
    assert shape_bytes("(bf16[2,3]{1,0}, f32[4]{0}, pred[])") == 12 + 16 + 1


def cached(recipe: Recipe, **changes) -> Recipe:
    return dataclasses.replace(recipe, teacher=dataclasses.replace(recipe.teacher, cache="not/there"), **changes)


@pytest.mark.parametrize(
    ("sizes", "changes"),
    [
        ((1, 8, 1), {}),
        ((1, 2, 4), {}),
        ((2, 2, 2), {}),
        ((2, 2, 2), {"cached": True}),
        ((1, 2, 4), {"cached": True, "micro_batches": 2}),
    ],
)
def test_no_collective_moves_logits_or_a_stack_of_layers(recipe, sizes, changes):
    mesh = make_mesh(MeshSettings(*sizes))
    recipe = cached(recipe, **changes) if changes.pop("cached", False) else recipe
    abstract = abstract_step(recipe, mesh)
    compiled = abstract.step.lower(*abstract.arguments).compile()
    collectives = Hlo(compiled.as_text()).collectives()
    assert collectives
    tokens = {ROWS, LENGTH, CHUNK, *(ROWS // n for n in (2, 4, 8)), ROWS * CHUNK}
    for collective in collectives:
        for dimensions in re.findall(r"\[([\d,]+)\]", collective.shape):
            shape = [int(size) for size in dimensions.split(",")]
            of_vocabulary = {VOCAB, VOCAB // sizes[2]} & set(shape)
            # Heads and embeddings are moved, [D, V]; so are sums over the vocabulary, [B, L]. Logits never are.
            assert not of_vocabulary or not tokens & set(shape), collective
            if LAYERS in shape:  # norms are not spread, so their gradients are summed as they lie
                assert math.prod(shape) == LAYERS * STUDENT_WIDTH, collective


def test_a_plan_of_the_whole_recipe(recipe, capsys):
    target = find_target("cpu:8")
    found = plan(recipe, target)
    assert set(found.programs) == {"update", "validation", "decoding (teacher)"}
    assert found.flops_without_remat / found.ideal_flops == pytest.approx(1.0, abs=0.05)
    update = found.programs["update"]
    assert update.flops * 8 > 1.05 * found.flops_without_remat  # remat=full recomputes the student's layers
    assert update.bytes_moved > update.memory.arguments
    # The optimizer's two moments stay where they are while the teacher decodes.
    assert found.programs["decoding (teacher)"].resident > 2 * found.programs["validation"].resident / 2.1
    print_plan(recipe, target, found)
    assert "FITS on cpu:8" in capsys.readouterr().out


def test_a_plan_from_a_cache_holds_no_teacher_and_stands_beside_the_online_one(recipe, capsys):
    target = find_target("cpu:8")
    found = plan(cached(recipe), target)
    assert set(found.programs) == {"update", "validation", "decoding (student)"}
    online, from_cache = found.updates["online"], found.updates["cached"]
    assert from_cache is found.programs["update"]
    # The teacher's weights are not there; the outputs of one batch are.
    config = architecture(recipe.teacher.path)
    weights = 4 * (LAYERS * (TEACHER_WIDTH * 12 * (16 + 8) + 3 * TEACHER_WIDTH * 192) + 2 * TEACHER_WIDTH * VOCAB) / 8
    weights += 4 * (2 * LAYERS + 1) * TEACHER_WIDTH  # norms are not spread
    outputs = ROWS * LENGTH * (64 * 8 + 2 * 4) / 8 + ROWS * 2 * 17 * TEACHER_WIDTH * 4 / 8
    saved = online.memory.arguments - from_cache.memory.arguments
    assert saved == weights - outputs
    # Nor is its arithmetic: what is left are three passes of the student, of which remat repeats part of one.
    assert found.flops_without_remat == pytest.approx(found.ideal_flops, rel=0.05)
    assert (online.flops - from_cache.flops) * 8 == pytest.approx(
        ideal_flops(recipe, config, config) - ideal_flops(recipe, None, config), rel=0.05
    )
    print_plan(cached(recipe), target, found)
    shown = capsys.readouterr().out
    assert "teacher online, and read from a cache" in shown
    assert f"{from_cache.flops / online.flops:.2f}" in shown


def test_a_plan_of_drawing_by_hand(recipe):
    """8 prompts, 4 texts of each, 16 tokens long, 16 slots, on eight devices that hold a part of every weight."""
    target = find_target("cpu:8")
    mesh = make_mesh(MeshSettings(1, 1, 8), target.devices)
    abstract = abstract_step(recipe, mesh)
    model, params = for_writing(abstract.student, abstract.state.params["student"], mesh)
    draw = Draw(prompts=8, samples=4, prompt_length=60, max_new_tokens=16, slots=16, updates=5)
    found = plan_drawing(model, params, VOCAB, draw, mesh)
    assert (draw.steps, found.readings) == (2 * 16, 8)  # a sixteenth of 16 slots: one prompt is read at a time
    weights = LAYERS * (STUDENT_WIDTH * 10 * (16 + 8) + 3 * STUDENT_WIDTH * 160)
    attention = 4 * LAYERS * 8 * 10 * (64 + 16)
    assert found.step.flops * 8 == 16 * (2 * (weights + STUDENT_WIDTH * VOCAB) + attention)
    assert found.reading.flops * 8 == 64 * (2 * weights + 4 * LAYERS * 8 * 10 * 64)
    assert found.flops == 32 * found.step.flops + 8 * found.reading.flops
    # A step is given the caches; the whole program makes them. Heads are too few for the devices, so rows are spread.
    caches = 2 * LAYERS * 16 * 4 * (64 + 16) * 10 * 4 / 8
    weights = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(params))
    assert 0 < found.step.memory.arguments - weights - caches < 4096
    assert found.whole.memory.temporaries > caches
    step, reading = (max(plan.seconds(target).values()) for plan in (found.step, found.reading))
    assert found.seconds(target) == pytest.approx(32 * step + 8 * reading)
    half = dataclasses.replace(
        found.step, flops=found.seconds(target) / 5 * target.chip.flops, bytes_moved=0, wire_bytes=0
    )
    assert found.share(target, half) == pytest.approx(0.5)
    assert dict(drawing_rows(found, target, half))["share of an update's time"] == "50.0%"


def test_writing_gathers_no_weights(recipe):
    """As training spreads them, a step gathers every layer; in the copy for writing only activations travel."""
    mesh = make_mesh(MeshSettings(1, 8, 1))
    abstract = abstract_step(recipe, mesh)
    params = abstract.state.params["student"]
    draw = Draw(prompts=8, samples=1, prompt_length=60, max_new_tokens=16, slots=16)
    trained = plan_drawing(abstract.student, params, VOCAB, draw, mesh)
    copied = plan_drawing(*for_writing(abstract.student, params, mesh), VOCAB, draw, mesh)
    layers = 4 * LAYERS * (STUDENT_WIDTH * 10 * (16 + 8) + 3 * STUDENT_WIDTH * 160)
    assert trained.step.wire_bytes > layers * 7 / 8
    assert copied.step.wire_bytes < layers / 3  # heads are too few for eight devices


def test_ideal_flops_by_hand(recipe):
    config = architecture(recipe.teacher.path)
    weights = 6 * (96 * 12 * (16 + 8) + 3 * 96 * 192) + 96 * VOCAB
    per_token = 2 * weights + 4 * 6 * 8 * 12 * LENGTH
    assert ideal_flops(recipe, config, config) == ROWS * LENGTH * 4 * per_token


@pytest.mark.parametrize(
    ("program", "changes", "arguments", "says"),
    [
        ("update", {}, 90, "--config.teacher.param_dtype=int8, which halves the teacher"),
        ("update", {}, 50, "--config.micro_batches=2"),
        ("update", {"micro_batches": 16}, 50, "--config.data.row_length=64"),
        ("decoding (teacher)", {}, 50, "--config.evaluation.batch_size=4"),
        (
            "update",
            {"teacher": TeacherSettings("x", "int8")},
            98,
            "weights and optimizer alone fill the devices; about 10 devices hold them",
        ),
    ],
)
def test_what_does_not_fit_says_what_to_turn(recipe, program, changes, arguments, says):
    target = find_target("cpu:8")
    target = dataclasses.replace(target, chip=dataclasses.replace(target.chip, memory=100 * 2**30))
    size = Memory(arguments * 2**30, 0, 0, 110 * 2**30)
    too_large = Plan(program, 0.0, size, 0.0, 0.0, 0.0, {}, 0.0)
    found = verdict(dataclasses.replace(recipe, **changes), target, {program: too_large})
    assert found.startswith(f"DOES NOT FIT on cpu:8: {program} is 10.0 GiB over. Next: {says}")


def test_sizes_are_known_by_name_or_refused_with_the_names():
    assert architecture("meta-llama/Meta-Llama-3-70B-Instruct").layers == 80
    with pytest.raises(ValueError, match="sizes of 'some/model' are not known here; give a folder"):
        architecture("some/model")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("b200:8", "unknown; use one of a100-80gb:8"),
        ("a100-80gb:2x2", "no size of the form of a100-80gb:8"),
        ("cpu:99", "cpu:99 needs"),
    ],
)
def test_targets_that_do_not_exist_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        find_target(text)


def test_the_command(tmp_path):
    command = [sys.executable, "launch/plan.py", "--config=configs/rtd_tiny.py", "--target=cpu:2"]
    numbers = tmp_path / "plan.json"
    run = subprocess.run([*command, f"--json={numbers}"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "FITS on cpu:2" in run.stdout
    assert json.loads(numbers.read_text())["programs"]["update"]["memory"]["peak"] > 10**6
