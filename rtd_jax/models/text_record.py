"""The form of text that a model was trained on, kept in its folder: `rtd_jax.json`, beside the weights.

A model that learned one form of a prompt answers far worse in another, so whoever asks it has to know. transformers
does not read the file.
"""

import dataclasses
from pathlib import Path

from rtd_jax.base.files import read_record, write_record
from rtd_jax.base.settings import build
from rtd_jax.data.formats import TextFormat

TEXT_FILE = "rtd_jax.json"
_FORMAT = 1
_WAY_OUT = "copy it again from where the model was written, or delete it and give --prompt_template"


@dataclasses.dataclass(frozen=True)
class _TextRecord:
    format: int
    text: TextFormat


def write_text_format(directory: Path, text: TextFormat) -> None:
    """Notes in a model's folder the form of text that it was trained on."""
    write_record(directory / TEXT_FILE, _FORMAT, {"text": dataclasses.asdict(text)})


def read_text_format(directory: Path) -> TextFormat | None:
    """The form of text that the model in a folder was trained on; None where the folder does not say.

    Raises:
      ValueError: the record is damaged or was changed.
    """
    path = directory / TEXT_FILE
    if not path.exists():
        return None
    return build(_TextRecord, read_record(path, _FORMAT, _WAY_OUT), str(path)).text
