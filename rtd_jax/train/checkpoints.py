"""Orbax checkpoints: one for each finished stage, and rolling ones inside a stage.

    <workdir>/checkpoints/stages/<n>        kept for ever; `--config.resume_from` takes one
    <workdir>/checkpoints/rolling/<update>  the newest few

Each holds the state, which can be restored on any mesh, without the frozen base of a student with an adapter, which is
read from where it came from again, and `meta`: the position in the data, the stage records, the
settings, and the fingerprints of teacher, tokenizer and data. `meta` has a digest of each array of the state, and one
of itself, so a changed bit, or a state beside the `meta` of another checkpoint, is refused. Orbax writes under a
temporary name and renames, so a run that is killed while it saves still has the checkpoint before.
"""

import contextlib
import glob
import json
import logging
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict

from rtd_jax.base.files import DIGEST, json_digest, parse_json, read_record
from rtd_jax.base.records import shaped
from rtd_jax.base.settings import build, defaults
from rtd_jax.base.types import Params
from rtd_jax.train.array_digests import array_digests
from rtd_jax.train.curriculum import StageRecord
from rtd_jax.train.state import TrainState, with_base, without_base

T = TypeVar("T")

FORMAT = 2
WITHOUT_DIGESTS = 1  # an earlier format, which is read too
# What orbax and tensorstore say of a file that may be sound, but could not be read now.
_NOT_NOW = re.compile(
    "PERMISSION_DENIED|RESOURCE_EXHAUSTED|Permission denied|Too many open|Cannot allocate|Input/output"
)
# Settings that may differ between a run and its continuation: they do not change a bit of the result. Models and data
# may have moved; their content is compared by fingerprint instead.
FREE_SETTINGS = (
    "mesh.",
    "log_every",
    "keep_checkpoints",
    "checkpoint_digest",
    "evaluation.",
    "resume_from",
    "data.steps_cache",
    "teacher.path",
    "teacher.revision",
    "teacher.cache",
    "teacher.server",
    "teacher.serving.",
    "reward.model",
    "student.path",
    "student.revision",
    "data.train.location",
    "data.train.revision",
    "data.validation.location",
    "data.validation.revision",
    "data.test.",
)


class DamagedCheckpoint(ValueError):
    """A checkpoint that cannot be used, whatever is tried."""


@dataclass(frozen=True)
class Meta:
    """What a checkpoint must say besides the state, and may say."""

    update: int  # of the state
    settings: dict[str, Any]
    iterator: str  # position in the data, as JSON text; "null" at the end of a stage
    records: tuple[dict[str, Any], ...] = ()  # of the stages, `StageRecord`
    curve: str = "[]"  # evaluations on the way, as JSON text
    seconds: float = 0.0  # of training
    tokens: tuple[int, ...] = (0, 0)  # predicted tokens that were trained on, of the data and drawn by the student
    fingerprints: dict[str, str] = field(default_factory=dict)
    arrays: dict[str, str] = field(default_factory=dict)  # `array_digests` of the state; {} where they are left out

    def __post_init__(self) -> None:
        for record in self.records:
            try:
                StageRecord.from_dict(build(StageRecord, record, "records").to_dict())
            except (KeyError, TypeError) as error:
                raise ValueError(f"records has {record}, which is no record of a stage ({error})") from error
        position, curve = (parse_json(getattr(self, name), name) for name in ("iterator", "curve"))
        is_curve = isinstance(curve, list) and all(isinstance(row, dict) and "update" in row for row in curve)
        if len(self.tokens) != 2 or min(self.tokens) < 0:
            raise ValueError(f"tokens is {self.tokens}; expected two numbers from 0")
        if not 0 <= self.update < 2**31 or self.seconds < 0 or not isinstance(position, dict | None) or not is_curve:
            raise ValueError(
                f"update is {self.update}, seconds {self.seconds}, iterator {self.iterator[:60]!r} and curve "
                f"{self.curve[:60]!r}; expected numbers from 0, a position or null, and rows with an update"
            )


class Checkpoints:
    """Saves and finds the checkpoints of a run; `keep` is the number of rolling ones.

    With `digest` the arrays of a state get digests, by which damage is noticed when it is restored. Every method raises
    ValueError where a checkpoint cannot be written or read, with its path and the way out; so does a workdir whose path
    has characters with which none can be written.
    """

    def __init__(self, workdir: Path, keep: int, *, digest: bool = True):
        self._root = (workdir / "checkpoints").absolute()
        self._keep, self._digest = keep, digest
        check_path(self._root)
        if glob.has_magic(str(self._root)):  # orbax looks for what it has written with a pattern made of the path
            raise ValueError(
                f"--workdir={workdir} has one of the characters [ * ? in its path, with which checkpoints are written "
                "that cannot be read; choose another --workdir"
            )

    def save_stage(self, number: int, state: TrainState, meta: dict[str, Any]) -> None:
        """Writes the checkpoint of finished stage `number`, counted from 1."""
        self._save("stages", number, state, meta)

    def save_rolling(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Writes a checkpoint inside a stage and removes the oldest beyond `keep`."""
        self._save("rolling", int(state.step), state, meta)
        if jax.process_index() == 0:
            for path in numbered(self._root / "rolling")[: -self._keep]:
                shutil.rmtree(path, ignore_errors=True)

    def latest(self) -> Path | None:
        """The checkpoint with the most updates; of two with equally many, the stage's.

        A damaged one that is older does not matter.
        """
        rolling, stages = (numbered(self._root / kind)[-1:] for kind in ("rolling", "stages"))
        if not stages or not rolling:
            newest = next(iter(rolling or stages), None)
        elif self._is_before(stages[0], rolling[0]):
            newest = rolling[0]
        else:
            newest = stages[0]
        if newest is not None:
            _or_offer_older(newest, read_meta)
        return newest

    def _is_before(self, stage: Path, rolling: Path) -> bool:
        try:
            return read_meta(stage)["update"] < int(rolling.name)
        except DamagedCheckpoint:
            return _finished_stages(rolling) >= int(stage.name)

    def _save(self, kind: str, name: int, state: TrainState, meta: dict[str, Any]) -> None:
        folder = self._root / kind
        path = folder / str(name)
        state = state._replace(params=without_base(state.params))
        try:
            arrays = array_digests(state) if self._digest else {}
            content = {"format": FORMAT, "update": int(state.step), **meta, "arrays": arrays}
            parts = ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                meta=ocp.args.JsonSave({**content, DIGEST: json_digest(content)}),
            )
            if jax.process_index() == 0:
                folder.mkdir(parents=True, exist_ok=True)
                for killed in folder.glob("*.orbax-checkpoint-tmp*"):
                    shutil.rmtree(killed, ignore_errors=True)
            if not path.exists():  # else it is the same update of the same deterministic run
                with _reported_once(), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
                    checkpointer.save(path, args=parts)
        except Exception as error:  # orbax and tensorstore raise many kinds; every one of them means "not saved"
            many_files = re.search("RESOURCE_EXHAUSTED|Too many open", str(error))
            way_out = "Allow more open files (`ulimit -n 65536`)" if many_files else "Free space"
            raise ValueError(
                f"could not write checkpoint {path}: {_first_line(error)}. {way_out} or "
                "choose another --workdir. The same command, run again, resumes from the checkpoint before this one"
            ) from error


def numbered(folder: Path) -> list[Path]:
    """The folders whose names are numbers, in their order; other files and folders are not checkpoints."""
    names = [path for path in folder.glob("*") if re.fullmatch("0|[1-9][0-9]*", path.name) and path.is_dir()]
    return sorted(names, key=lambda path: int(path.name))


def check_path(path: Path) -> None:
    """Raises ValueError where tensorstore would look for a checkpoint in another place."""
    if "\\" in str(path):
        raise ValueError(f"{path} has a backslash, which is read as a slash; choose a path without one")


def rename_settings(settings: dict[str, Any]) -> None:
    """Gives settings of earlier versions the names that they have now, where these mean the same."""
    loss = settings.get("loss")
    if isinstance(loss, dict) and "transition_form" in loss:
        if loss["transition_form"] == "direction":
            del loss["transition_form"]
        elif not loss.get("alignment_weight"):  # which would now be squared too
            del loss["transition_form"]
            loss["distance"] = "squared"


def read_meta(path: Path) -> dict[str, Any]:
    """The `meta` of a checkpoint, with the keys of `Meta` and perhaps others.

    Raises:
      ValueError: `path` holds no readable checkpoint of this format.
    """
    way_out = f"give a folder such as runs/rtd_tiny/checkpoints/stages/2; if {path} is damaged, do without it"
    try:
        if not (path / "state").is_dir() or not (path / "meta").is_dir():
            raise DamagedCheckpoint(f"{path} is not a readable checkpoint: no 'state' and 'meta' in it; {way_out}")
    except OSError as error:
        raise ValueError(f"{path}: could not be read ({error.strerror})") from error
    file = path / "meta" / "metadata"
    try:
        content = read_record(file, FORMAT, way_out, undigested=(WITHOUT_DIGESTS,))
        known = {name: content[name] for name in Meta.__dataclass_fields__ if name in content}
        meta = content | asdict(shaped(Meta, known, file, way_out))
        rename_settings(meta["settings"])
    except ValueError as error:
        if isinstance(error.__cause__, OSError):  # which says nothing about its content
            raise
        raise DamagedCheckpoint(str(error)) from error
    finished = sum(record["ended_by"] is not None for record in meta["records"])
    for kind, number, what in (("rolling", meta["update"], "update"), ("stages", finished, "stage")):
        if path.parent.name == kind and path.name.isdecimal() and int(path.name) != number:
            raise DamagedCheckpoint(f"{path} holds {what} {number}, not the one of its name; {way_out}")
    return meta


def restore_state(path: Path, like: TrainState) -> TrainState:
    """The state of a checkpoint, with the shapes, dtypes and shardings of `like`: arrays or jax.ShapeDtypeStruct.

    The frozen base of a student with an adapter is that of `like`, whoever calls this compares it by its fingerprint.

    Raises:
      ValueError: the checkpoint is damaged, or holds arrays of other names or shapes; names the newest one before it
        that can be restored.
    """

    def restored(path: Path) -> TrainState:
        trained = like._replace(params=without_base(like.params))
        state = jax.block_until_ready(_restore(path, ocp.args.StandardRestore(trained)))
        _check_arrays(path, state)
        return state._replace(params=with_base(state.params, like.params))

    return _or_offer_older(path, restored)


def restore_params(path: Path, abstract: Params, shardings: Params) -> Params:
    """Some of a checkpoint's params, such as {"student": .., "f": .., "g": ..}; the optimizer is not read.

    Args:
      abstract: shapes and dtypes, as jax.ShapeDtypeStruct.
      shardings: of each array; a tree like `abstract`.

    Raises:
      ValueError: the checkpoint is damaged, or holds arrays of other names or shapes.
    """
    item = {"params": abstract}
    placed = ocp.checkpoint_utils.construct_restore_args(item, {"params": shardings})
    try:
        restored = _restore(path, ocp.args.PyTreeRestore(item=item, restore_args=placed, partial_restore=True))
        _check_arrays(path, restored)
    except DamagedCheckpoint as error:
        raise ValueError(f"{error}. Give another stage of the run, or its student/ folder") from error
    return restored["params"]


def _check_arrays(path: Path, restored: Any) -> None:
    """Raises DamagedCheckpoint where restored arrays are not those that the checkpoint's `meta` was written with."""
    saved = read_meta(path)["arrays"]
    if not saved:
        return
    for name, digest in array_digests(restored).items():
        if saved.get(name) != digest:
            raise DamagedCheckpoint(
                f"{path} was changed or damaged after it was written, or its state is another checkpoint's: {name} is "
                f"{digest}, its meta says {saved.get(name, 'nothing of it')}"
            )


def _or_offer_older(path: Path, read: Callable[[Path], T]) -> T:
    """`read(path)`; where the checkpoint is damaged, the error names the newest one before it that `read` accepts."""
    try:
        return read(path)
    except DamagedCheckpoint as error:
        damage = str(error)  # the error itself holds arrays, for which there may not be room beside others
    for older in _before(path):
        try:
            read(older)
        except ValueError:
            continue
        raise ValueError(
            f"{damage}. The newest intact checkpoint before it is {older}: delete {path}, and the same command goes on "
            "from there"
        )
    raise ValueError(f"{damage}. No intact checkpoint is before it; without {path}, the same command starts afresh")


def _before(path: Path) -> list[Path]:
    """The checkpoints of the same run that are older than `path` and whose `meta` can be read, the newest first."""
    root, is_stage = path.parent.parent, path.parent.name == "stages"
    found: list[tuple[int, bool, Path]] = []
    for other in (*numbered(root / "rolling"), *numbered(root / "stages")):
        with contextlib.suppress(ValueError):
            found.append((read_meta(other)["update"], other.parent.name == "stages", other))
    try:
        own = (read_meta(path)["update"], is_stage)
        older = [item for item in found if item[:2] < own]
    except ValueError:
        number = int(path.name) if path.name.isdecimal() else 0
        if is_stage:
            older = [x for x in found if (int(x[2].name) if x[1] else _finished_stages(x[2])) < number]
        else:
            older = [item for item in found if item[0] <= number]
    return [other for *_, other in sorted(older, key=lambda item: item[:2], reverse=True)]


def _finished_stages(path: Path) -> int:
    """How many stages were finished when a checkpoint was saved; 0 where it cannot be read."""
    try:
        return sum(record["ended_by"] is not None for record in read_meta(path)["records"])
    except ValueError:
        return 0


def check_same_settings(path: Path, recipe: Any) -> None:
    """Raises ValueError when the run of checkpoint `path` had other settings, naming the first that differs.

    A setting that came to the recipe after the checkpoint was written had its default then.
    """

    def flat(settings: dict[str, Any]) -> dict[str, Any]:
        return flatten_dict(json.loads(json.dumps(settings)), sep=".")  # tuples become lists, as in the checkpoint

    now, saved, default = (
        flat(asdict(recipe)),
        flat(read_meta(path)["settings"]),
        flat(defaults(type(recipe)).to_dict()),
    )
    before = {key: value for key, value in default.items() if key in now} | saved
    changed = sorted(
        key
        for key in before.keys() | now.keys()
        if not key.startswith(FREE_SETTINGS) and before.get(key) != now.get(key)
    )
    if changed:
        key, others = changed[0], changed[1:]
        raise ValueError(
            f"{path.parents[2]} holds a run with other settings: {key} was {before.get(key)!r}, is {now.get(key)!r}"
            + (f" (and {len(others)} more: {', '.join(others[:4])})" if others else "")
            + ". Use another --workdir, or the old settings, or start from one of its stages with "
            "--config.resume_from=<stage checkpoint>"
        )


def _restore(path: Path, arguments: ocp.args.CheckpointArgs) -> Any:
    """The state of a checkpoint. Raises ValueError where it cannot be read, and says whether it is damaged."""
    check_path(path)
    try:
        with _reported_once(), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            state = checkpointer.restore(path, args=ocp.args.Composite(state=arguments))["state"]
    except Exception as error:
        if _NOT_NOW.search(str(error)):
            raise ValueError(
                f"{path} could not be read: {_first_line(error)}. It need not be damaged: see that this user may read "
                "it and that enough files may be open (`ulimit -n 65536`), and run again"
            ) from error
        raise DamagedCheckpoint(f"{path} is not a readable checkpoint: {_first_line(error)}") from error
    for place, leaf in jax.tree_util.tree_leaves_with_path(state):
        if not isinstance(leaf, jax.Array):  # what was asked for comes back where the list of arrays lacks it
            name = jax.tree_util.keystr(place, simple=True, separator="/")
            raise DamagedCheckpoint(f"{path} is not a readable checkpoint: its list of arrays lacks {name}")
    return state


@contextlib.contextmanager
def _reported_once() -> Iterator[None]:
    """A failure of this block is reported by its exception alone, not by a traceback for each array as well."""
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    level = logger.level

    def drop_late_answers(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":  # by orbax, when the first of many writes failed
            hook(unraisable)

    sys.unraisablehook = drop_late_answers
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except Exception:  # the others fail later, or say so when they are collected: the hook stays
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        raise
    else:
        sys.unraisablehook = hook
    finally:
        logger.setLevel(level)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"
