"""Orbax checkpoints: one per finished stage, rolling ones inside a stage.

    <workdir>/checkpoints/stages/<n>        kept for ever; `--config.resume_from` takes one
    <workdir>/checkpoints/rolling/<update>  the newest few

Each holds the state (with the mesh it lay on left out: it can be restored on another), and `meta`: data iterator
position, stage records, settings, and fingerprints of teacher, tokenizer and data. Orbax writes to a temporary name and
renames, so a run that is killed while saving leaves the checkpoint before it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from rtd_jax.base.types import Params
from rtd_jax.train.state import TrainState

FORMAT = 1
# What may differ between a run and its continuation without changing a bit of it.
# Models and data may have moved: their content is compared by fingerprint instead.
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
    """Saves and restores a run's checkpoints. Raises ValueError with the path and the way out when it cannot."""

    def __init__(self, workdir: Path, keep: int):
        self._root = (workdir / "checkpoints").absolute()
        self._keep = keep

    def save_stage(self, number: int, state: TrainState, meta: dict[str, Any]) -> Path:
        """Writes the checkpoint of finished stage `number` (1-based)."""
        return self._save("stages", number, None, state, meta)

    def save_rolling(self, state: TrainState, meta: dict[str, Any]) -> Path:
        """Writes a checkpoint inside a stage and drops the oldest beyond `keep`."""
        return self._save("rolling", int(state.step), self._keep, state, meta)

    def latest(self) -> Path | None:
        """The checkpoint with the most updates; a stage's goes before a rolling one of the same update."""
        found = []
        for kind in ("rolling", "stages"):
            with self._manager(kind, None) as manager:
                found += [self._root / kind / str(step) for step in manager.all_steps()]
        return max(found, key=lambda path: (read_meta(path)["update"], path.parent.name == "stages"), default=None)

    def _manager(self, kind: str, keep: int | None) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=False, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        (self._root / kind).mkdir(parents=True, exist_ok=True)
        return ocp.CheckpointManager(self._root / kind, options=options)

    def _save(self, kind: str, name: int, keep: int | None, state: TrainState, meta: dict[str, Any]) -> Path:
        path = self._root / kind / str(name)
        meta = {"format": FORMAT, "update": int(state.step), **meta}
        try:
            with self._manager(kind, keep) as manager:
                if name in manager.all_steps():
                    return path  # the same update of the same deterministic run
                manager.save(
                    name, args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
                )
        except Exception as error:  # orbax and tensorstore raise many kinds; every one of them means "not saved"
            raise ValueError(
                f"could not write checkpoint {path}: {_first_line(error)}. Free space or choose another --workdir. "
                "The same command, run again, resumes from the checkpoint before this one"
            ) from error
        return path


def read_meta(path: Path) -> dict[str, Any]:
    """The `meta` of a checkpoint.

    Raises:
      ValueError: `path` holds no readable checkpoint of this format.
    """
    try:
        with _reader(path) as checkpointer:
            meta = checkpointer.restore(path, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    except Exception as error:
        raise ValueError(_unreadable(path, error)) from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise ValueError(
            f"{path} has checkpoint format {(meta or {}).get('format')!r}, this version reads {FORMAT}; "
            "use the rtd_jax version that wrote it"
        )
    return meta


def restore_state(path: Path, abstract: TrainState) -> TrainState:
    """The state of a checkpoint, laid out as `abstract` says (shapes, dtypes and shardings of this run's mesh).

    Raises:
      ValueError: the checkpoint is damaged, or holds arrays of other names or shapes.
    """
    try:
        with _reader(path) as checkpointer:
            state = checkpointer.restore(path, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))[
                "state"
            ]
    except Exception as error:
        raise ValueError(_unreadable(path, error)) from error
    jax.block_until_ready(state)
    return state


def restore_params(path: Path, abstract: Params, shardings: Params) -> Params:
    """Some of a checkpoint's params, such as {"student": .., "f": .., "g": ..}; the optimizer is not read.

    Args:
      abstract: shapes and dtypes, as jax.ShapeDtypeStruct.
      shardings: where each is to lie; a tree like `abstract`.

    Raises:
      ValueError: the checkpoint is damaged, or holds arrays of other names or shapes.
    """
    placed = jax.tree.map(lambda x, y: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=y), abstract, shardings)
    item = {"params": placed}
    restore = ocp.args.PyTreeRestore(
        item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
    )
    try:
        with _reader(path) as checkpointer:
            return checkpointer.restore(path, args=ocp.args.Composite(state=restore))["state"]["params"]
    except Exception as error:
        raise ValueError(_unreadable(path, error)) from error


def check_same_settings(path: Path, settings: dict[str, Any]) -> None:
    """Raises ValueError when the run of checkpoint `path` had other settings, naming the first that differs."""
    before, now = (_flat(x) for x in (read_meta(path)["settings"], settings))
    changed = sorted(
        key
        for key in before.keys() | now.keys()
        if not key.startswith(FREE_SETTINGS) and before.get(key) != now.get(key)
    )
    if changed:
        key = changed[0]
        raise ValueError(
            f"{path.parents[2]} holds a run with other settings: {key} was {before.get(key)!r}, is {now.get(key)!r}"
            + (f" (and {len(changed) - 1} more: {', '.join(changed[1:5])})" if len(changed) > 1 else "")
            + ". Use another --workdir, or the old settings, or start from one of its stages with "
            "--config.resume_from=<stage checkpoint>"
        )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts -> {"a.b": leaf}; tuples as lists, as JSON brings them back."""
    if isinstance(value, Mapping):
        return {
            k: v for name, item in value.items() for k, v in _flat(item, f"{prefix}.{name}" if prefix else name).items()
        }
    return {prefix: list(value) if isinstance(value, tuple | list) else value}


def _reader(path: Path) -> ocp.Checkpointer:
    if not (path / "state").is_dir() or not (path / "meta").is_dir():
        raise ValueError("no 'state' and 'meta' in it")
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler())


def _unreadable(path: Path, error: Exception) -> str:
    return (
        f"{path} is not a readable checkpoint: {_first_line(error)}. Give a folder such as "
        "runs/rtd_tiny/checkpoints/stages/2; if this one is damaged, delete it and run again: the one before it is used"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"
