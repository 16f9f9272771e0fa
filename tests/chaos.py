"""Damages every file that the project writes, in every way that disks, copies and people do, and says what follows.

    python tests/chaos.py                         # 40 mutations of each kind of folder; about five minutes
    python tests/chaos.py --per_target=200        # more of them
    python tests/chaos.py --only=cache,model --seed=3
    python tests/chaos.py --show                  # prints every refusal, to read how they sound

A mutation changes one file or folder of something that the project wrote, or several at once: bytes are cut, flipped,
zeroed or added; JSON gets other values, types and keys, with the digest left as it was or made to fit; files vanish,
become folders, or are exchanged for those of other runs, one by one, with their partners, or all but one. The thing is
then read as the product reads it, and the outcome is one of

    harmless    the same content was read, or what was lost was made again
    told apart  other content was read, and its fingerprint is another: whoever recorded the fingerprint refuses it
    named       refused by a ValueError or OSError that names the place: one line and exit status 2 for a user
    unnamed     refused, but the message does not say where
    traceback   an exception of another kind, which a user would see as a traceback
    wrong       other content was read without a word, although a checksum could have told
    hang        no answer within a minute

The last four are faults: the command then exits with status 1, and tests/test_chaos.py fails. docs/reliability.md has
the table of a long run.
"""

import argparse
import collections
import dataclasses
import functools
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
    import conftest  # noqa: F401  (devices and the compilation cache, before jax is imported)

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tiny_run import recipe, write_teacher

from rtd_jax.apps.cache import cache_teacher
from rtd_jax.apps.distill.prepare import prepare
from rtd_jax.apps.distill.run import _starting_point, train
from rtd_jax.apps.evaluate import EvaluateSettings, evaluate
from rtd_jax.apps.study import runner
from rtd_jax.apps.study.finished import read_outcome
from rtd_jax.apps.study.jobs import Job, Preparation
from rtd_jax.apps.traces import traces as traces_app
from rtd_jax.base.files import DIGEST, json_digest, write_json, write_jsonl
from rtd_jax.base.sharding import MeshSettings, make_mesh
from rtd_jax.data.sources import SourceSettings, load_traces
from rtd_jax.data.tiny_tokenizer import TINY_FORMAT, tiny_tokenizer
from rtd_jax.models.open import ModelSettings, open_model
from rtd_jax.steps.classifier import load_classifier, save_classifier
from rtd_jax.steps.detector import Detector
from rtd_jax.steps.prose import Reading as TextReading
from rtd_jax.steps.prose import read as read_text
from rtd_jax.steps.token_states import kept_states
from rtd_jax.teacher.cache import CacheWriter, TeacherCache
from rtd_jax.teacher.identity import CacheSettings
from rtd_jax.teacher.reward_head import RewardIdentity, init_head, load_head, save_head
from rtd_jax.teacher.served.requests import Reply
from rtd_jax.train.cache_identity import cache_identity
from rtd_jax.train.checkpoints import Checkpoints, check_same_settings, read_meta
from rtd_jax.train.clock import Clock
from rtd_jax.train.metrics import MetricsLog
from rtd_jax.train.recipe import Recipe
from rtd_jax.train.saved_models import load_model

BUNDLED = Path(__file__).resolve().parents[1] / "rtd_jax" / "bundled"
FAULTS = ("unnamed", "traceback", "wrong", "hang")
OUTCOMES = ("harmless", "told apart", "named", *FAULTS)
SECONDS = 60  # for one reading
MESH = MeshSettings(data=1, fsdp=-1, tensor=1)

Reading = tuple[str, str]  # digest of what was read, and its identity: what a record elsewhere would know it by


@dataclasses.dataclass(frozen=True)
class Target:
    """Something that the project wrote, and how the product reads it."""

    name: str
    folder: Path
    read: Callable[[Path], Reading]
    foreign: tuple[Path, ...] = ()  # the same thing of other runs
    skip: tuple[str, ...] = ()  # names of files that this reader does not read


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A change to a copy of a target's folder."""

    place: str  # relative path
    kind: str
    apply: Callable[[Path], None]  # gets the path of the file or folder
    is_signed: bool = False  # its digest was made to fit: only a person would do that, so other content is no fault


def digest(*parts: Any) -> str:
    """SHA-256 over values of any kind, arrays by their bytes."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(parts):
        array = isinstance(leaf, jax.Array | np.ndarray)
        found.update(np.asarray(leaf).tobytes() if array else repr(leaf).encode())
    return found.hexdigest()


# Mutations


def byte_mutations(path: Path, rng: random.Random) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Changes of a file's bytes, and of the file as a whole."""
    content = path.read_bytes()
    size = len(content)

    def to(changed: bytes) -> Callable[[Path], None]:
        return lambda place: _write(place, changed)

    yield "deleted", lambda place: place.unlink()
    yield "a folder in its place", lambda place: (place.unlink(), place.mkdir())
    yield "a link to nothing", lambda place: (place.unlink(), place.symlink_to(place.name))
    yield "empty", to(b"")
    yield "random bytes", to(rng.randbytes(max(size, 8)))
    yield "garbage appended", to(content + b"\0garbage\n")
    if size > 1:
        yield "cut in half", to(content[: size // 2])
        yield "last byte lost", to(content[:-1])
        yield "first byte lost", to(content[1:])
        yield "a length of 2^60 at the start", to((2**60).to_bytes(8, "little") + content[8:])
        for _ in range(3):
            place, bit = rng.randrange(size), 1 << rng.randrange(8)
            yield f"bit flipped at {place}", to(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
        start = rng.randrange(size)
        yield "a block zeroed", to(content[:start] + bytes(min(512, size - start)) + content[start + 512 :])
        yield "a block repeated", to(content[: size // 2] + content[size // 3 :])


VALUES = (None, True, -1, 0, 10**30, 0.5, float("nan"), float("inf"), "x", "", "../x", [], [None], {}, {"x": [1]})


def json_mutations(path: Path, rng: random.Random) -> Iterator[tuple[str, Callable[[Path], None], bool]]:
    """Other values, types and keys in a JSON file, each with the digest as it was and with one that fits."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return
    for other in (None, [], {}, "x", 3, [value]):
        yield f"all of it {other!r:.20}", _json_writer(other), False
    yield "nested deeply", lambda place: _write(place, b'{"a":' * 50_000 + b"1" + b"}" * 50_000), False
    places = list(_places(value))
    for _ in range(12):
        if not places:
            return
        place = rng.choice(places)
        new = rng.choice(VALUES)
        name = ".".join(map(str, place))
        changes = {
            f"{name} = {new!r}": partial(_replaced, value, place, new),
            f"{name} left out": partial(_without, value, place),
        }
        for kind, change in changes.items():
            changed = change()
            yield kind, _json_writer(changed), False
            if isinstance(changed, dict) and DIGEST in changed:
                yield f"{kind}, signed", _json_writer(_signed(changed)), True


def _places(value: Any, before: tuple = ()) -> Iterator[tuple]:
    """The path of every value inside a JSON value; of long lists the first three."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, item in items:
        yield (*before, key)
        yield from _places(item, (*before, key))


def _replaced(value: Any, place: Sequence, new: Any) -> Any:
    copy = json.loads(json.dumps(value))
    functools.reduce(lambda inside, key: inside[key], place[:-1], copy)[place[-1]] = new
    return copy


def _without(value: Any, place: Sequence) -> Any:
    copy = json.loads(json.dumps(value))
    del functools.reduce(lambda inside, key: inside[key], place[:-1], copy)[place[-1]]
    return copy


def _signed(value: dict[str, Any]) -> dict[str, Any]:
    content = {key: item for key, item in value.items() if key != DIGEST}
    try:
        return content | {DIGEST: json_digest(content)}
    except ValueError:  # NaN has no digest
        return value


def _json_writer(value: Any) -> Callable[[Path], None]:
    text = json.dumps(value)
    return lambda place: _write(place, text.encode())


def jsonl_mutations(path: Path, rng: random.Random) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Other rows in a file of JSON lines."""
    lines = path.read_bytes().splitlines(keepends=True)
    row = rng.randrange(len(lines))
    for other in (b"null\n", b"[]\n", b"3\n", b'"x"\n', b"{}\n", b"\n", b'{"a": NaN}\n', lines[-1] + b"\xff\n"):
        changed = b"".join([*lines[:row], other, *lines[row + 1 :]])
        yield f"line {row + 1} is {other[:12]!r}", partial(_write, content=changed)
    yield f"line {row + 1} twice", partial(_write, content=b"".join([*lines, lines[row]]))
    yield f"line {row + 1} lost", partial(_write, content=b"".join([*lines[:row], *lines[row + 1 :]]))
    value = json.loads(lines[row])
    for key in value:
        new = rng.choice(VALUES)
        changed = b"".join([*lines[:row], json.dumps(value | {key: new}).encode() + b"\n", *lines[row + 1 :]])
        yield f"line {row + 1}: {key} = {new!r}", partial(_write, content=changed)


def _write(place: Path, content: bytes) -> None:
    place.write_bytes(content)


def _exchange(place: Path, other: Path) -> None:
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    shutil.copytree(other, place) if other.is_dir() else shutil.copy(other, place)


def mutations(target: Target, rng: random.Random) -> list[Mutation]:
    """Every mutation of a target's files and folders."""
    found: list[Mutation] = []
    for path in sorted(target.folder.rglob("*")):
        place = str(path.relative_to(target.folder))
        if path.name in target.skip:
            continue
        siblings = [x for x in sorted(path.parent.glob(f"*{path.suffix}")) if x != path and x.is_dir() == path.is_dir()]
        others = {f"exchanged for {other.name}": other for other in siblings[:3]}
        for foreign in target.foreign:
            if (foreign / place).exists() and (foreign / place).is_dir() == path.is_dir():
                others[f"exchanged for {foreign.name}'s"] = foreign / place
        exchanges = [(kind, partial(_exchange, other=other)) for kind, other in others.items()]
        found += [Mutation(place, kind, apply) for kind, apply in exchanges]
        if path.is_dir():
            found += [Mutation(place, "deleted", shutil.rmtree), Mutation(place, "a stray file", _add_stray)]
            continue
        found += [Mutation(place, kind, apply) for kind, apply in byte_mutations(path, rng)]
        if path.suffix in (".json", "") and path.stat().st_size < 2**20:
            found += [Mutation(place, *change) for change in json_mutations(path, rng)]
        if path.suffix == ".jsonl":
            found += [Mutation(place, kind, apply) for kind, apply in jsonl_mutations(path, rng)]
    return [*found, *joint_mutations(target), *_pairs(found, rng)]


def joint_mutations(target: Target) -> Iterator[Mutation]:
    """Several files of another run at once, as a copy into the wrong folder leaves them."""
    files = [str(path.relative_to(target.folder)) for path in sorted(target.folder.rglob("*")) if path.is_file()]
    for foreign in target.foreign:
        for place in files:
            stem = Path(place).stem
            partners = [x for x in files if Path(x).stem == stem and Path(x).parent == Path(place).parent]
            if len(partners) > 1 and place == partners[0] and all((foreign / x).exists() for x in partners):
                yield Mutation(".", f"{stem}.* exchanged for {foreign.name}'s", partial(_copy_over, foreign, partners))
            if len(files) > 1:
                yield Mutation(".", f"all but {place} exchanged for {foreign.name}'s", partial(_swap, foreign, place))
                without = partial(_swap, foreign, place, keeps=False)
                yield Mutation(".", f"exchanged for {foreign.name}'s, which lacks {place}", without)
        yield Mutation(".", f"{foreign.name}'s added", partial(shutil.copytree, foreign, dirs_exist_ok=True))


def _copy_over(foreign: Path, places: Sequence[str], folder: Path) -> None:
    for place in places:
        shutil.copy(foreign / place, folder / place)


def _swap(foreign: Path, place: str, folder: Path, keeps: bool = True) -> None:
    """Puts another run's folder in the place of `folder`, with our file or with none at `place`."""
    kept = (folder / place).read_bytes()
    _exchange(folder, foreign)
    (folder / place).unlink(missing_ok=True)
    if keeps:
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(kept)


def _pairs(found: Sequence[Mutation], rng: random.Random) -> Iterator[Mutation]:
    """Two mutations of different files at once."""
    for _ in range(len(found) // 4):
        one, other = rng.sample(found, 2)
        if not Path(one.place).is_relative_to(other.place) and not Path(other.place).is_relative_to(one.place):
            kind = f"{one.kind}; and {other.place}: {other.kind}"

            def both(place: Path, one: Mutation = one, other: Mutation = other) -> None:
                folder = place.parents[len(Path(one.place).parts) - 1]
                one.apply(place)
                other.apply(folder / other.place)

            yield Mutation(one.place, kind, both, one.is_signed or other.is_signed)


def _add_stray(folder: Path) -> None:
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (folder / "7.bak").mkdir()
    (folder / "notes.txt").write_text("mine")


# Targets


def targets(root: Path, only: Sequence[str] = ()) -> list[Target]:
    """Makes everything that can be damaged, in a folder of its own, with a reader for each."""
    makers = {
        "checkpoint": partial(_checkpoint, kind="stages"),
        "rolling": partial(_checkpoint, kind="rolling"),
        "stage": _stage,
        "student": _student,
        "model": _model,
        "cache": _cache,
        "classifier": _classifier,
        "steps": _steps,
        "states": _states,
        "reward": _reward,
        "traces": _traces,
        "shards": _shards,
        "results": _results,
        "generations": _generations,
        "metrics": _metrics,
        "job": _job,
        "data": _data,
    }
    return [make(root) for name, make in makers.items() if not only or name in only]


@functools.cache
def _teachers(root: Path) -> tuple[Path, Path]:
    return write_teacher(root / "teacher"), write_teacher(root / "other_teacher", seed=1)


def _recipe(root: Path, **changes: Any) -> Recipe:
    small = recipe(_teachers(root)[0])
    data = dataclasses.replace(small.data, train=dataclasses.replace(small.data.train, limit=24))
    curriculum = dataclasses.replace(small.curriculum, validation_chains=2)
    settings = {"data": data, "curriculum": curriculum, "total_updates": 6}
    return dataclasses.replace(small, **(settings | {"checkpoint_every": 2} | changes))


@functools.cache
def _runs(root: Path) -> tuple[Path, Path]:
    """Two finished runs that differ in their seeds."""
    for seed, name in enumerate(("run", "other_run")):
        train(_recipe(root, seed=seed), root / name)
    return root / "run", root / "other_run"


def _checkpoint(root: Path, kind: str) -> Target:
    """A run that is resumed from its newest checkpoint, at the end of a stage or inside one."""
    experiment, state = prepare(_recipe(root), lambda _: None)

    def read(folder: Path) -> Reading:
        latest = Checkpoints(folder, 2).latest()
        if latest is not None:
            check_same_settings(latest, experiment.recipe)
        run = _starting_point(experiment, state, Clock(), latest)
        return digest(run.state, run.records, run.iterator, run.curve), ""

    ours, theirs = _runs(root)
    folders = []
    for folder in (ours, theirs):
        copy = root / f"{folder.name}_{kind}"
        shutil.copytree(folder / "checkpoints" / kind, copy / "checkpoints" / kind)
        folders.append(copy)
    return Target({"stages": "checkpoint"}.get(kind, kind), folders[0], read, (folders[1],))


def _stage(root: Path) -> Target:
    """A stage's checkpoint that is evaluated."""

    def read(folder: Path) -> Reading:
        model = load_model(str(folder / "2"))
        arrays = read_meta(folder / "2")["arrays"]  # those of another run are another model, as in another folder
        return digest(model.params, model.f, model.g, model.text), digest(sorted(arrays.items()))

    folders = []
    for run in _runs(root):
        folders.append(root / f"{run.name}_evaluated")
        shutil.copytree(run / "checkpoints" / "stages" / "2", folders[-1] / "2")
    return Target("stage", folders[0], read, (folders[1],))


def _read_model(folder: Path) -> Reading:
    settings = ModelSettings(str(folder), "float32", "float32")
    model = open_model(settings, make_mesh(MESH), lambda _: None)
    texts = [model.tokenizer("What is 2 + 3?")["input_ids"], model.tokenizer.eos_token_id]
    return digest(model.config, model.params, texts), digest(str(model.fingerprint), model.tokenizer_fingerprint)


def _student(root: Path) -> Target:
    """The Hugging Face folder that a run writes."""
    ours, theirs = _runs(root)
    return Target("student", ours / "student", _read_model, (theirs / "student",))


def _model(root: Path) -> Target:
    """A Hugging Face folder of several weight files, as a hub has it."""
    from rtd_jax.models import to_hf

    before, to_hf.MAX_SHARD_BYTES = to_hf.MAX_SHARD_BYTES, 20_000
    try:
        folders = [write_teacher(root / name, seed) for seed, name in ((0, "sharded"), (1, "other_sharded"))]
    finally:
        to_hf.MAX_SHARD_BYTES = before
    return Target("model", folders[0], _read_model, (folders[1],))


def _cache(root: Path) -> Target:
    """A teacher's outputs, beside those of another teacher, of fewer tokens and of other layers."""
    ours, theirs = _teachers(root)
    small, cache = _recipe(root), CacheSettings(top_k=8, chains_per_shard=12, layers=(1,))
    folders = []
    for teacher, settings, name in (
        (ours, cache, "cache"),
        (theirs, cache, "other_cache"),
        (ours, dataclasses.replace(cache, top_k=4), "top_4_cache"),
        (ours, dataclasses.replace(cache, layers=(0,)), "layer_0_cache"),
    ):
        folders.append(root / name)
        teacher_settings = dataclasses.replace(small.teacher, path=str(teacher), cache=str(folders[-1]))
        cache_teacher(dataclasses.replace(small, teacher=teacher_settings, cache=settings), folders[-1])
    small = dataclasses.replace(_recipe(root), cache=cache)
    mesh = make_mesh(MESH)
    identity = cache_identity(small, open_model(small.teacher, mesh, lambda _: None))
    keys = sorted(CacheWriter(folders[0], identity).keys)

    def read(folder: Path) -> Reading:
        lost = set(keys) - set(CacheWriter(folder, identity).keys)  # which a writer would add again
        cache = TeacherCache(folder, identity)
        found = {key: cache.read(key) for key in keys if key in cache}
        return digest("" if lost else sorted(found.items())), digest(sorted(lost))

    return Target("cache", folders[0], read, tuple(folders[1:]))


def _classifier(root: Path) -> Target:
    folder, other = root / "classifier", root / "other_classifier"
    shutil.copytree(BUNDLED / "tiny_boundaries", folder)
    fitted = load_classifier(folder)
    save_classifier(
        other, dataclasses.replace(fitted, params=jax.tree.map(lambda x: 1.5 * x, fitted.params), slope=2.0)
    )

    def read(folder: Path) -> Reading:
        found = load_classifier(folder)
        return digest(found.params, found.scale, found.threshold, found.layers, found.text), found.fingerprint

    return Target("classifier", folder, read, (other,))


def _steps(root: Path) -> Target:
    """The steps of texts that a classifier found, kept on disk."""
    texts = [(t.prompt, t.body, t.source) for t in load_traces(SourceSettings("synthetic", limit=3))]
    settings = ModelSettings(str(BUNDLED / "tiny_teacher"), "float32", "float32")
    mesh = make_mesh(MESH)
    model = open_model(settings, mesh, lambda _: None)

    def detector(folder: Path) -> Detector:
        classifier = load_classifier(BUNDLED / "tiny_boundaries")
        return Detector(classifier, model.tokenizer, mesh, lambda: (model.model, model.params), "tiny", folder, 4)

    detector(root / "steps").find(texts)
    return Target("steps", root / "steps", lambda folder: (digest(detector(folder).find(texts)), ""))


def _states(root: Path) -> Target:
    """Hidden states that a boundary classifier is fitted to, kept on disk."""
    tokenizer = tiny_tokenizer()
    texts = [read_text(tokenizer, "What?", text, TINY_FORMAT) for text in ("Add 2 and 3 .", "Then 5 + 4 = 9 .")]

    def run(texts: Sequence[TextReading]) -> list[np.ndarray]:
        return [np.full((len(text.ends_T), 1, 4), len(text.ends_T), np.float16) for text in texts]

    def read(folder: Path) -> Reading:
        return digest(kept_states(folder, "teacher", texts, (0,), run, lambda _: None)), ""

    read(root / "states")
    return Target("states", root / "states", read)


def _reward(root: Path) -> Target:
    folders = []
    for seed, name in enumerate(("reward", "other_reward")):
        folders.append(root / name)
        identity = RewardIdentity("t" * 64, "k" * 64, "text", (1, 2), True, 34)
        head = init_head(jax.random.key(seed), 34, 8)
        save_head(folders[-1], head | {"out": jax.random.normal(jax.random.key(seed), (8,))}, identity)

    def read(folder: Path) -> Reading:
        found = load_head(folder, "t" * 64, "k" * 64, "text")
        return digest(found.head, found.identity), found.digest

    return Target("reward", folders[0], read, (folders[1],))


class _Right:
    """A teacher that solves every problem as its reference does."""

    def __init__(self, name: str, solutions: dict[str, str]) -> None:
        self._name, self._solutions = name, solutions

    def identity(self) -> dict[str, Any]:
        return {"teacher": self._name}

    def complete(self, requests: Any, missing: Any, record: Any) -> None:
        record([(r, Reply(self._solutions[r.problem.prompt], "stop")) for r in requests if r.id in missing])


def _write_traces(folder: Path, name: str = "right") -> None:
    source = SourceSettings("synthetic", limit=8)
    solutions = {trace.prompt: trace.completion for trace in load_traces(source)}
    before, traces_app._backend = traces_app._backend, lambda *_: _Right(name, solutions)
    output = traces_app.OutputSettings(rows_per_shard=3)
    sampling = dataclasses.replace(traces_app.SamplingSettings(), samples=1)
    try:
        traces_app.write_traces(traces_app.TracesRecipe(source, "jax", sampling=sampling, output=output), folder)
    finally:
        traces_app._backend = before


@functools.cache
def _trace_folders(root: Path) -> tuple[Path, Path]:
    _write_traces(root / "traces")
    _write_traces(root / "other_traces", "other")
    return root / "traces", root / "other_traces"


def _read_shards(folder: Path) -> Reading:
    found = load_traces(SourceSettings("stepwise", str(folder)))
    return digest([(t.prompt, t.body, t.spans, t.final) for t in found]), ""


def _traces(root: Path) -> Target:
    """A teacher's own chains, when the command is run again."""

    def read(folder: Path) -> Reading:
        _write_traces(folder)
        return _read_shards(folder)

    ours, *others = _trace_folders(root)
    return Target("traces", ours, read, tuple(others))


def _shards(root: Path) -> Target:
    """A teacher's own chains, when they are trained on."""
    skip = ("responses.jsonl", "requests.json")
    ours, *others = _trace_folders(root)
    return Target("shards", ours, _read_shards, tuple(others), skip)


def _copied(root: Path, name: str, files: Sequence[str]) -> tuple[Path, Path]:
    folders = []
    for run in _runs(root):
        folder = root / f"{run.name}_{name}"
        folder.mkdir()
        for file in files:
            shutil.copy(run / file, folder / file)
        folders.append(folder)
    return folders[0], folders[1]


def _results(root: Path) -> Target:
    """What a study reads of a finished run."""
    ours, theirs = _copied(root, "results", ("report.json", "generations.jsonl"))

    def read(folder: Path) -> Reading:
        found = read_outcome("task", "method", 0, folder, ("seed=0",))
        return digest(dataclasses.astuple(found)), digest(dataclasses.astuple(found))  # a result is its own identity

    return Target("results", ours, read, (theirs,))


def _generations(root: Path) -> Target:
    """Texts that `evaluate` scores."""
    ours, theirs = _copied(root, "generations", ("generations.jsonl",))
    scores = root / "scores"

    def read(folder: Path) -> Reading:
        shutil.rmtree(scores, ignore_errors=True)
        evaluate(EvaluateSettings(generations=str(folder / "generations.jsonl"), out=str(scores)))
        report = json.loads((scores / "report.json").read_text())
        return digest(report), digest(report)

    return Target("generations", ours, read, (theirs,))


def _metrics(root: Path) -> Target:
    """The log that a resumed run goes on with: damaged lines are dropped, as those of later updates are."""
    ours, theirs = _copied(root, "metrics", ("metrics.jsonl",))

    def read(folder: Path) -> Reading:
        MetricsLog(folder, 4).close()
        updates = [json.loads(line)["update"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return digest(max(updates, default=0) <= 4), ""

    return Target("metrics", ours, read, (theirs,))


def _job(root: Path) -> Target:
    """What a study notes of its runs and of what it prepared for them."""
    base = root / "base.py"
    base.write_text("# a config\n")
    folders = []
    for seed, name in enumerate(("study", "other_study")):
        folders.append(root / name)
        runner.claim_jobs([_job_of(folders[-1], seed)], base)
        write_json(folders[-1] / "prepared.json", ["reward_model", "--config=base.py", f"--config.seed={seed}"])

    def read(folder: Path) -> Reading:
        command = ("reward_model", "--config=base.py", "--config.seed=0")
        runner.claim_jobs([_job_of(folder, 0)], base)
        if (folder / "prepared.json").exists():  # else it would be prepared again
            runner.prepare_once([Preparation("reward", command, folder / "prepared")])
        return "claimed", ""

    return Target("job", folders[0], read, (folders[1],))


def _job_of(folder: Path, seed: int) -> Job:
    return Job("task", "kd", seed, (f"seed={seed}",), folder / "run")


def _data(root: Path) -> Target:
    """Rows of a user's own, in both kinds of files. Nothing says what they should be but the run that read them."""
    folders = []
    for seed, name in enumerate(("data", "other_data")):
        folders.append(root / name)
        traces = load_traces(SourceSettings("synthetic", limit=12, seed=seed))
        rows = [{"prompt": t.prompt, "completions": t.body.splitlines(), "answer": t.answer} for t in traces]
        write_jsonl(folders[-1] / "rows" / "train.jsonl", rows)
        (folders[-1] / "table").mkdir()
        pq.write_table(pa.Table.from_pylist(rows), folders[-1] / "table" / "train.parquet")

    def read(folder: Path) -> Reading:
        parts = [load_traces(SourceSettings("stepwise", str(folder / part))) for part in ("rows", "table")]
        found = digest([(t.prompt, t.body, t.spans, t.final) for part in parts for t in part])
        return found, found

    return Target("data", folders[0], read, (folders[1],))


# Outcomes


@dataclasses.dataclass(frozen=True)
class Result:
    target: str
    mutation: Mutation
    outcome: str
    words: str  # of the refusal or the exception

    def __str__(self) -> str:
        return f"{self.outcome:<10} {self.target}: {self.mutation.place}: {self.mutation.kind}\n    {self.words[:400]}"


class _Hang(BaseException):
    """A reading took too long."""


def _raise_hang(*_: Any) -> None:
    raise _Hang


def outcome_of(target: Target, sound: Reading, mutation: Mutation, scratch: Path) -> Result:
    """Applies a mutation to a copy of the target in `scratch`, reads it, and says what followed."""
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(target.folder, scratch)
    mutation.apply(scratch / mutation.place)
    signal.signal(signal.SIGALRM, _raise_hang)
    signal.alarm(SECONDS)
    try:
        content, identity = target.read(scratch)
    except (ValueError, OSError) as error:
        return Result(target.name, mutation, "named" if str(scratch) in str(error) else "unnamed", str(error))
    except _Hang:
        return Result(target.name, mutation, "hang", "")
    except Exception as error:
        return Result(target.name, mutation, "traceback", f"{type(error).__name__}: {error}")
    finally:
        signal.alarm(0)
    if content == sound[0]:
        return Result(target.name, mutation, "harmless", "")
    is_known = identity != sound[1] or mutation.is_signed
    return Result(target.name, mutation, "told apart" if is_known else "wrong", "")


def run(root: Path, per_target: int, seed: int = 0, only: Sequence[str] = ()) -> list[Result]:
    """Makes the targets in `root` and tries `per_target` mutations of each, chosen at random."""
    results = []
    for target in targets(root, only):
        rng = random.Random(f"{seed} {target.name}")
        sound, again = target.read(_copy(target.folder, root / "scratch")), target.read(root / "scratch")
        assert sound == again, f"{target.name} is not read the same twice"
        possible = mutations(target, rng)
        chosen = rng.sample(possible, min(per_target, len(possible)))
        started = time.monotonic()
        results += [outcome_of(target, sound, mutation, root / "scratch") for mutation in chosen]
        seconds = time.monotonic() - started
        print(
            f"{target.name}: {len(chosen)} of {len(possible)} mutations, {seconds:.0f} s", file=sys.stderr, flush=True
        )
    return results


def _copy(folder: Path, place: Path) -> Path:
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder, place)
    return place


def table(results: Sequence[Result]) -> str:
    """Outcomes by target, as Markdown."""
    counts = collections.Counter((result.target, result.outcome) for result in results)
    names = list(dict.fromkeys(result.target for result in results))
    rows = [[name, *(counts[name, outcome] for outcome in OUTCOMES)] for name in names]
    rows.append(["all", *(sum(row[i] for row in rows) for i in range(1, len(OUTCOMES) + 1))])
    lines = [f"| | {' | '.join(OUTCOMES)} |", f"|---|{'--:|' * len(OUTCOMES)}"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--per_target", type=int, default=40, help="mutations of each kind of folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="targets, with commas between")
    parser.add_argument("--show", action="store_true", help="print every refusal")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as silence:
        stdout, sys.stdout = sys.stdout, silence  # the commands print what they do
        try:
            only = [name for name in arguments.only.split(",") if name]
            results = run(Path(folder), arguments.per_target, arguments.seed, only)
        finally:
            sys.stdout = stdout
    faults = [result for result in results if result.outcome in FAULTS]
    for result in results if arguments.show else faults:
        print(result)
    print(f"\n{len(results)} mutations, {len(faults)} faults\n\n{table(results)}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
