"""Orbax checkpoints: one for each finished stage, and rolling ones inside a stage.

    <workdir>/checkpoints/stages/<n>        kept for ever; `--config.resume_from` takes one
    <workdir>/checkpoints/rolling/<update>  the newest few

Each holds the state, which can be restored on any mesh, and `meta`: the position in the data, the stage records, the
settings, and the fingerprints of teacher, tokenizer and data. Orbax writes under a temporary name and renames, so a run
that is killed while it saves still has the checkpoint before.
"""

import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict

from rtd_jax.base.types import Params
from rtd_jax.train.state import TrainState

FORMAT = 1
# Settings that may differ between a run and its continuation: they do not change a bit of the result. Models and data
# may have moved; their content is compared by fingerprint instead.
FREE_SETTINGS = (
    "mesh.",
    "log_every",
    "keep_checkpoints",
    "evaluation.",
    "resume_from",
    "data.steps_cache",
    "teacher.path",
    "teacher.cache",
    "reward.model",
    "student.path",
    "data.train.location",
    "data.validation.location",
    "data.test.",
)


class Checkpoints:
    """Saves and finds the checkpoints of a run; `keep` is the number of rolling ones.

    Every method raises ValueError where a checkpoint cannot be written or read, with its path and the way out.
    """

    def __init__(self, workdir: Path, keep: int):
        self._root = (workdir / "checkpoints").absolute()
        self._keep = keep

    def save_stage(self, number: int, state: TrainState, meta: dict[str, Any]) -> None:
        """Writes the checkpoint of finished stage `number`, counted from 1."""
        self._save("stages", number, state, meta)

    def save_rolling(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Writes a checkpoint inside a stage and removes the oldest beyond `keep`."""
        self._save("rolling", int(state.step), state, meta)

    def latest(self) -> Path | None:
        """The checkpoint with the most updates; of two with equally many, the stage's."""
        paths = []
        for kind in ("rolling", "stages"):
            with self._manager(kind) as manager:
                paths += [self._root / kind / str(step) for step in manager.all_steps()]
        return max(paths, key=lambda path: (read_meta(path)["update"], path.parent.name == "stages"), default=None)

    def _manager(self, kind: str) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep if kind == "rolling" else None,
            create=False,
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,
        )
        (self._root / kind).mkdir(parents=True, exist_ok=True)
        return ocp.CheckpointManager(self._root / kind, options=options)

    def _save(self, kind: str, name: int, state: TrainState, meta: dict[str, Any]) -> None:
        parts = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            meta=ocp.args.JsonSave({"format": FORMAT, "update": int(state.step), **meta}),
        )
        try:
            with self._manager(kind) as manager:
                if name not in manager.all_steps():  # else it is the same update of the same deterministic run
                    manager.save(name, args=parts)
        except Exception as error:  # orbax and tensorstore raise many kinds; every one of them means "not saved"
            raise ValueError(
                f"could not write checkpoint {self._root / kind / str(name)}: {_first_line(error)}. Free space or "
                "choose another --workdir. The same command, run again, resumes from the checkpoint before this one"
            ) from error


def read_meta(path: Path) -> dict[str, Any]:
    """The `meta` of a checkpoint.

    Raises:
      ValueError: `path` holds no readable checkpoint of this format.
    """
    meta = _restore(path, "meta", ocp.args.JsonRestore())
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise ValueError(
            f"{path} has checkpoint format {(meta or {}).get('format')!r}, this version reads {FORMAT}; "
            "use the rtd_jax version that wrote it"
        )
    return meta


def restore_state(path: Path, like: TrainState) -> TrainState:
    """The state of a checkpoint, with the shapes, dtypes and shardings of `like`: arrays or jax.ShapeDtypeStruct.

    Raises:
      ValueError: the checkpoint is damaged, or holds arrays of other names or shapes.
    """
    return jax.block_until_ready(_restore(path, "state", ocp.args.StandardRestore(like)))


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
    restore = ocp.args.PyTreeRestore(item=item, restore_args=placed, partial_restore=True)
    return _restore(path, "state", restore)["params"]


def check_same_settings(path: Path, settings: dict[str, Any]) -> None:
    """Raises ValueError when the run of checkpoint `path` had other settings, naming the first that differs."""
    before = flatten_dict(read_meta(path)["settings"], sep=".")
    now = flatten_dict(json.loads(json.dumps(settings)), sep=".")  # tuples become lists, as in the checkpoint
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


def _restore(path: Path, part: str, arguments: ocp.args.CheckpointArgs) -> Any:
    """The part "state" or "meta" of a checkpoint. Raises ValueError where it cannot be read, whatever the cause."""
    try:
        if not (path / "state").is_dir() or not (path / "meta").is_dir():
            raise ValueError("no 'state' and 'meta' in it")
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            return checkpointer.restore(path, args=ocp.args.Composite(**{part: arguments}))[part]
    except Exception as error:
        raise ValueError(
            f"{path} is not a readable checkpoint: {_first_line(error)}. Give a folder such as "
            "runs/rtd_tiny/checkpoints/stages/2; if this one is damaged, delete it and run again: the one before it is "
            "used"
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"
