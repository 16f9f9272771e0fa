"""Golden runs: what commands wrote before the package was rearranged, to the number.

Every method trains for twenty updates on the CPU in float32, and a short `rtd_tiny` runs to its report. Their numbers
lie in tests/golden/<case>.json, and a command that is run today has to give them again: floats to a relative 1e-5,
everything else exactly; times and speeds are left out. tests/golden/artefacts holds folders that the code of that day
wrote: a run that was stopped, a teacher cache, a boundary classifier and a teacher's own chains. Today's commands have
to go on from them.

Only what a user sees is relied on: the scripts in launch/, their configs and overrides, and the files that they write.
Nothing of the package is imported, so that modules can move without a change here.

    python tests/test_golden.py --record            # writes the records of all cases anew
    python tests/test_golden.py --record kd rtd     # of some
    python tests/test_golden.py --record artefacts  # the folders too, which then are no longer those of earlier code

Recording is for a change that is meant to change numbers; the commit says which and why.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
ARTEFACTS = GOLDEN / "artefacts"
RELATIVE, ABSOLUTE = 1e-5, 1e-7  # of floats; the second is for those near zero
AT_ONE_TIME = 2  # processes
TIMES = ("wall_seconds", "train_seconds", "seconds", "perf/tokens_per_sec", "perf/train_seconds", "perf/drawing_share")

TRAIN = ("launch/train.py", "--config=configs/rtd_tiny.py")


def overrides(*settings: str) -> tuple[str, ...]:
    """Flags of `key=value` settings."""
    return tuple(f"--config.{setting}" for setting in settings)


SHALLOW = tuple(f"data.{split}.depths=(1,2)" for split in ("train", "validation", "test"))
# Twenty updates on a few problems. The learning rate is low, so that rounding, which differs between machines, does not
# grow from update to update.
SMALL = (
    *SHALLOW,
    "optimizer.learning_rate=3e-4",
    "data.train.limit=60",
    "data.validation.limit=20",
    "data.test.limit=4",
    "batch_size=4",
    "total_updates=20",
    "log_every=1",
    "evaluation.problems_per_depth=1",
    "evaluation.max_new_tokens=8",
    "evaluation.teacher=False",
    # Two stages of RTD: the first ends by its threshold, which is raised for it, the second spends the budget.
    "curriculum.depths=(1,2)",
    "curriculum.validate_every=4",
    "curriculum.validation_chains=4",
    "curriculum.min_updates=4",
    "curriculum.threshold_factor=180.0",
)
# Overrides of a method, as in configs/study_tiny.py; written out, so that the record does not follow that file.
KD = ("loss.alignment_weight=0.0", "loss.coherence_weight=0.0", "curriculum.enabled=False")
CACHED = ("cache.top_k=16", "data.train.limit=12", "data.validation.limit=4", "curriculum.validation_chains=2")
FEW_ROLLOUTS = (
    "reward.prompts=4",
    "reward.prompts_per_update=2",
    "reward.samples=2",
    "reward.updates_per_refresh=10",
    "reward.max_new_tokens=24",
)
METHODS = {
    "kd": KD,
    "rtd": (),
    "rtd_cached": (*CACHED, "teacher.cache={cache}"),
    "rtd_micro_batches": ("micro_batches=2", "loss.projections=shared"),
    "rtd_no_map": ("loss.distance=squared", "loss.projections=none", "curriculum.enabled=False"),
    "rtd_all_tokens": ("loss.alignment_weight=0.0", "loss.token_alignment_weight=0.3"),
    "intermediate_kd": (*KD, "loss.intermediate_weight=1.0"),
    "step_reward": (*KD, "loss.reward_weight=0.3", "reward.model={reward}/model", *FEW_ROLLOUTS),
    # On a teacher's own chains that were written long ago.
    "cot_ft": (*KD, "loss.alpha=0.0", "data.train.schema=stepwise", "data.train.location={traces}"),
}
# All stages, looks at validation problems and the drift: whatever a report can say.
WHOLE = (
    "optimizer.learning_rate=3e-4",
    "data.train.limit=120",
    "data.validation.limit=36",
    "data.test.limit=24",
    "batch_size=4",
    "total_updates=36",
    "log_every=4",
    "checkpoint_every=12",
    "curriculum.validate_every=2",
    "curriculum.validation_chains=4",
    "curriculum.min_updates=4",
    "curriculum.plateau_patience=2",
    "curriculum.threshold_factor=10.0",
    "evaluation.problems_per_depth=2",
    "evaluation.max_new_tokens=32",
    "evaluation.every=18",
    "evaluation.curve_problems=1",
    "evaluation.drift_problems=3",
)
# A student whose checkpoint is small; it stops in the middle of the second stage.
STOPPED = (
    *SMALL,
    "total_updates=12",
    "checkpoint_every=4",
    "keep_checkpoints=1",
    "curriculum.threshold_factor=1.0",
    "student.init=random",
    "student.layers=1",
    "student.width=16",
    "student.mlp_width=24",
    "student.heads=2",
    "student.kv_heads=2",
    "student.head_dim=8",
)
REWARD = (
    "launch/reward_model.py",
    "--config=configs/reward_tiny.py",
    *overrides("train.limit=60", "test.limit=40", "epochs=2", "resamples=20"),
)
CACHE = ("launch/cache_teacher.py", "--config=configs/rtd_tiny.py", *overrides(*SMALL, *CACHED))
TRACES = (
    "launch/traces.py",
    "--config=configs/traces_tiny.py",
    # The reading of that day, which today's default is not.
    *overrides("problems.limit=48", "problems.depths=(1,2)", "sampling.samples=1", "selection.reading=strict"),
)


def run(*command: str) -> str:
    """Runs a script of launch/ with this interpreter on one CPU device; returns what it prints.

    Programs run for moments only, so they are compiled without optimization.
    """
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PJRT_NPROC": str(os.cpu_count()),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def without_times(value: Any) -> Any:
    """The same without times and speeds, at every depth."""
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def metrics_of(workdir: Path) -> list[Any]:
    return without_times(lines_of(workdir / "metrics.jsonl"))


def numbers_of(workdir: Path) -> dict[str, Any]:
    """What is recorded of a run of twenty updates."""
    report = json.loads((workdir / "report.json").read_text(encoding="utf-8"))
    return {"metrics": metrics_of(workdir), "stages": report["stages"]}


def whole_of(workdir: Path) -> dict[str, Any]:
    """What is recorded of a run with all that its report says."""
    report = json.loads((workdir / "report.json").read_text(encoding="utf-8"))
    return {
        "metrics": metrics_of(workdir),
        # Neither settings nor where models and data came from, which are paths.
        "report": without_times({key: item for key, item in report.items() if key not in ("settings", "origins")}),
        "generations": lines_of(workdir / "generations.jsonl"),
    }


class Runs:
    """Commands that are run once each, a few at a time, in folders below `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._slots = threading.Semaphore(AT_ONE_TIME)
        self._pool = ThreadPoolExecutor(32)  # most of them wait: for a slot, or for what another one makes
        self._found: dict[str, Future] = {}
        self._lock = threading.Lock()

    def start(self, name: str) -> Future:
        with self._lock:
            if name not in self._found:
                self._found[name] = self._pool.submit(MAKERS[name], self, self.folder / name)
            return self._found[name]

    def __getitem__(self, name: str) -> Any:
        return self.start(name).result()

    def run(self, *command: str) -> str:
        with self._slots:
            return run(*command)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def _method(name: str, artefact: str = "") -> Callable[[Runs, Path], dict[str, Any]]:
    """Trains a method; what it needs is made first, or copied from the artefacts."""

    def make(runs: Runs, workdir: Path) -> dict[str, Any]:
        settings = [*SMALL, *METHODS[name]]
        for needed in ("cache", "reward", "traces"):
            if any("{" + needed + "}" in setting for setting in settings):
                source = str(runs[artefact or needed])
                settings = [setting.replace("{" + needed + "}", source) for setting in settings]
        runs.run(*TRAIN, f"--workdir={workdir}", *overrides(*settings))
        return numbers_of(workdir)

    return make


def _made(command: tuple[str, ...], flag: str = "--workdir") -> Callable[[Runs, Path], Path]:
    def make(runs: Runs, workdir: Path) -> Path:
        runs.run(*command, f"{flag}={workdir}")
        return workdir

    return make


def _copied(name: str) -> Callable[[Runs, Path], Path]:
    def make(runs: Runs, folder: Path) -> Path:
        return Path(shutil.copytree(ARTEFACTS / name, folder))

    return make


def _whole(runs: Runs, workdir: Path) -> dict[str, Any]:
    runs.run(*TRAIN, f"--workdir={workdir}", *overrides(*WHOLE))
    return whole_of(workdir)


def _resumed(runs: Runs, workdir: Path) -> tuple[str, dict[str, Any]]:
    """The stopped run, gone on with in a copy: what it prints, and its numbers."""
    shutil.copytree(ARTEFACTS / "stopped", workdir)
    printed = runs.run(*TRAIN, f"--workdir={workdir}", *overrides(*STOPPED))
    return printed, numbers_of(workdir)


def _from_stage(runs: Runs, workdir: Path) -> tuple[str, dict[str, Any]]:
    """A new run from the stopped one's finished stage, and its numbers."""
    stage = Path(shutil.copytree(ARTEFACTS / "stopped", workdir / "before")) / "checkpoints" / "stages" / "1"
    printed = runs.run(*TRAIN, f"--workdir={workdir / 'new'}", *overrides(*STOPPED, f"resume_from={stage}"))
    return printed, numbers_of(workdir / "new")


def _traces_again(runs: Runs, workdir: Path) -> tuple[Path, str]:
    shutil.copytree(ARTEFACTS / "traces", workdir)
    return workdir, runs.run(*TRACES, f"--workdir={workdir}")


def _cache_again(runs: Runs, folder: Path) -> tuple[Path, str]:
    shutil.copytree(ARTEFACTS / "cache", folder)
    return folder, runs.run(*CACHE, f"--config.teacher.cache={folder}", f"--workdir={folder}-unused")


def _segmented(runs: Runs, folder: Path) -> list[Any]:
    """The steps that the old classifier finds. The bundled teacher's place is read from a config."""
    folder.mkdir()
    shutil.copytree(ARTEFACTS / "boundaries", folder / "classifier")
    printed = run_config_value("configs/rtd_tiny.py", "teacher.path")
    runs.run(
        "launch/segment.py",
        f"--teacher={printed}",
        f"--classifier={folder / 'classifier'}",
        f"--data={ARTEFACTS / 'texts.jsonl'}",
        f"--out={folder / 'steps.jsonl'}",
        f"--keep={folder / 'kept'}",
    )
    return lines_of(folder / "steps.jsonl")


def run_config_value(config: str, key: str) -> str:
    """A value of a config, read in a process of its own as every script reads it."""
    code = f"import sys, runpy; sys.path.insert(0, '.'); print(runpy.run_path({config!r})['get_config']().{key})"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout[
        :-1
    ]


MAKERS: dict[str, Callable[[Runs, Path], Any]] = {
    "cache": _made((*CACHE, "--workdir=unused"), "--config.teacher.cache"),
    "reward": _made(REWARD),
    "traces": _copied("traces"),
    "old_cache": _copied("cache"),
    "rtd_tiny": _whole,
    **{name: _method(name) for name in METHODS},
    "rtd_old_cache": _method("rtd_cached", artefact="old_cache"),
    "resumed": _resumed,
    "from_stage": _from_stage,
    "traces_again": _traces_again,
    "cache_again": _cache_again,
    "segmented": _segmented,
}


def recorded(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def differences(found: Any, golden: Any, place: str = "") -> Iterator[str]:
    """What differs, with its place."""
    if isinstance(golden, dict) and isinstance(found, dict):
        if list(found) != list(golden):
            yield f"{place}: keys {list(found)}, recorded {list(golden)}"
        for key in golden.keys() & found.keys():
            yield from differences(found[key], golden[key], f"{place}/{key}")
    elif isinstance(golden, list) and isinstance(found, list):
        if len(found) != len(golden):
            yield f"{place}: {len(found)} items, recorded {len(golden)}"
        for i, (one, other) in enumerate(zip(found, golden, strict=False)):
            yield from differences(one, other, f"{place}/{i}")
    elif isinstance(golden, float) and isinstance(found, float):
        if not math.isclose(found, golden, rel_tol=RELATIVE, abs_tol=ABSOLUTE):
            yield f"{place}: {found!r}, recorded {golden!r}"
    elif type(found) is not type(golden) or found != golden:
        yield f"{place}: {found!r}, recorded {golden!r}"


def check(found: Any, name: str) -> None:
    different = list(differences(found, recorded(name)))
    assert not different, "\n".join([f"{len(different)} differences from {name}", *different[:12]])


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """All runs that the chosen tests need, under way."""
    made = Runs(tmp_path_factory.mktemp("golden"))
    for item in request.session.items:
        if item.path == Path(__file__).resolve():
            made.start(item.callspec.params["name"] if hasattr(item, "callspec") else RUN_OF[item.originalname])
    yield made
    made.close()


@pytest.mark.parametrize("name", [*METHODS, "rtd_tiny"])
def test_the_numbers_are_those_that_were_recorded(runs: Runs, name: str):
    check(runs[name], name)


def test_a_stopped_run_goes_on_and_ends_with_the_recorded_numbers(runs: Runs):
    printed, found = runs["resumed"]
    assert "resuming at update 8" in printed
    check(found, "uninterrupted")


def test_a_new_run_begins_at_the_old_stage_and_ends_with_the_recorded_numbers(runs: Runs):
    printed, found = runs["from_stage"]
    golden = recorded("uninterrupted")
    later = [row for row in golden["metrics"] if row["stage"] == "2+"]
    assert f"resuming at update {golden['stages'][0]['updates']}" in printed
    assert not list(differences(found, {"metrics": later, "stages": golden["stages"]}))


def test_training_from_the_old_cache_gives_the_recorded_numbers(runs: Runs):
    check(runs["rtd_old_cache"], "rtd_cached")


def test_nothing_is_added_to_the_old_cache(runs: Runs):
    folder, printed = runs["cache_again"]
    assert ", 0 are to be added" in printed
    assert files_of(folder) == files_of(ARTEFACTS / "cache")


def test_the_old_classifier_finds_the_recorded_steps(runs: Runs):
    check(runs["segmented"], "segmented")


def test_old_traces_ask_for_nothing_and_keep_their_bytes(runs: Runs):
    folder, printed = runs["traces_again"]
    assert " 0 to be asked for" in printed
    now, before = (files_of(x) for x in (folder, ARTEFACTS / "traces"))
    manifests = [json.loads(files.pop("traces_manifest.json")) for files in (now, before)]
    assert now == before
    for manifest in manifests:  # says where the tokenizer lies
        manifest["selection"].pop("tokenizer")
        assert manifest["problems"]["source"].pop("wording", "terse") == "terse"  # a setting that came later
        assert not manifest["selection"].pop("sound", False)
        assert not any(counts.pop("unsound", 0) for counts in manifest["counts"].values())
        manifest.pop("format")  # of today's, which has a digest of its content beside it
        manifest.pop("digest", None)
    assert manifests[0] == manifests[1]


RUN_OF = {  # of the tests without a parameter
    "test_a_stopped_run_goes_on_and_ends_with_the_recorded_numbers": "resumed",
    "test_a_new_run_begins_at_the_old_stage_and_ends_with_the_recorded_numbers": "from_stage",
    "test_training_from_the_old_cache_gives_the_recorded_numbers": "rtd_old_cache",
    "test_nothing_is_added_to_the_old_cache": "cache_again",
    "test_the_old_classifier_finds_the_recorded_steps": "segmented",
    "test_old_traces_ask_for_nothing_and_keep_their_bytes": "traces_again",
}


def _write(name: str, found: Any) -> None:
    text = json.dumps(found, ensure_ascii=False, indent=0)
    (GOLDEN / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def _record_artefacts(folder: Path) -> None:
    """The stopped run, the cache and the chains anew. The classifier and the texts are kept as they are."""
    for name in ("stopped", "cache", "traces"):
        shutil.rmtree(ARTEFACTS / name, ignore_errors=True)
    whole, kept = folder / "uninterrupted", ARTEFACTS / "stopped"
    commands = (
        (*TRAIN, f"--workdir={whole}", *overrides(*STOPPED)),
        (*TRACES, f"--workdir={ARTEFACTS / 'traces'}"),
        (*CACHE, f"--config.teacher.cache={ARTEFACTS / 'cache'}", "--workdir=unused"),
    )
    with ThreadPoolExecutor(AT_ONE_TIME) as pool:
        list(pool.map(lambda command: run(*command), commands))
    _write("uninterrupted", numbers_of(whole))
    # As a kill after update 9 leaves it: the checkpoint of update 8, and the lines of one update more.
    for checkpoint in ("stages/1", "rolling/8"):
        shutil.copytree(whole / "checkpoints" / checkpoint, kept / "checkpoints" / checkpoint)
    shutil.copy(whole / "settings.json", kept)
    lines = (whole / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    rows = [line for line in lines if json.loads(line)["update"] <= 9]
    (kept / "metrics.jsonl").write_text("".join(rows), encoding="utf-8")
    for path in ARTEFACTS.rglob("*"):  # where this checkout lies is nobody's business
        for base in (str(ROOT), str(folder)):
            if path.is_file() and base.encode() in path.read_bytes():
                path.write_text(path.read_text(encoding="utf-8").replace(base + "/", ""), encoding="utf-8")


def record(names: list[str]) -> None:
    """Writes the records of the named cases, without names of all; of "artefacts" the folders."""
    GOLDEN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        if "artefacts" in names:
            _record_artefacts(Path(folder))
            names = [name for name in names if name != "artefacts"]
            if not names:
                return
        made = Runs(Path(folder) / "runs")
        made.folder.mkdir()
        chosen = names or [*METHODS, "rtd_tiny", "segmented"]
        for name in chosen:
            made.start(name)
        for name in chosen:
            _write(name, made[name])
            print(f"recorded {name}", flush=True)
        made.close()


if __name__ == "__main__":
    if sys.argv[1:2] != ["--record"]:
        sys.exit(f"usage: python {sys.argv[0]} --record [case ..]")
    record(sys.argv[2:])
