"""Every check of models and chains: a broken input shows its line with the way out, and a good one passes."""

import dataclasses

import jax
import numpy as np
import pytest
from llama3_like import llama3_like
from preflight_models import (
    CHAT,
    copy_of,
    from_teacher,
    recipe_of,
    row,
    set_json,
    set_tensor,
    with_tokenizer,
    write_pair,
    write_rows,
)
from tiny_run import recipe as tiny_recipe
from tiny_run import write_teacher

import rtd_jax.models.from_hf
from rtd_jax.apps.distill import run
from rtd_jax.apps.distill.prepare import prepare
from rtd_jax.base.sharding import MeshSettings, make_mesh
from rtd_jax.data.formats import TextFormat
from rtd_jax.models.from_hf import check_params, load_config, load_params
from rtd_jax.models.model import DecoderModel
from rtd_jax.models.open import open_model
from rtd_jax.models.text_record import write_text_format
from rtd_jax.train.curriculum import stages
from rtd_jax.train.preflight import Check, chain_checks, model_checks, settle
from rtd_jax.train.splits import load_splits
from rtd_jax.train.student import ending_with, save_student, student_config


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def broken(pair, tmp_path):
    """A copy of the pair that a test may damage."""
    return copy_of(pair, tmp_path)


def opened(recipe):
    return open_model(recipe.teacher, make_mesh(MeshSettings(), jax.devices()[:1]), lambda _: None)


def of_models(recipe) -> list[Check]:
    teacher = opened(recipe)
    return model_checks(recipe, teacher, student_config(recipe.student, teacher.config))


def of_chains(recipe) -> list[Check]:
    teacher = opened(recipe)
    train, validation = load_splits(recipe.data, teacher.tokenizer)
    splits = {"training": train, "validation": validation}
    models = {"teacher": teacher.config, "student": student_config(recipe.student, teacher.config)}
    return chain_checks(recipe, stages(recipe.curriculum), splits, models, teacher.tokenizer)


def unwell(checks: list[Check]) -> list[tuple[str, str]]:
    return [(check.name, check.status) for check in checks if check.status != "ok"]


def only(checks: list[Check], name: str, status: str) -> str:
    """The line of the one check that is not ok, which has this name and status."""
    assert unwell(checks) == [(name, status)], checks
    return next(check.line for check in checks if check.status != "ok")


def test_models_that_fit_together_pass_every_check(pair):
    checks = of_models(recipe_of(pair))
    assert unwell(checks) == []
    assert [check.name for check in checks] == [
        *("teacher weights", "student weights", "tokenizer", "vocabulary rows", "same tokenizer", "special tokens"),
        *("chat template", "form of text", "token ids", "end of a chain"),
    ]
    assert all(check.line and "\n" not in check.line for check in checks)
    rows = next(check.line for check in checks if check.name == "vocabulary rows")
    padding = load_config(pair / "teacher").vocab_size - len(llama3_like())
    assert f"of the teacher ({padding} padding)" in rows
    assert padding >= 8
    assert unwell(of_models(from_teacher(recipe_of(pair)))) == []


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_weights_are_compared_with_config_json_by_their_headers(pair, broken, role, monkeypatch):
    name = "model.layers.0.mlp.up_proj.weight"
    folder, recipe = broken / role, recipe_of(broken)

    def found() -> str:
        return only(of_models(recipe), f"{role} weights", "fail")

    set_tensor(folder, name, np.zeros((8, 7), np.float32))
    assert f"{name} has shape (8, 7), but config.json makes it (8, 8)" in found()
    set_tensor(folder, name, None)
    assert f"missing tensors: {name}; left over, read by no weight of this model: none" in found()
    set_tensor(folder, name, np.zeros((8, 8), np.float32))
    set_tensor(folder, "model.layers.5.stray", np.zeros(3, np.float32))
    assert "left over, read by no weight of this model: model.layers.5.stray" in found()


def test_no_weight_is_read_for_a_check(pair, monkeypatch):
    class Unread:
        def __init__(self, tensor):
            self.tensor = tensor

        def __getitem__(self, _):
            raise AssertionError("a weight was read")

    open_tensor = rtd_jax.models.from_hf.open_tensor
    monkeypatch.setattr(rtd_jax.models.from_hf, "open_tensor", lambda *a: Unread(open_tensor(*a)))
    config = load_config(pair / "teacher")
    check_params(pair / "teacher", config)
    with pytest.raises(AssertionError, match="a weight was read"):
        load_params(pair / "teacher", config)


def test_weights_that_no_run_reads_are_not_looked_for(broken):
    recipe = recipe_of(broken)
    (broken / "teacher" / "model.safetensors").unlink()
    assert "neither model.safetensors nor" in only(of_models(recipe), "teacher weights", "fail")
    cached = dataclasses.replace(recipe, teacher=dataclasses.replace(recipe.teacher, cache=str(broken / "cache")))
    assert unwell(of_models(cached)) == []
    teacher = opened(recipe)
    absent = model_checks(recipe, teacher, student_config(recipe.student, teacher.config), has_teacher_weights=False)
    assert "are not here yet; a run downloads them when it starts" in only(absent, "teacher weights", "warn")


def test_a_tokenizer_that_cannot_be_loaded_ends_the_checks(broken):
    (broken / "teacher" / "tokenizer.json").write_text("{")
    checks = of_models(recipe_of(broken))
    assert "tokenizer.json" in only(checks, "tokenizer", "fail")
    assert checks[-1].name == "tokenizer"


def test_an_embedding_with_too_few_rows_fails(broken):
    rows = len(llama3_like()) - 4
    set_json(broken / "student" / "config.json", vocab_size=rows)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        set_tensor(broken / "student", name, np.zeros((rows, 8), np.float32))
    line = only(of_models(recipe_of(broken)), "vocabulary rows", "fail")
    assert f"that of the student has {rows}; use the tokenizer that the model was trained with, or resize" in line


def test_another_tokenizer_fails_and_another_end_of_it_warns(broken):
    llama3_like(seed=7).save_pretrained(broken / "student")
    line = only(of_models(recipe_of(broken)), "same tokenizer", "fail")
    assert "ids differ" in line
    assert "choose a student of the teacher's family" in line
    tokenizer = llama3_like()
    tokenizer.eos_token = "<|end_of_text|>"
    tokenizer.save_pretrained(broken / "student")
    checks = of_models(recipe_of(broken))
    assert ("same tokenizer", "warn") in unwell(checks)
    line = next(check.line for check in checks if check.name == "same tokenizer")
    assert "eos_token is '<|eot_id|>'" in line
    assert line.endswith("the student is saved with the teacher's tokenizer: use that one for it from now on")


def test_special_tokens_that_differ_warn(broken):
    with_tokenizer(broken / "student", lambda tokenizer: setattr(tokenizer, "pad_token", "<|end_of_text|>"))
    line = only(of_models(recipe_of(broken)), "special tokens", "warn")
    assert line.startswith("pad_token is None in teacher, '<|end_of_text|>' in student; the student is saved with")


def test_a_chat_template_is_there_and_writes_the_same(broken):
    def remove(tokenizer):
        tokenizer.chat_template = None

    def shorten(tokenizer):
        tokenizer.chat_template = tokenizer.chat_template.replace("\n\n", "\n")

    recipe = recipe_of(broken)
    with_tokenizer(broken / "student", shorten)
    line = only(of_models(recipe), "chat template", "warn")
    assert line.endswith("ask it in that form, or give both folders the same chat_template")
    with_tokenizer(broken / "student", lambda tokenizer: setattr(tokenizer, "chat_template", "{{ missing.x.y }}"))
    assert "the student's own does not work" in only(of_models(recipe), "chat template", "warn")
    with_tokenizer(broken / "student", remove)
    checks = of_models(recipe)
    assert unwell(checks) == []
    assert any("the student has none and is saved with the teacher's" in check.line for check in checks)
    with_tokenizer(broken / "teacher", remove)
    line = only(of_models(recipe), "chat template", "fail")
    assert line.endswith("has no chat template; use format kind 'plain', or an instruct model's tokenizer")


def test_another_form_of_text_than_the_teachers_own_warns(broken):
    text = TextFormat("plain", "Q: {prompt}\nA:")
    line = only(of_models(recipe_of(broken, text)), "form of text", "warn")
    assert "kind='chat', prompt_template='{prompt}'" in line
    assert "kind='plain', prompt_template='Q: {prompt}\\nA:'" in line
    write_text_format(broken / "teacher", text)
    assert unwell(of_models(recipe_of(broken, text))) == []
    (broken / "teacher" / "rtd_jax.json").unlink()
    assert unwell(of_models(recipe_of(broken, text))) == []


def test_ids_of_a_folders_files_are_compared(broken):
    recipe, end_of_text = recipe_of(broken), llama3_like().convert_tokens_to_ids("<|end_of_text|>")
    set_json(broken / "teacher" / "config.json", bos_token_id=7)
    assert "bos_token_id is 7 in config.json, 0 in the tokenizer" in only(of_models(recipe), "token ids", "warn")
    set_json(broken / "teacher" / "config.json", bos_token_id=0)
    set_json(broken / "student" / "config.json", pad_token_id=5)
    set_json(broken / "student" / "generation_config.json", pad_token_id=6)
    line = only(of_models(recipe), "token ids", "warn")
    assert line.startswith(f"{broken / 'student'}: pad_token_id is 5 in config.json, 6 in generation_config.json; ")
    set_json(broken / "student" / "generation_config.json", pad_token_id=5)
    assert unwell(of_models(recipe)) == []
    set_json(broken / "student" / "config.json", eos_token_id=end_of_text)
    checks = of_models(recipe)
    assert unwell(checks) == [("token ids", "warn"), ("end of a chain", "warn")]
    line = next(check.line for check in checks if check.name == "token ids")
    assert "stop at '<|end_of_text|>' (1), but the tokenizer's eos_token is '<|eot_id|>' (4); add it" in line


def test_the_end_of_a_chain_is_one_at_which_generations_stop(broken):
    config, recipe = broken / "teacher" / "config.json", recipe_of(broken)
    set_json(config, eos_token_id=1)
    line = only(of_models(recipe), "end of a chain", "fail")
    assert "chains end with '<|eot_id|>' (4), but" in line
    assert "generations stop at '<|end_of_text|>' (1); one of the two is wrong: set eos_token_id in config.json" in line
    set_json(broken / "teacher" / "generation_config.json", eos_token_id=[1, 4])  # as Llama-3's first release had it
    assert unwell(of_models(recipe)) == []

    # A template that ends a turn with another token than the tokenizer's end of sequence.
    (broken / "teacher" / "generation_config.json").unlink()
    for role in ("teacher", "student"):
        with_tokenizer(broken / role, lambda tokenizer: setattr(tokenizer, "eos_token", "<|end_of_text|>"))
    set_json(broken / "student" / "config.json", eos_token_id=[1, 4])
    line = only(of_models(recipe), "end of a chain", "warn")
    assert line.endswith("so a server would let the teacher write on; add 4 to its eos_token_id")
    set_json(config, eos_token_id=None)
    line = only(of_models(recipe), "end of a chain", "warn")
    assert "config.json has no eos_token_id" in line


def test_a_student_that_stops_elsewhere_is_saved_with_the_end_of_its_chains(broken, tmp_path):
    """A base model that learns from an instruct teacher: the usual case."""
    set_json(broken / "student" / "config.json", eos_token_id=1)
    with_tokenizer(broken / "student", lambda tokenizer: setattr(tokenizer, "eos_token", "<|end_of_text|>"))
    recipe = recipe_of(broken)
    line = next(check.line for check in of_models(recipe) if check.name == "end of a chain")
    assert "the student is saved with 4 beside these in its eos_token_id" in line
    config = load_config(broken / "student")
    model, params = DecoderModel(config), load_params(broken / "student", config)
    save_student(tmp_path, recipe.student, model, params, opened(recipe).tokenizer, CHAT)
    assert load_config(tmp_path / "student").eos_token_id == (1, 4)
    again = load_config(tmp_path / "student")
    assert ending_with(again, 4) is again
    assert ending_with(dataclasses.replace(config, eos_token_id=None), 4).eos_token_id == 4


def test_chains_that_fit_pass_every_check(pair, monkeypatch):
    monkeypatch.setattr("rtd_jax.train.curriculum.FEW_PROBLEMS", 2)
    checks = of_chains(recipe_of(pair))
    assert unwell(checks) == []
    assert [check.name for check in checks] == ["longest chain", "positions", "curriculum", "markup"]
    assert "training chains by steps: 4 of 1, 4 of 2" in checks[2].line


def test_chains_are_compared_with_row_positions_and_curriculum(broken, monkeypatch):
    monkeypatch.setattr("rtd_jax.train.curriculum.FEW_PROBLEMS", 2)
    write_rows(broken, "train", [*(row(number, 1 + number % 2) for number in range(8)), row(1, 9)])
    line = only(of_chains(recipe_of(broken, max_dropped_fraction=0.5)), "longest chain", "warn")
    assert line.startswith("training: 1 chains longer than a row of 128 tokens were left out, none is cut; ")
    longest = int(line.rpartition("data.row_length=")[2].split()[0])
    assert unwell(of_chains(recipe_of(broken, row_length=longest))) == []
    with pytest.raises(ValueError, match=f"a row_length of {longest} would hold all"):
        of_chains(recipe_of(broken, row_length=longest - 1))

    set_json(broken / "student" / "config.json", max_position_embeddings=40)
    line = only(of_chains(recipe_of(broken, row_length=longest)), "positions", "warn")
    assert f"chains have up to {longest} tokens, but the student was made for 40" in line
    set_json(broken / "student" / "config.json", max_position_embeddings=4000)

    whole = recipe_of(broken, depths=(1, 2, 3, 4), row_length=longest)
    line = only(of_chains(whole), "curriculum", "fail")
    assert "stage 3 has no training chain: the chains have [1, 2, 9] steps. Set curriculum.depths" in line
    monkeypatch.setattr("rtd_jax.train.curriculum.FEW_PROBLEMS", 100)
    line = only(of_chains(recipe_of(broken, row_length=longest)), "curriculum", "warn")
    assert line.endswith("set curriculum.enabled=False to train on all depths at once")


def test_conversations_that_stand_in_the_data_as_text_warn(broken, monkeypatch):
    monkeypatch.setattr("rtd_jax.train.curriculum.FEW_PROBLEMS", 2)
    rows = [row(number, 1 + number % 2, "<|im_start|>user") for number in range(8)]
    write_rows(broken, "train", rows)
    line = only(of_chains(recipe_of(broken)), "markup", "warn")
    assert line.startswith("8 chains have '<|im_start|>' in them, which is ordinary text to the tokenizer")
    assert "set data.text.kind='chat'" in line


def test_a_run_stops_at_what_fails_and_notes_what_warns():
    notes: list[str] = []
    settle([Check("a", "ok", "fine"), Check("b", "warn", "odd; mend it")], notes.append)
    assert notes == ["warning: b: odd; mend it"]
    settle([Check("a", "ok", "fine")], notes.append)
    assert len(notes) == 1
    with pytest.raises(ValueError, match=r"^bad; mend it$"):
        settle([Check("a", "fail", "bad; mend it"), Check("b", "warn", "odd")], notes.append)
    with pytest.raises(ValueError, match=r"^2 checks fail: bad \| worse$"):
        settle([Check("a", "fail", "bad"), Check("b", "fail", "worse")], notes.append)


def test_training_makes_the_checks_in_its_first_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr("rtd_jax.train.curriculum.FEW_PROBLEMS", 2)

    def refuse(*_):
        raise AssertionError("the run went on")

    settings, notes = tiny_recipe(write_teacher(tmp_path / "teacher")), []
    prepare(settings, notes.append)
    assert not any("warning" in note for note in notes), notes
    monkeypatch.setattr("rtd_jax.apps.distill.prepare.load_splits", refuse)
    write_text_format(tmp_path / "teacher", TextFormat("plain", "Q: {prompt}\nA:"))
    notes.clear()
    with pytest.raises(AssertionError, match="the run went on"):
        prepare(settings, notes.append)
    assert [note for note in notes if "warning" in note] == [notes[0]]
    assert notes[0].startswith("warning: form of text: the teacher was trained on another form of text")
    set_json(tmp_path / "teacher" / "config.json", eos_token_id=5)
    with pytest.raises(ValueError, match=r"chains end with '<eos>'.*one of the two is wrong"):
        run.train(settings, tmp_path / "run")
