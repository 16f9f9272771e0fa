"""From a finished run to a folder to share: the student, a model card, and the licence of its teacher.

The folder is written whether or not it is uploaded, and what is uploaded is that folder.
"""

import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from rtd_jax.apps.export.card import Parent, Subject, is_generated, licence_warnings, make_card
from rtd_jax.apps.export.licence import Licence, find_licence
from rtd_jax.apps.export.push import check_name, push
from rtd_jax.base.files import read_jsonl, read_object, read_record, replacing_folder, write_record
from rtd_jax.base.hub import snapshot_commit
from rtd_jax.base.lock import owner
from rtd_jax.base.settings import SettingError, build, check_filled
from rtd_jax.models.from_hf import MODEL_CARD, load_config, resolve
from rtd_jax.models.quantized_folders import quantization_of
from rtd_jax.models.text_record import read_text_format
from rtd_jax.models.to_hf import INDEX_FILE, TOKENIZER_FILES
from rtd_jax.models.weight_files import weight_files
from rtd_jax.train.recipe import Recipe, StudentSettings, TeacherSettings
from rtd_jax.train.student import FLOAT_FOLDER, FOLDER, student_folders

RECORD = "rtd_jax_export.json"  # lists what an export wrote
_FORMAT = 1
_EXAMPLE = "Ann has 3 boxes with 4 pens in each. She gives 5 pens away. How many pens has she left?"


@dataclasses.dataclass(frozen=True)
class ExportSettings:
    """Which student is exported, and where to."""

    run: str  # folder of a finished run of launch/train.py
    student: Literal["student", "student_float"] = "student"  # its folder; student_float: of a rounded student, floats
    out: str = ""  # folder that is written; "" is <run>/export
    push_to_hub: str = ""  # ORG/NAME of a repository that gets the folder; "" uploads nothing
    private: bool = False  # of a new repository
    license: str = ""  # the hub's id of the teacher's licence, where nothing in its folder says it

    def __post_init__(self) -> None:
        check_filled(self, "run")
        if self.push_to_hub and (self.push_to_hub.count("/") != 1 or not all(self.push_to_hub.split("/"))):
            raise SettingError(f"push_to_hub is {self.push_to_hub!r}; expected ORG/NAME, or your own USER/NAME")
        if self.private and not self.push_to_hub:
            raise SettingError("private is True, but push_to_hub is empty, so nothing is uploaded; set both or neither")

    @property
    def folder(self) -> Path:
        return Path(self.out).expanduser() if self.out else Path(self.run).expanduser() / "export"


def export(settings: ExportSettings, note: Callable[[str], None] = print) -> Path:
    """Writes the folder, and uploads it where that is asked for. Returns the folder.

    Raises:
      ValueError: no finished run, a folder in the way, or an upload that fails, with the place and the way out. In the
        last case the folder is there.
    """
    run, out = Path(settings.run).expanduser(), settings.folder
    if settings.push_to_hub:
        check_name(settings.push_to_hub)
    recipe, report = _finished(run)
    student = run / settings.student
    _check_student(student, recipe)
    _check_replaceable(out, student)
    parents = _parents(recipe, report, settings.license, note)
    name = out.resolve().name  # and not its path, which says nothing to others
    subject = Subject(
        name=settings.push_to_hub.partition("/")[2] or name,
        address=settings.push_to_hub or name,
        recipe=recipe,
        report=report,
        config=load_config(student),
        text=read_text_format(student) or recipe.data.text,
        scheme=quantization_of(student),
        is_evaluated=settings.student == FOLDER,
        parents=parents,
        problem=_example(run, recipe),
    )
    try:
        _write(out, student, make_card(subject), parents)
    except OSError as error:
        raise OSError(
            f"{out}: could not be written ({error}); what was there before is unchanged. Free space, or give another "
            "folder with --out"
        ) from error
    for warning in licence_warnings(parents, subject.licence):
        note(f"warning: {warning}")
    note(f"licence: {subject.licence}. The model card is {out / MODEL_CARD}: read it before you share the model")
    if settings.push_to_hub:
        note(f"uploaded: {push(out, settings.push_to_hub, RECORD, private=settings.private, note=note)}")
    else:
        note(f"exported: {out}. To share it: the same command with --push_to_hub=ORG/NAME")
    return out


def _finished(run: Path) -> tuple[Recipe, dict[str, Any]]:
    """The recipe and the report of a finished run.

    Raises:
      ValueError: the folder is none of a distillation, or the run is not finished, or still at work.
    """
    settings, report = run / "settings.json", run / "report.json"
    if not settings.exists():
        raise ValueError(
            f"{run} is no folder of a run of launch/train.py: there is no settings.json in it; give the --workdir of "
            "one (of an ensemble, <workdir>/seed_<seed>)"
        )
    if at_work := owner(run):
        raise ValueError(f"{run} is being written by {at_work}; export it when that has ended")
    if not report.exists():
        raise ValueError(
            f"{run} is not finished: there is no report.json in it; start its command again, which goes on"
        )
    content = read_object(report, "start the run's command again, which evaluates it anew")
    try:
        recipe = build(Recipe, content.get("settings") or read_object(settings), "settings")
        _ = (content["student"]["chain_accuracy"].items(), int(content["updates"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{report} is not what launch/train.py writes of a distillation ({said}); give such a run"
        ) from error
    return recipe, content


def _check_student(student: Path, recipe: Recipe) -> None:
    """Raises ValueError where a run has no such student, or its folder is not whole."""
    if student.name not in student_folders(recipe.student):
        raise ValueError(
            f"student is {FLOAT_FOLDER!r}, but {student.parent} trained its student without rounding, so {FOLDER} has "
            "the floats; leave --student out"
        )
    if not student.is_dir():
        raise ValueError(f"{student}: no such folder; start the run's command again, which writes it")
    missing = [path for path in (*weight_files(student).values(), student / "tokenizer.json") if not path.is_file()]
    if missing:
        raise ValueError(f"{missing[0]}: no such file; start the run's command again, which writes it")


def _check_replaceable(out: Path, student: Path) -> None:
    """Raises ValueError where an export would take the place of anything but an earlier one, as it was written."""
    if student.resolve() in (out.resolve(), *out.resolve().parents):
        raise ValueError(f"--out is {out}, in the student that is exported; give a folder beside it")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out is {out}, a file; give a folder")
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    if not names:
        return
    if RECORD not in names:
        raise ValueError(
            f"--out is {out}, which holds {min(names)} and no {RECORD}, so it is no earlier export; give an empty or "
            "new folder"
        )
    way_out = f"give another --out, or remove {out}"
    record = read_record(out / RECORD, _FORMAT, way_out)
    if others := names - {RECORD, *record["files"]}:
        raise ValueError(f"{out} holds {min(others)}, which no export wrote, and would be replaced; {way_out}")
    card = out / MODEL_CARD
    if card.exists() and _digest(card.read_bytes()) != record["card"]:
        raise ValueError(f"{card} was changed after it was exported, and would be replaced; {way_out}")


def _parents(recipe: Recipe, report: Mapping[str, Any], given: str, note: Callable[[str], None]) -> tuple[Parent, ...]:
    """The teacher, and the model that the student began as where that is another one."""
    models: dict[str, TeacherSettings | StudentSettings] = {"teacher": recipe.teacher}
    start = recipe.student
    if start.init == "pretrained" and (start.path, start.revision) != (recipe.teacher.path, recipe.teacher.revision):
        models["model that it began as"] = start
    parents = []
    for role, settings in models.items():
        origin = report.get("origins", {}).get("teacher" if role == "teacher" else "student", {})
        commit = origin.get("commit", "")  # runs of earlier versions did not record it
        folder = _folder(settings.path, settings.revision, origin, note)
        is_local = origin.get("is_local", folder is None or not snapshot_commit(folder))
        licence = Licence() if folder is None else find_licence(folder)
        parent = Parent(role, settings.path, is_local, settings.revision, commit, licence)
        parents.append(dataclasses.replace(parent, licence=_reachable(parent)))
    unknown = [i for i, parent in enumerate(parents) if not parent.licence.id]
    if given and not unknown:
        licence = parents[0].licence
        raise ValueError(
            f"license is {given!r}, but the {licence.said_in} of the teacher {recipe.teacher.path} says {licence}; "
            "leave --license out"
        )
    for i in unknown if given else ():
        parents[i] = dataclasses.replace(parents[i], licence=dataclasses.replace(parents[i].licence, id=given))
    return tuple(parents)


def _folder(path: str, revision: str, origin: Mapping[str, Any], note: Callable[[str], None]) -> Path | None:
    """The folder of a model, without its weights, as it was when the run read it; None where it cannot be had."""
    try:
        if origin.get("is_local") and not Path(path).expanduser().is_dir():
            raise ValueError(f"{path}: no such directory any more")
        if commit := origin.get("commit"):
            return resolve(path.partition("@")[0], commit, has_weights=False)
        return resolve(path, revision, has_weights=False)
    except ValueError as error:
        note(f"warning: no licence could be read: {error}")
        return None


def _reachable(parent: Parent) -> Licence:
    """A model's licence whose link leads somewhere from another folder too."""
    licence = parent.licence
    if not licence.link or "://" in licence.link or licence.link in {path.name for path in licence.files}:
        return licence
    at = f"https://huggingface.co/{parent.hub_name}/blob/{parent.commit or 'main'}/{licence.link}"
    return dataclasses.replace(licence, link=at if parent.hub_name else "")


def _example(run: Path, recipe: Recipe) -> str:
    """A problem for the card: one of the run's own where they are generated, since others may not be ours to show."""
    if is_generated(recipe.data.test) and (run / "generations.jsonl").exists():
        for _, row in read_jsonl(run / "generations.jsonl"):
            if isinstance(row.get("prompt"), str):
                return row["prompt"]
    return _EXAMPLE


def _write(out: Path, student: Path, card: str, parents: tuple[Parent, ...]) -> None:
    """Writes the folder: complete, or not at all."""
    names = ["config.json", INDEX_FILE, *TOKENIZER_FILES, *weight_files(student)]
    copied = {name: student / name for name in names if (student / name).is_file()}
    for parent in parents:
        for path in parent.licence.files:
            # The second model's own files, where they are others.
            is_taken = path.name in copied and copied[path.name].read_bytes() != path.read_bytes()
            copied[f"START_{path.name}" if is_taken else path.name] = path
    with replacing_folder(out.absolute()) as partial:
        for name, path in copied.items():
            shutil.copyfile(path, partial / name)
        (partial / MODEL_CARD).write_text(card, encoding="utf-8")
        digest = _digest((partial / MODEL_CARD).read_bytes())
        write_record(partial / RECORD, _FORMAT, {"files": sorted([*copied, MODEL_CARD]), "card": digest})


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
