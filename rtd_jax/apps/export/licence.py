"""On what terms a model may be used, as its own folder says: model card, licence files, config.json."""

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rtd_jax.base.files import read_object, reading
from rtd_jax.models.from_hf import LICENCE_FILES, MODEL_CARD

OTHER = "other"  # the hub's id for what is none of its list
_TEXT = ("", ".txt", ".md", ".rst", ".html", ".pdf")  # suffixes of a licence's files


@dataclass(frozen=True)
class Licence:
    """A licence as a model card names it, and the files that lie beside the model."""

    id: str = ""  # the hub's: "apache-2.0", "llama3.1", "other"; "" where nothing says it
    name: str = ""  # of "other"
    link: str = ""  # of "other": a file of the model's folder, or an address
    said_in: str = ""  # file that says it
    files: tuple[Path, ...] = ()

    def __str__(self) -> str:
        return self.name if self.id == OTHER and self.name else self.id


def find_licence(folder: Path) -> Licence:
    """The licence of the model in a folder: as its card says, else by its licence file, else as config.json says.

    Raises:
      ValueError: a file of it cannot be read.
    """
    with reading(folder):
        files = tuple(
            path
            for path in sorted(folder.iterdir())
            if path.is_file() and path.suffix.lower() in _TEXT and _is_licence(path.name)
        )
    card = _front_matter(folder / MODEL_CARD)
    if known := _text(card.get("license")):
        name, link = _text(card.get("license_name")), _text(card.get("license_link"))
        return Licence(known, name, link, MODEL_CARD, files)
    texts = [path for path in files if path.name.upper().startswith(("LICEN", "COPYING")) and path.suffix != ".pdf"]
    if texts:
        with reading(texts[0]):
            content = texts[0].read_text(encoding="utf-8", errors="replace")
        first = next((line.strip(" #*\t") for line in content.splitlines() if line.strip(" #*\t=-")), texts[0].name)
        if first == "Apache License" and "Version 2.0" in content:
            return Licence("apache-2.0", said_in=texts[0].name, files=files)
        return Licence(OTHER, slug(first), texts[0].name, texts[0].name, files)
    config = folder / "config.json"
    known = _text(read_object(config, "").get("license")) if config.exists() else ""
    return Licence(known, said_in=config.name if known else "", files=files)


def combined(licences: Sequence[Licence]) -> Licence:
    """The licence of a model that was made from several: theirs if all have one, else "other", with all their names.

    Where one of them is not known, neither is that of the whole.
    """
    first = licences[0]
    if all((x.id, x.name) == (first.id, first.name) for x in licences):
        return first if first.id else Licence(OTHER)
    if not all(x.id for x in licences):
        return Licence(OTHER)
    return Licence(OTHER, "-and-".join(dict.fromkeys(slug(str(x)) for x in licences)))


def slug(text: str) -> str:
    """A licence's name as the hub takes it: "llama-3.2-community-license-agreement"."""
    return re.sub("[^a-z0-9.]+", "-", text.lower()).strip("-")[:80] or "unnamed"


def _is_licence(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in LICENCE_FILES)


def _front_matter(path: Path) -> dict[str, object]:
    """The YAML at the head of a model card; {} where there is no card, or none in it."""
    if not path.exists():
        return {}
    from huggingface_hub import metadata_load  # slow to import

    with reading(path):
        try:
            return metadata_load(path) or {}
        except OSError:
            raise
        except Exception as error:  # of the YAML library
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{path}: its front matter, which would name the model's licence, is not valid YAML ({reason}); mend "
                "or remove it"
            ) from error


def _text(value: object) -> str:
    return " and ".join(map(str, value)) if isinstance(value, list) else str(value or "").strip()
