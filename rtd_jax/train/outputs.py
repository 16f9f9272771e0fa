"""What a run writes at its end, tried out at its start."""

import tempfile
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rtd_jax.models.to_hf import check_replaceable
from rtd_jax.train import metrics

FOLDERS = ("checkpoints", metrics.BOARD)


def check_outputs(workdir: Path, *models: str) -> None:
    """Raises ValueError where something in `workdir` is in the way of a run's folders, or of its folders `models`."""
    for path in sorted(workdir.iterdir()):
        if path.name in FOLDERS and not path.is_dir():
            raise ValueError(f"{path} is no folder, but the run needs one; remove it or choose another --workdir")
    for model in models:
        check_replaceable(workdir / model)


def check_saves(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError where a tokenizer cannot be saved, as a model's folder needs it."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:  # of whatever kind a tokenizer's own code raises
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path} cannot be saved ({type(error).__name__}: {error}), so neither "
                f"can the model that is trained with it; see that there is space in {folder}, and that save_pretrained "
                "works in transformers"
            ) from error
