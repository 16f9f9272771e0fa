"""A diagnosis end to end on tiny models: itself, its int8 version, a run's checkpoint; and the verdicts."""

import json

import numpy as np
import pytest
from chromium import browser, open_page
from tiny_run import recipe, write_teacher

from rtd_jax.assessment.diagnose import DiagnoseSettings, diagnose
from rtd_jax.assessment.findings import measure, verdict
from rtd_jax.assessment.models import boundary_states, load_model
from rtd_jax.data.formats import TextFormat
from rtd_jax.data.synthetic import generate
from rtd_jax.data.tiny_tokenizer import TINY_FORMAT
from rtd_jax.data.tokens import encode_traces
from rtd_jax.evaluation.cka import linear_cka
from rtd_jax.evaluation.drift import BoundaryStates
from rtd_jax.training.run import train

SHORT = {"limit": 24, "max_new_tokens": 4, "batch_size": 24, "resamples": 20}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher") / "model")


@pytest.fixture(scope="module")
def finished(teacher, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "tiny"
    train(recipe(teacher), workdir)
    return workdir


def run(teacher, student, out, **changes):
    options = SHORT | {"prompt_template": TINY_FORMAT.prompt_template} | changes
    path = diagnose(DiagnoseSettings(str(teacher), str(student), out=str(out), **options), note=lambda _: None)
    return json.loads(path.read_text())


def test_a_model_against_itself_is_one(teacher, tmp_path):
    report = run(teacher, teacher, tmp_path)
    for step in report["texts"]["reference"]["steps"]:
        for key in ("cka", "cka_debiased", "boundary_cosine", "transition_cosine"):
            if step[key] is not None and step[key]["value"] is not None:
                assert step[key]["value"] == pytest.approx(1.0, abs=1e-6), (step["step"], key)
    assert report["texts"]["reference"]["steps"][1]["cka_debiased"]["value"] is not None
    assert report["verdict"]["answer"] == "too few to say"  # random weights solve nothing


def test_its_int8_version_is_near_and_another_layer_is_another_place(teacher):
    plain, rounded = load_model(str(teacher)), load_model(str(teacher), "int8")
    chains, _ = encode_traces(plain.tokenizer, generate(24, (1, 2)), TINY_FORMAT, row_length=256)
    final, int8, inner = (
        boundary_states(m, chains, layer)[0][:, 1] for m, layer in ((plain, -1), (rounded, 2), (plain, 1))
    )
    assert 0.98 < linear_cka(int8, final).debiased < 1.0
    assert linear_cka(inner, final).debiased < 0.999
    assert rounded.name == "model (int8)"
    with pytest.raises(ValueError, match="hidden layer 7 does not exist"):
        boundary_states(plain, chains, 7)


def test_a_runs_checkpoint_brings_its_own_projections_and_text(teacher, finished, tmp_path):
    report = run(teacher, finished, tmp_path, prompt_template="", limit=12)
    assert report["maps"] == "the run's own f and g"
    assert report["student"] == {"name": "tiny, stage 2", "layers": 2, "width": 16, "layer_read": 2}
    assert report["settings"]["text"]["prompt_template"] == TINY_FORMAT.prompt_template
    assert (tmp_path / "cka_reference.png").stat().st_size > 5_000
    stage = finished / "checkpoints" / "stages" / "1"
    with pytest.raises(ValueError, match="not a stage checkpoint"):
        run(teacher, teacher, tmp_path, maps="saved")
    with pytest.raises(ValueError, match="join the layers"):
        run(teacher, stage, tmp_path, maps="saved", teacher_layer=1)


def test_a_checkpoint_is_the_student_that_the_run_wrote(teacher, finished):
    # The stage checkpoint's student and the exported folder are the same model: the same states at the same tokens.
    stage, exported = (load_model(str(path)) for path in (finished, finished / "student"))
    chains, _ = encode_traces(stage.tokenizer, generate(9, (1, 2, 3)), TINY_FORMAT, row_length=256)
    (ours, mask), (theirs, _) = (boundary_states(model, chains, batch_size=4) for model in (stage, exported))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert mask.sum(1).tolist() == [2, 3, 4] * 3
    # And the state of a boundary is that of the token, whatever the batch: read alone, it is the same.
    alone, _ = boundary_states(stage, [chains[4]], batch_size=1)
    np.testing.assert_allclose(alone[0], ours[4, :3], atol=1e-5)


def findings(drift, related, seed=0, count=160):
    """Chains of four steps whose student leaves the teacher by `drift` a step; failure follows it if `related`."""
    rng = np.random.default_rng(seed)
    teacher_CKD = np.cumsum(rng.normal(size=(count, 5, 8)), axis=1)
    own_C = rng.uniform(0, 2, count)
    noise = rng.normal(size=(count, 5, 8)) * (0.3 + drift * np.arange(5)[None, :, None]) * own_C[:, None, None]
    states = BoundaryStates(teacher_CKD + noise, teacher_CKD, np.ones((count, 5), bool))
    failed = own_C > 1 if related else rng.random(count) < 0.5
    return measure(states, ([None] * count,) * 2, [[None] * 4] * count, failed, resamples=40, seed=0), failed


@pytest.mark.parametrize(
    ("drift", "related", "answer"),
    [
        (0.8, True, "drift"),
        (0.8, False, "elsewhere"),
        (0.0, True, "distance without drift"),
        (0.0, False, "elsewhere"),
    ],
)
def test_the_verdict_tells_the_four_cases_apart(drift, related, answer):
    found, failed = findings(drift, related)
    said = verdict({"reference": found}, failed, both_fail=3)
    assert said["answer"] == answer, said
    assert any("the teacher fails 3" in line for line in said["evidence"])
    assert ("falls" in " ".join(said["evidence"]).replace("no measure falls", "")) == (drift > 0)
    assert verdict({"reference": found}, np.zeros(len(failed), bool))["answer"] == "too few to say"


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="resamples is 3"):
        DiagnoseSettings("a", "b", resamples=3)
    with pytest.raises(ValueError, match="no such directory"):
        load_model("/no/such/model")
    assert TextFormat().template  # the default of models that no run has trained


@pytest.fixture(scope="module")
def diagnosed(teacher, finished, tmp_path_factory):
    out = tmp_path_factory.mktemp("page")
    run(teacher, finished, out, prompt_template="", maps="fitted")
    return out


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_shows_in_a_browser(diagnosed, scheme):
    out = diagnosed
    with browser(scheme) as window:
        page = open_page(window, out / "report.html")
    assert page["console"] == []
    assert page["outside"] == []
    assert page["overflow"] <= 0  # nothing to scroll sideways at 1,280 pixels
    wanted = {"chain_accuracy", "compounding", "cka_reference", "cosines_reference"}
    assert wanted <= set(page["figures"])
    for name, (width, height, paths, text) in page["figures"].items():
        assert width > 400, name
        assert height > 200, name
        assert paths > 5, name
        assert text.strip(), name
    assert "article" in page["figures"]["cka_reference"][3]
    assert page["title"] == "tiny, stage 2 against model"
    assert "0.0% of whole chains" in page["text"] or "of whole chains" not in page["text"]
    assert page["wrong"]  # examples with their first wrong step marked
    dark = scheme == "dark"
    for colour, is_bright in ((page["background"], not dark), (page["ink"], dark), (page["axis"], dark)):
        brightness = sum(map(int, colour[colour.index("(") + 1 : -1].split(",")[:3])) / 3
        assert (brightness > 128) == is_bright, (scheme, colour)
