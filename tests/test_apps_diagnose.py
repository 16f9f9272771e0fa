"""A diagnosis end to end on tiny models: itself, rounded, pruned, cached, of another tokenizer; and the verdicts."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from chromium import browser, open_page
from llama3_like import llama3_like
from tiny_run import recipe, write_teacher

import rtd_jax.models.open
from rtd_jax.apps.cache import cache_teacher
from rtd_jax.apps.diagnose.diagnose import DiagnoseSettings, diagnose, readable
from rtd_jax.apps.diagnose.findings import ARTICLE, verdict
from rtd_jax.apps.distill.run import train
from rtd_jax.apps.report.page import write_report
from rtd_jax.data.encoding import encode_traces
from rtd_jax.data.formats import TextFormat
from rtd_jax.data.generators.word_problems import generate
from rtd_jax.data.tiny_tokenizer import TINY_FORMAT
from rtd_jax.data.trace import Trace
from rtd_jax.eval.cka import linear_cka
from rtd_jax.eval.drift import BoundaryStates, cross_fitted, measure, transitions
from rtd_jax.eval.states import boundary_states
from rtd_jax.models.config import layers_to_copy
from rtd_jax.models.from_hf import load_config, load_params
from rtd_jax.models.model import DecoderModel
from rtd_jax.models.to_hf import save_pretrained
from rtd_jax.teacher.identity import CacheSettings
from rtd_jax.train.saved_models import load_model

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "rtd_jax" / "bundled" / "tiny_teacher"
SHORT = {"limit": 24, "max_new_tokens": 4, "batch_size": 24, "resamples": 20}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher") / "model")


@pytest.fixture(scope="module")
def finished(teacher, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "tiny"
    train(recipe(teacher), workdir)
    return workdir


def run(teacher, student, out, note=lambda _: None, **changes):
    options = SHORT | {"prompt_template": TINY_FORMAT.prompt_template} | changes
    path = diagnose(DiagnoseSettings(str(teacher), str(student), out=str(out), **options), note=note)
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
    (ours, mask), (theirs, _) = (boundary_states(model, chains) for model in (stage, exported))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert mask.sum(1).tolist() == [2, 3, 4] * 3
    # And the state of a boundary is that of the token, whatever the batch: read alone, it is the same.
    alone, _ = boundary_states(stage, [chains[4]])
    np.testing.assert_allclose(alone[0], ours[4, :3], atol=1e-5)


@pytest.fixture(scope="module")
def caches(teacher, tmp_path_factory):
    """Teacher caches of the tiny recipe's chains, by how their states are stored."""
    found = {}
    for states in ("float32", "int8"):
        folder, base = tmp_path_factory.mktemp(states), recipe(teacher)
        of_teacher = dataclasses.replace(base.teacher, cache=str(folder))
        stored = CacheSettings(4, "compact", states)
        found[states] = cache_teacher(dataclasses.replace(base, teacher=of_teacher, cache=stored), folder)
    return found


# The recipe caches training problems of one and two steps; every third of these is one of them.
CACHED = {"split": "train", "limit": 60, "maps": "fitted"}


@pytest.fixture(scope="module")
def from_cache(teacher, finished, caches, tmp_path_factory):
    """(report, notes) of a diagnosis for which the teacher's weights were never read."""
    notes: list[str] = []
    out, load = tmp_path_factory.mktemp("cached"), load_params

    def of_the_student_only(directory, *rest, **options):
        assert Path(directory) != teacher, "the teacher's weights were read"
        return load(directory, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rtd_jax.models.open, "load_params", of_the_student_only)
        student = finished / "student"
        report = run(teacher, student, out, notes.append, cache=str(caches["float32"]), **CACHED)
    return report, notes


def test_a_cache_stands_in_for_the_teacher_and_what_it_lacks_is_counted(
    teacher, finished, caches, from_cache, tmp_path
):
    report, notes = from_cache
    assert "40 of 60 chains are not in the teacher cache and are left out" in notes
    assert report["texts"]["reference"]["chains"] == 20
    assert report["teacher"]["cache"] == "float32 weights, float32 arithmetic, states stored as float32"
    assert "own" not in report["texts"]
    assert any("own chains are not compared" in line for line in notes)
    assert json.loads(json.dumps(report))["teacher"]["layer_read"] == 2

    # Online, on the very chains: problems of one and two steps, in the same order.
    rows = tmp_path / "train.jsonl"
    kept = [trace for trace in generate(60) if trace.depth <= 2]
    rows.write_text(
        "".join(json.dumps({"prompt": t.prompt, "completions": list(t.steps), "answer": t.answer}) + "\n" for t in kept)
    )
    options = CACHED | {"data": str(rows), "schema": "stepwise"}
    student = finished / "student"
    online = run(teacher, student, tmp_path / "online", **options)
    rounded = run(teacher, student, tmp_path / "rounded", cache=str(caches["int8"]), **CACHED)
    steps = {"float32": report, "int8": rounded, "online": online}
    steps = {name: found["texts"]["reference"]["steps"] for name, found in steps.items()}
    for i, expected in enumerate(steps["online"]):
        assert expected["chains"] == (20, 20, 10)[i]
        for key in ("cka", "cka_debiased", "boundary_cosine", "transition_cosine"):
            if expected[key] is None or expected[key]["value"] is None:
                assert steps["float32"][i][key] == expected[key]
            else:
                value = expected[key]["value"]
                assert steps["float32"][i][key]["value"] == pytest.approx(value, abs=1e-4), (i, key)
                assert steps["int8"][i][key]["value"] == pytest.approx(value, abs=0.02), (i, key)


def test_a_cache_of_something_else_is_refused_by_name(teacher, caches, tmp_path):
    cache = str(caches["int8"])
    other = write_teacher(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"was written by another teacher than .*other"):
        run(other, teacher, tmp_path, cache=cache, **CACHED)
    with pytest.raises(ValueError, match=r"holds states of layer 2, but layer 1 is asked for; use --teacher_layer=2"):
        run(teacher, teacher, tmp_path, cache=cache, teacher_layer=1, **CACHED)
    with pytest.raises(ValueError, match=r"0 of 60 chains are in the teacher cache .*--split=train"):
        run(teacher, teacher, tmp_path, cache=cache, **CACHED | {"split": "test"})
    with pytest.raises(ValueError, match=r"0 of 60 chains are in the teacher cache .*form of text"):
        run(teacher, teacher, tmp_path, cache=cache, **CACHED, prompt_template="Q: {prompt}\nA:\n")
    with pytest.raises(ValueError, match=r"is not a teacher cache \(no manifest.json\)"):
        run(teacher, teacher, tmp_path, cache=str(tmp_path), **CACHED)
    with pytest.raises(ValueError, match="decode_teacher needs the teacher's weights"):
        DiagnoseSettings("a", "b", cache="c", decode_teacher=True)
    # The same weights beside another tokenizer.
    beside = Path(shutil.copytree(teacher, tmp_path / "beside"))
    tokenizer = json.loads((beside / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["1"], words["2"] = words["2"], words["1"]
    (beside / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"written with another tokenizer than that in .*beside"):
        run(beside, teacher, tmp_path, cache=cache, **CACHED)


def final_cka(folder, chains, reference_CD):
    """Debiased CKA of a model's states at the last boundary with the teacher's."""
    states_CKD, mask_CK = boundary_states(load_model(str(folder)), chains)
    return linear_cka(states_CKD[np.arange(len(chains)), mask_CK.sum(1) - 1], reference_CD).debiased


def test_cka_falls_the_more_of_the_teacher_is_pruned(tmp_path):
    whole = load_model(str(BUNDLED))
    chains, _ = encode_traces(whole.tokenizer, generate(96, (1, 2, 3)), TINY_FORMAT, row_length=256)
    states_CKD, mask_CK = boundary_states(whole, chains)
    reference_CD = states_CKD[np.arange(len(chains)), mask_CK.sum(1) - 1]

    def without_small(share):
        """The smallest weights of every matrix at zero: magnitude pruning."""

        def prune(array):
            limit = np.quantile(np.abs(array), share)
            return np.where(np.abs(array) >= limit, array, 0.0) if array.ndim > 2 else array

        config, params = load_config(BUNDLED), jax.device_get(load_params(BUNDLED, load_config(BUNDLED)))
        params |= {"layers": jax.tree.map(prune, params["layers"])}
        return save_pretrained(tmp_path / f"magnitude{share}", config, params, tokenizer=whole.tokenizer)

    def with_layers(count):
        config = load_config(BUNDLED)
        params = load_params(BUNDLED, config, layers=layers_to_copy(config.layers, count))
        config = dataclasses.replace(config, layers=count)
        return save_pretrained(tmp_path / f"layers{count}", config, params, tokenizer=whole.tokenizer)

    by_magnitude = [final_cka(without_small(share), chains, reference_CD) for share in (0.3, 0.6, 0.9)]
    by_layers = [final_cka(with_layers(count), chains, reference_CD) for count in (3, 2, 1)]
    for ckas in (by_magnitude, by_layers):
        assert np.all(np.diff([1.0, *ckas]) < 0), ckas
        assert ckas[-1] < 0.6, ckas


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A random Llama of width 24, three layers, whose byte-level BPE merges over ends of lines."""
    tokenizer = llama3_like()
    config = dataclasses.replace(load_config(BUNDLED), layers=3, width=24, mlp_width=32, heads=2, kv_heads=1)
    config = dataclasses.replace(config, head_dim=12, vocab_size=len(tokenizer))
    folder = tmp_path_factory.mktemp("foreign") / "bpe"
    return save_pretrained(folder, config, DecoderModel(config).init(jax.random.key(3)), tokenizer=tokenizer)


def test_models_of_different_tokenizers_meet_at_the_same_characters(teacher, foreign, tmp_path):
    loaded = [load_model(str(path)) for path in (teacher, foreign)]
    traces = generate(6, (2, 3))
    encoded = [encode_traces(m.tokenizer, traces, TINY_FORMAT, row_length=1024)[0] for m in loaded]
    for trace, ours, theirs in zip(traces, *encoded, strict=True):
        assert len(ours) != len(theirs)
        for step, places in zip(trace.steps, zip(ours.boundaries[1:], theirs.boundaries[1:], strict=True), strict=True):
            for model, chain, place in zip(loaded, (ours, theirs), places, strict=True):
                read = model.tokenizer.decode(chain.tokens[: place + 1]).rstrip()
                assert read.endswith(step.rstrip()), (read[-40:], step)
    report = run(teacher, foreign, tmp_path, limit=12, row_length=512)
    assert report["texts"]["reference"]["chains"] == 12
    assert (report["teacher"]["width"], report["student"]["width"]) == (32, 24)
    assert [s["chains"] for s in report["texts"]["reference"]["steps"]] == [12, 12, 10, 8, 6, 4, 2]
    # What a student wrote may have words that the teacher's list lacks; that is said, and not the end of it.
    notes: list[str] = []
    poor = Trace.of_steps(traces[1].prompt, ("Zebras: <<1+1=2>>2.",), "2", "#### 2", "generation 2")
    own = [(0, traces[0], [True, True]), (1, poor, [None])]
    assert readable(own, loaded, TINY_FORMAT, notes.append) == own[:1]
    (line,) = notes
    assert line.startswith("1 of the student's 2 own chains are left out; the first: generation 2: ")
    assert "unknown to the tokenizer" in line
    assert readable(own, loaded[1:], TINY_FORMAT, notes.append) == own  # bytes can spell it


def test_any_pair_of_layers_of_models_of_any_width(teacher, foreign):
    sides = []
    for path in (teacher, foreign):
        loaded = load_model(str(path))
        chains, _ = encode_traces(loaded.tokenizer, generate(24, (2, 3)), TINY_FORMAT, row_length=1024)
        hf = transformers.LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        with torch.inference_mode():
            expected = hf(torch.tensor(chains[0].tokens[None], dtype=torch.int64), output_hidden_states=True)
        layers = []
        for layer in range(loaded.model.config.layers + 1):
            states_CKD, mask_CK = boundary_states(loaded, chains, layer)
            wanted_KD = expected.hidden_states[layer][0, chains[0].boundaries].numpy()
            np.testing.assert_allclose(states_CKD[0, : len(wanted_KD)], wanted_KD, rtol=0, atol=1e-4)
            layers.append(states_CKD)
        sides.append((layers, mask_CK))
    (of_teacher, mask_CK), (of_student, same_CK) = sides
    np.testing.assert_array_equal(mask_CK, same_CK)
    failed = np.arange(24) % 2 == 0
    for one, other in ((0, 0), (1, 2), (2, 1), (2, 3)):  # layers of teacher and student
        teacher_CKD, student_CKD = of_teacher[one], of_student[other]
        states = BoundaryStates(student_CKD, teacher_CKD, mask_CK)
        maps = cross_fitted(states, seed=0), cross_fitted(transitions(states), seed=0)
        found = measure(states, maps, [[None] * 3] * 24, failed, resamples=20, seed=0)
        for step in found["steps"][1:]:
            assert -1 <= step["boundary_cosine"]["value"] <= 1
            here_CD = student_CKD[mask_CK[:, step["step"]], step["step"]]
            there_CD = teacher_CKD[mask_CK[:, step["step"]], step["step"]]
            if one == 0:  # every step ends with the same token, so all embeddings there are one: no CKA
                assert np.ptp(there_CD, axis=0).max() == 0
                assert step["cka"]["value"] is None
            else:
                assert step["cka"]["value"] == pytest.approx(linear_cka(here_CD, there_CD).biased, abs=1e-6)


def command(*flags):
    return subprocess.run(
        [sys.executable, "launch/diagnose.py", *map(str, flags)], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_the_command_lets_the_teacher_solve_the_problems_too(teacher, finished, tmp_path):
    flags = ["--limit=6", "--max_new_tokens=4", "--resamples=20", f"--out={tmp_path}", "--decode_teacher"]
    done = command(f"--teacher={teacher}", f"--student={finished}", *flags)
    assert done.returncode == 0, done.stderr
    assert "teacher: 6 of 6 problems decoded" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["models"]) == {"tiny, stage 2", "model, teacher"}
    assert report["models"]["model, teacher"]["chain_accuracy"]["all"] == {"mean": 0.0, "stderr": 0.0, "n": 6}
    # Random weights solve nothing in four tokens: both fail all six.
    assert "the teacher fails 6 of those 6 too: its failures are not the student's drift" in done.stdout
    written = [json.loads(line) for line in (tmp_path / "generations.jsonl").read_text().splitlines()]
    assert [row["model"] for row in written].count("model") == 6


def test_a_name_that_is_nowhere_is_one_line_before_anything_is_loaded(teacher, tmp_path):
    done = command(f"--teacher={teacher}", "--student=nobody/no-such-model", f"--out={tmp_path / 'out'}")
    assert done.returncode == 2
    assert "loading" not in done.stdout
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: nobody/no-such-model: neither a local directory nor a model ")
    assert not list(tmp_path.glob("out/*"))


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


def test_the_page_draws_the_auroc_curve_and_names_the_articles(tmp_path):
    found, failed = findings(0.8, True)
    report = {"title": "t", "texts": {"reference": found}, "verdict": verdict({"reference": found}, failed)}
    example = {"model": "m", "prompt": "p", "reference": ["a"], "answer": "1", "completions": ["b"], "final": "2"}
    example |= {"depth": 1, "first_error": 0, "text": "b", "problem": 0, "sample": 0, "correct": False}
    page = write_report(tmp_path, report | {"article": ARTICLE}, [example]).read_text()
    picture = page[page.index('<figure id="roc_reference">') :].split("</figure>")[0]
    area = found["relation"]["chain"]["auroc"]["value"]
    assert area > 0.8  # failure follows the distance here
    assert f"whole chain ({area:.2f})" in picture
    assert "the article reports 0.83" in picture
    assert (tmp_path / "roc_reference.png").stat().st_size > 5_000
    assert "Grey: the article" in page
    assert "m · 1 step · wrong" in page
    without = write_report(tmp_path, report).read_text()
    assert "Grey: the article" not in without


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="resamples is 3; expected 20 to"):
        DiagnoseSettings("a", "b", resamples=3)
    with pytest.raises(ValueError, match="no such directory"):
        load_model("/no/such/model")
    bad = {"limit": -1, "seed": -1, "max_new_tokens": 0, "batch_size": 0, "row_length": 0}
    for name, value in (*bad.items(), ("seed", 2**40), ("limit", 10**12)):
        with pytest.raises(ValueError, match=f"{name} is {value}; expected "):
            DiagnoseSettings("a", "b", **{name: value})
    with pytest.raises(ValueError, match="prompt_template is 'x'; expected"):
        DiagnoseSettings("a", "b", prompt_template="x")
    assert TextFormat().template  # the default of models that no run has trained


def test_what_is_missing_is_found_before_a_model_is_loaded(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("rtd_jax.apps.diagnose.diagnose.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    for options, words in (
        ({"data": str(tmp_path / "nowhere")}, "no such folder or file"),
        ({"segmentation": f"classifier:{tmp_path / 'none'}"}, "none"),
    ):
        with pytest.raises(ValueError, match=words):
            run(teacher, teacher, tmp_path / "out", **options)


def test_a_student_that_overflows_is_reported_with_null_and_words(teacher, tmp_path):
    """Finite weights, infinite activations: no comparison is possible, and no error either."""
    config = load_config(teacher)
    params = load_params(teacher, config)
    for name in ("q", "k"):
        params["layers"]["attention"][name] = params["layers"]["attention"][name] * np.float32(1e25)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(teacher))
    student = save_pretrained(tmp_path / "student", config, params, tokenizer=tokenizer, text=TextFormat())
    report = run(teacher, student, tmp_path / "out")
    assert report["models"]["student"]["perplexity"] is None
    assert report["texts"]["reference"]["steps"][1]["boundary_cosine"] is None
    assert report["verdict"]["sentence"].startswith("There are only 0 successes")
    words = " ".join(report["notes"])
    assert "of the reference chains are left out: a state there is not finite" in words
    assert "because the number overflowed or is none: models.student.perplexity is nan, " in words
    assert "student was trained on another form of text, 'Question: {prompt}\\nAnswer:'" in words


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
    reference = page["figures"]["cka_reference"][3]
    assert all(text in reference for text in ("article", "0.89", "0.58"))
    assert page["title"] == "tiny, stage 2 against model"
    assert "0.0% of whole chains" in page["text"] or "of whole chains" not in page["text"]
    assert page["wrong"]  # examples with their first wrong step marked
    dark = scheme == "dark"
    for colour, is_bright in ((page["background"], not dark), (page["ink"], dark), (page["axis"], dark)):
        brightness = sum(map(int, colour[colour.index("(") + 1 : -1].split(",")[:3])) / 3
        assert (brightness > 128) == is_bright, (scheme, colour)
