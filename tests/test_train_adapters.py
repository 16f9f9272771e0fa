"""Training an adapter: what moves and what stays, on any mesh; what is saved, resumed, merged and refused."""

import dataclasses
import json
import re
import shutil
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from test_train_update import OPTIMIZER, PACKED, TEACHER, TEACHER_PARAMS, TOKENIZER, VOCAB
from tiny_run import recipe, write_teacher

from rtd_jax.apps.distill.ensemble_recipe import EnsembleRecipe, NoEnsemble, check_ensemble
from rtd_jax.apps.distill.prepare import prepare
from rtd_jax.apps.distill.run import train
from rtd_jax.apps.plan.plan import ideal_flops
from rtd_jax.apps.pretrain import SizeSettings, model_config
from rtd_jax.base.settings import unread_settings
from rtd_jax.base.sharding import MeshSettings, make_mesh, put_batch, to_host
from rtd_jax.methods import LossSettings
from rtd_jax.methods.own_chains import OnPolicySettings
from rtd_jax.methods.term import Setup
from rtd_jax.models.adapters import AdapterSettings
from rtd_jax.models.from_hf import load_config, load_params
from rtd_jax.models.model import DecoderModel
from rtd_jax.models.to_hf import save_pretrained
from rtd_jax.train.abstract import abstract_step, bytes_on_device
from rtd_jax.train.checkpoints import numbered
from rtd_jax.train.curriculum import CurriculumSettings
from rtd_jax.train.recipe import StudentSettings
from rtd_jax.train.saved_models import load_model
from rtd_jax.train.state import create_state, state_shardings
from rtd_jax.train.update import UpdateSettings, make_train_step

# Sizes that occur nowhere else, so that an array is known by its shape in a compiled program.
SIZES = model_config(SizeSettings(layers=3, width=16, mlp_width=40, heads=2, kv_heads=2, head_dim=8), TOKENIZER)
STACKED, HEAD = "[3,16,40]", f"[16,{VOCAB}]"


def student(base_dtype: str, remat: str = "none") -> DecoderModel:
    return DecoderModel(SIZES, remat=remat, adapter=AdapterSettings(rank=2, base_dtype=base_dtype))


def objective(mesh=None):
    return LossSettings().objective(Setup(SIZES, TEACHER.config, VOCAB, mesh=mesh))


def start(model: DecoderModel):
    """The state before the first update, with a B that is not zero: else A has no gradient."""
    key = jax.random.PRNGKey(0)
    params = jax.jit(model.init)(key)
    params["adapter"] = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(key, x.shape), params["adapter"])
    return create_state({"student": params, **objective().init_params(key, 16, 32)}, OPTIMIZER, key)


def updated(base_dtype: str, sizes=(1, 1, 1), micro_batches: int = 1, updates: int = 2):
    """(the state before, the state after)."""
    model, mesh = student(base_dtype), make_mesh(MeshSettings(*sizes), jax.devices()[: int(np.prod(sizes))])
    before, teacher = jax.device_get((start(model), TEACHER_PARAMS))
    wanted = objective(mesh)
    shardings = state_shardings(jax.eval_shape(lambda: before), OPTIMIZER, mesh, wanted.param_axes())
    state = jax.device_put(before, shardings)
    step = make_train_step(model, TEACHER, OPTIMIZER, wanted, UpdateSettings(micro_batches), mesh)
    for _ in range(updates):
        state, _ = step(state, teacher, put_batch(PACKED, mesh), wanted.coefficients())
    assert mesh.size == 1 or step._cache_size() == 1
    return before, to_host(state)


@pytest.fixture(scope="module")
def single():
    return {base_dtype: updated(base_dtype) for base_dtype in ("float32", "int4")}


@pytest.mark.parametrize("base_dtype", ["float32", "int4"])
def test_the_base_stays_to_the_bit_and_all_else_moves(single, base_dtype):
    before, after = single[base_dtype]
    chex.assert_trees_all_equal(after.params["student"]["base"], before.params["student"]["base"])
    moved = [{name: x for name, x in state.params.items() if name != "student"} for state in (before, after)]
    for state, part in zip((before, after), moved, strict=True):
        part["adapter"] = state.params["student"]["adapter"]
    for old, new in zip(*map(jax.tree.leaves, moved), strict=True):
        assert np.abs(old - new).max() > 1e-4
    moments = [x.shape for x in jax.tree.leaves(after.opt_state) if x.ndim]
    assert sorted(moments) == sorted(2 * [x.shape for x in jax.tree.leaves(moved[1])])


@pytest.mark.parametrize(
    ("base_dtype", "sizes", "micro_batches"),
    [("float32", (1, 8, 1), 1), ("int4", (2, 2, 2), 2)],
)
def test_any_mesh_and_any_number_of_micro_batches_give_the_same_update(single, base_dtype, sizes, micro_batches):
    _, want = single[base_dtype]
    _, got = updated(base_dtype, sizes, micro_batches)
    for x, y in zip(jax.tree.leaves(got.params), jax.tree.leaves(want.params), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("remat", "micro_batches"), [("none", 1), ("full", 2)])
def test_no_float_of_the_size_of_the_base_is_in_the_compiled_update(remat, micro_batches):
    """Neither a gradient nor a moment, nor a float copy of all layers, nor a gradient of the head."""

    def compiled(model: DecoderModel) -> str:
        state = jax.eval_shape((lambda: start(model)) if model.adapter else whole)
        step = make_train_step(model, TEACHER, OPTIMIZER, objective(), UpdateSettings(micro_batches))
        batch = jax.tree.map(jnp.asarray, PACKED)
        return step.lower(state, TEACHER_PARAMS, batch, objective().coefficients()).compile().as_text()

    def whole():
        key = jax.random.PRNGKey(0)
        params = {"student": DecoderModel(SIZES).init(key), **objective().init_params(key, 16, 32)}
        return create_state(params, OPTIMIZER, key)

    def sums(text: str) -> int:
        return len(re.findall(rf"= f32{re.escape(HEAD[:1] + '1,' + HEAD[1:])}\S* add\(", text))

    text, other = compiled(student("int8", remat)), compiled(DecoderModel(SIZES, remat=remat))
    assert f"s8{STACKED}" in text
    assert f"f32{STACKED}" not in text
    assert f"f32{STACKED}" in other  # what training all weights has
    assert sums(text) == 0
    assert sums(other) > 0


ADAPTER = AdapterSettings(rank=2, base_dtype="float32")
STUDENT = StudentSettings("teacher_layers", layers=2, compute_dtype="float32", adapter=ADAPTER)
AT_ONCE = CurriculumSettings(enabled=False, validate_every=4, validation_chains=8)
FOLDERS = ("student", "student_adapter", "student_base")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    teacher = write_teacher(tmp_path_factory.mktemp("adapters") / "teacher")
    return recipe(teacher, student=STUDENT, curriculum=AT_ONCE)


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("adapters") / "run"
    train(settings, workdir)
    return workdir


def folder_params(folder):
    return load_params(folder, load_config(folder))


def test_the_folders_of_a_run_are_one_model(finished, settings):
    """student/ is student_base/ with student_adapter/ by peft, and what a stage checkpoint opens as."""
    assert not (finished / "student_float").exists()
    tokens = torch.arange(24).reshape(2, 12)
    base, whole = (
        transformers.AutoModelForCausalLM.from_pretrained(finished / name, dtype=torch.float32)
        for name in ("student_base", "student")
    )
    with torch.no_grad():
        before, want = base(tokens).logits.numpy(), whole(tokens).logits.numpy()
        got = peft.PeftModel.from_pretrained(base, finished / "student_adapter")(tokens).logits.numpy()
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()
    assert np.abs(before - want).max() > 1e-3 * np.abs(want).max()
    content = json.loads((finished / "student_adapter" / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == str(finished / "student_base")
    chex.assert_trees_all_equal(folder_params(finished / "student_base"), folder_params(settings.teacher.path))
    opened = load_model(str(finished))
    assert opened.model.adapter is None
    chex.assert_trees_all_close(jax.device_get(opened.params), folder_params(finished / "student"), rtol=1e-6)


def test_it_learns_and_a_resumed_run_has_the_same_bits_on_another_mesh(finished, settings, tmp_path):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    losses = [line["distill/hard_loss"] for line in lines if "distill/hard_loss" in line]
    assert losses[-1] < losses[0]
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    for name in FOLDERS:
        shutil.rmtree(workdir / name)
    (workdir / "report.json").unlink()
    shutil.rmtree(workdir / "checkpoints" / "stages")
    rolling = numbered(workdir / "checkpoints" / "rolling")[-1]
    assert rolling.name == "8"
    arrays = json.loads((rolling / "meta" / "metadata").read_text())["arrays"]
    assert any("student/adapter/layers" in name for name in arrays)
    assert not any("base" in name for name in arrays)
    train(settings, workdir)
    for name in ("student", "student_base"):
        chex.assert_trees_all_equal(folder_params(workdir / name), folder_params(finished / name))
    both = [(folder / "student_adapter" / "adapter_model.safetensors").read_bytes() for folder in (workdir, finished)]
    assert both[0] == both[1]


def test_another_base_is_refused_by_name(finished, settings, tmp_path):
    """The teacher is the same, and so are the settings; the student's folder has other weights than it had."""
    run, folder = tmp_path / "run", tmp_path / "base"
    shutil.copytree(finished / "student_base", folder)
    pretrained = replace(settings, student=StudentSettings("pretrained", path=str(folder), compute_dtype="float32"))
    pretrained = replace(pretrained, student=replace(pretrained.student, adapter=replace(ADAPTER, base_dtype="int8")))
    train(replace(pretrained, total_updates=5), run)
    assert not (run / "student_base").exists()
    content = json.loads((run / "student_adapter" / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == str(folder)
    tokenizer = prepare(settings, lambda _: None)[0].tokenizer
    other = DecoderModel(load_config(folder)).init(jax.random.key(7))
    save_pretrained(folder, load_config(folder), other, tokenizer=tokenizer)
    shutil.rmtree(run / "checkpoints" / "stages")
    with pytest.raises(
        ValueError, match=r"rolling.4 was made with another frozen base \(fingerprint \w{12}, now \w{12}\)"
    ):
        train(replace(pretrained, total_updates=5), run)


def test_own_chains_are_written_by_the_merged_student(settings, tmp_path):
    own = OnPolicySettings(fraction=0.5, updates_per_refresh=2, max_new_tokens=8, batch_size=4)
    changes = {"total_updates": 2, "batch_size": 16, "on_policy": own, "loss": LossSettings(chunk_length=32)}
    evaluation = replace(settings.evaluation, drift_problems=2, every=1, curve_problems=1)
    report = train(replace(settings, evaluation=evaluation, **changes), tmp_path / "run")
    assert "drift" in json.loads(report.read_text())


def test_it_is_planned(settings):
    """The state has the base's bytes and no more than the adapter's moments."""
    planned = replace(settings, student=replace(STUDENT, adapter=replace(ADAPTER, base_dtype="int4")))
    abstract = abstract_step(planned, make_mesh(settings.mesh))
    assert abstract.student.adapter == planned.student.adapter
    gate = abstract.state.params["student"]["base"]["layers"]["mlp"]["gate"].qvalue
    assert bytes_on_device(gate) == 2 * 32 * 48 / 2 / len(gate.sharding.device_set)
    whole = abstract_step(
        replace(settings, student=replace(STUDENT, adapter=AdapterSettings())), make_mesh(settings.mesh)
    )
    moments = [sum(map(bytes_on_device, jax.tree.leaves(x.state.opt_state))) for x in (abstract, whole)]
    assert moments[0] < 0.5 * moments[1]
    sizes = (None, abstract.student.config)
    assert ideal_flops(planned, *sizes) == pytest.approx(2 / 3 * ideal_flops(whole_recipe(settings), *sizes))


def whole_recipe(settings):
    return replace(settings, student=replace(STUDENT, adapter=AdapterSettings()))


def test_what_has_no_adapter_is_refused_by_name(settings, finished):
    random = {"layers": 2, "width": 16, "mlp_width": 24, "heads": 2, "kv_heads": 2, "head_dim": 8}
    with pytest.raises(ValueError, match=r"adapter\.rank is 2, but init is 'random'"):
        StudentSettings("random", adapter=ADAPTER, **random)
    with pytest.raises(ValueError, match=r"adapter\.rank is 2 and quantization 'int8'"):
        replace(STUDENT, quantization="int8")
    with pytest.raises(ValueError, match=r"student\.adapter\.rank is 40, but the matrices 'q' of this model"):
        prepare(replace(settings, student=replace(STUDENT, adapter=AdapterSettings(rank=40))), lambda _: None)
    values = {x.name: getattr(settings, x.name) for x in dataclasses.fields(settings)}
    with pytest.raises(NoEnsemble, match=r"student\.adapter\.rank is not 0, and each member would hold"):
        check_ensemble(EnsembleRecipe(**values, seeds=(0, 1)))
    assert unread_settings(whole_recipe(settings))["student.adapter.alpha"] == "student.adapter.rank is 0"
    assert "student.adapter.alpha" not in unread_settings(settings)
