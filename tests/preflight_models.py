"""A teacher and a pretrained student on disk that fit together, a recipe of theirs, and ways to damage a copy."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
from llama3_like import llama3_like
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rtd_jax.data.formats import TextFormat
from rtd_jax.data.sources import SourceSettings
from rtd_jax.models.config import DecoderConfig
from rtd_jax.models.model import DecoderModel
from rtd_jax.models.to_hf import save_pretrained
from rtd_jax.train.curriculum import CurriculumSettings
from rtd_jax.train.recipe import DataSettings, Recipe, StudentSettings, TeacherSettings

CHAT = TextFormat("chat")


def write_pair(folder: Path) -> Path:
    """<folder>/teacher and <folder>/student, of one tokenizer and one text, random; and chains in train.jsonl, ..."""
    tokenizer = llama3_like()
    rows = 8 * -(-len(tokenizer) // 8) + 8  # some are padding
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    for name, layers in (("teacher", 2), ("student", 1)):
        config = DecoderConfig(rows, 8, 8, layers=layers, heads=1, kv_heads=1, head_dim=8, **ids)
        save_pretrained(
            folder / name, config, DecoderModel(config).init(jax.random.key(layers)), tokenizer=tokenizer, text=CHAT
        )
    for split in ("train", "validation", "test"):
        write_rows(folder, split, [row(number, 1 + number % 2) for number in range(8)])
    return folder


def row(number: int, depth: int, text: str = "apples") -> dict:
    steps = [f"{number} + {step} = {number + step} {text}." for step in range(depth)]
    return {"prompt": f"How many {text} are {number}?", "completions": steps, "answer": str(number)}


def write_rows(folder: Path, split: str, rows: list[dict]) -> None:
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))


def copy_of(pair: Path, folder: Path) -> Path:
    return Path(shutil.copytree(pair, folder / "pair"))


def recipe_of(pair: Path, text: TextFormat = CHAT, depths: tuple[int, ...] = (1, 2), **data) -> Recipe:
    sources = {split: SourceSettings("stepwise", str(pair), split) for split in ("train", "validation", "test")}
    return Recipe(
        TeacherSettings(str(pair / "teacher"), "float32", "float32"),
        StudentSettings("pretrained", str(pair / "student"), compute_dtype="float32"),
        DataSettings(**sources, text=text, **({"row_length": 128} | data)),
        batch_size=16,
        total_updates=10,
        curriculum=CurriculumSettings(depths=depths),
    )


def from_teacher(recipe: Recipe) -> Recipe:
    """The recipe with a student that takes the teacher's layers, and so has no folder of its own."""
    return dataclasses.replace(recipe, student=StudentSettings("teacher_layers", layers=1, compute_dtype="float32"))


def set_json(path: Path, **changes) -> None:
    """Changes keys of a JSON file, which need not exist; None leaves a key out."""
    content = json.loads(path.read_text()) if path.exists() else {}
    content |= changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def set_tensor(folder: Path, name: str, array: np.ndarray | None) -> None:
    """Writes a tensor of a model's file, or takes it out."""
    path = folder / "model.safetensors"
    tensors = load_file(path) | ({} if array is None else {name: array})
    if array is None:
        del tensors[name]
    save_file(tensors, path)


def with_tokenizer(folder: Path, change) -> None:
    """Applies `change` to the tokenizer in a folder."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    change(tokenizer)
    tokenizer.save_pretrained(folder)
