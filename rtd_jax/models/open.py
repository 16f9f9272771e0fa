"""The one way to open a model: its files, what they say about it, and its weights when they are first used."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from jax.sharding import Mesh
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rtd_jax.base.files import read_object
from rtd_jax.base.hub import snapshot_commit
from rtd_jax.base.settings import check_filled
from rtd_jax.base.sharding import TABLES, activation_sharding, in_host_memory, param_shardings
from rtd_jax.base.types import Params
from rtd_jax.data.tokenizer_match import tokenizer_fingerprint, vocab_size
from rtd_jax.models.computation import AttentionKernel
from rtd_jax.models.config import DecoderConfig, special_ids
from rtd_jax.models.fingerprint import Fingerprint, weights_fingerprint
from rtd_jax.models.from_hf import load_config, load_params, resolve
from rtd_jax.models.model import DecoderModel
from rtd_jax.models.to_hf import TOKENIZER_FILES
from rtd_jax.models.weights import logical_axes

FloatDtype = Literal["float32", "bfloat16"]
WeightDtype = Literal["float32", "bfloat16", "int8"]


@dataclass(frozen=True)
class ModelSettings:
    """Which model is opened, how its weights are stored in memory, and how it is computed."""

    path: str  # Hugging Face folder or hub name
    param_dtype: WeightDtype = "bfloat16"  # of weights in memory; int8: a scale per channel
    compute_dtype: FloatDtype = "bfloat16"  # of matrix products and hidden states
    attention: AttentionKernel = "auto"  # kernel; auto: cuDNN's where it runs, else XLA's
    sharding: Literal["fsdp", "tensor"] = "fsdp"  # what travels between devices: "fsdp" weights, "tensor" activations
    offload: bool = False  # layers in host memory, each copied to the devices when it runs
    revision: str = ""  # of `path` on the hub: commit, tag or branch; "" is the newest. A local folder has none

    def __post_init__(self) -> None:
        check_filled(self, "path")

    @property
    def precision(self) -> str:
        """Both dtypes in words, for reports and identities: everything here that changes the model's outputs."""
        return f"{self.param_dtype} weights, {self.compute_dtype} arithmetic"


@dataclass(frozen=True, eq=False)
class OpenModel:
    """A model whose files are known. Its tokenizer, fingerprints and weights are read when they are first used."""

    settings: ModelSettings
    directory: Path  # of its files
    config: DecoderConfig
    mesh: Mesh  # devices that hold its weights
    note: Callable[[str], None]  # called with a line of text before the weights are read

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, whose ids all have a row in the embedding."""
        tokenizer = load_tokenizer(self.directory)
        check_rows_of_ids(self.config, vocab_size(tokenizer), self.directory, self.directory)
        return tokenizer

    @functools.cached_property
    def vocab_size(self) -> int:
        """The tokenizer's highest id + 1; rows of the embedding from here on are padding."""
        return vocab_size(self.tokenizer)

    @functools.cached_property
    def tokenizer_fingerprint(self) -> str:
        return tokenizer_fingerprint(self.tokenizer)

    @functools.cached_property
    def fingerprint(self) -> Fingerprint:
        """The fingerprint of the weights' files."""
        return weights_fingerprint(self.directory)

    @property
    def commit(self) -> str:
        """The hub's commit that was opened; "" for a local folder."""
        return snapshot_commit(self.directory)

    @functools.cached_property
    def model(self) -> DecoderModel:
        return make_model(self.settings, self.config, self.mesh)

    @functools.cached_property
    def params(self) -> Params:
        """The weights, sharded over the mesh."""
        self.note(f"loading the weights of {self.directory}")
        shardings = weight_shardings(self.settings, self.model, self.mesh)
        return load_params(self.directory, self.config, dtype=self.settings.param_dtype, shardings=shardings)

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are in memory."""
        return "params" in vars(self)  # where cached_property keeps a value


def open_model(
    settings: ModelSettings, mesh: Mesh, note: Callable[[str], None] = print, *, has_weights: bool = True
) -> OpenModel:
    """Opens the model at `settings.path`; only its config.json and generation_config.json are read at once.

    Args:
      has_weights: whether a hub model's weights are downloaded; without them only config and tokenizer can be used.

    Raises:
      ValueError: there is no such folder or hub model, or its config.json is missing or of a family that is not
        supported. Using a tokenizer or weights that cannot be read, or that do not belong to this config, raises one
        later.
    """
    directory = resolve(settings.path, settings.revision, has_weights=has_weights)
    config = load_config(directory)
    generation_ids(directory, config)  # checks them
    return OpenModel(settings, directory, config, mesh, note)


def check_rows_of_ids(config: DecoderConfig, size: int, model: Path | str, tokenizer: Path | str) -> None:
    """Raises ValueError where a model has fewer embedding rows than the `size` of a tokenizer's vocabulary."""
    if config.vocab_size < size:
        raise ValueError(
            f"the tokenizer in {tokenizer} has ids up to {size - 1}, which need an embedding of {size} rows, but that "
            f"of {model} has {config.vocab_size}; use the tokenizer that the model was trained with, or resize the "
            "embedding (transformers' resize_token_embeddings) and train it"
        )


def generation_ids(directory: Path, config: DecoderConfig) -> dict[str, Any]:
    """The ids of special tokens in a folder's generation_config.json, by their keys; {} where it names none.

    Raises:
      ValueError: the file names a token that the model does not have.
    """
    path = directory / "generation_config.json"
    if not path.exists():
        return {}
    content = read_object(path, "download it again, or remove it")
    try:
        ids = special_ids(content)
        replace(config, **ids)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return ids


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a Hugging Face folder, as its tokenizer.json has it. Code in the folder is never run.

    Raises:
      ValueError: there is no tokenizer, a file of it is missing or damaged, or it is a slow one, which gives no
        character offsets.
    """
    try:
        tokenizer = _as_written(AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False), directory)
    except Exception as error:
        for path in (directory / name for name in TOKENIZER_FILES if name.endswith(".json")):
            if path.exists():
                read_object(path, "download it again")  # the library's own error does not name the file
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        if _config_fails(directory):
            raise ValueError(
                f"{directory / 'config.json'}: transformers, which loads the tokenizer, cannot read it ({cause}); mend "
                "that value, or take config.json from the original checkpoint"
            ) from error
        raise ValueError(
            f"{directory} has no tokenizer that can be loaded ({cause}); put tokenizer.json and tokenizer_config.json "
            "beside the weights"
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(f"{directory} has a slow tokenizer without character offsets; add its tokenizer.json")
    if not (directory / "tokenizer_config.json").exists():
        raise ValueError(
            f"{directory} has no tokenizer_config.json, which names the tokens that begin and end a text and may hold "
            "the chat template; put the file of the original tokenizer beside tokenizer.json"
        )
    return tokenizer


def _as_written(tokenizer: PreTrainedTokenizerBase, directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of tokenizer.json, where transformers has made another one of it.

    transformers 5 builds some classes (GPT2Tokenizer, LlamaTokenizer, Qwen2Tokenizer) anew from the vocabulary and the
    merges alone, and splits text as the class does: the digits of SmolLM2's numbers would be read as other tokens than
    the model was trained on, without a word.
    """
    path = directory / "tokenizer.json"
    if not path.exists():
        return tokenizer
    if tokenizer.is_fast and _splitting(tokenizer.backend_tokenizer) == _splitting(Tokenizer.from_file(str(path))):
        return tokenizer
    written = PreTrainedTokenizerFast.from_pretrained(str(directory))
    for role in ("bos_token", "eos_token", "pad_token", "unk_token"):
        # What a class takes for its own where tokenizer_config.json names none.
        if getattr(written, role) is None and getattr(tokenizer, role) in written.get_vocab():
            setattr(written, role, getattr(tokenizer, role))
    return written


def _splitting(tokenizer: Tokenizer) -> dict[str, Any]:
    """How text becomes tokens, beside the vocabulary, and tokens text."""
    whole = json.loads(tokenizer.to_str())
    model = {key: value for key, value in whole["model"].items() if key not in ("vocab", "merges")}
    return {"model": model, **{part: whole.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")}}


def _config_fails(directory: Path) -> bool:
    """Whether transformers cannot read the folder's config.json, which it does before it loads a tokenizer."""
    if not (directory / "config.json").exists():
        return False
    try:
        AutoConfig.from_pretrained(str(directory), trust_remote_code=False)
    except Exception:
        return True
    return False


def make_model(settings: ModelSettings, config: DecoderConfig, mesh: Mesh) -> DecoderModel:
    """A frozen model of these sizes, without its weights. It needs no files, so a plan can ask for it too."""
    return DecoderModel(
        config,
        settings.compute_dtype,
        activation_sharding=activation_sharding(mesh, TABLES[settings.sharding]),
        attention=settings.attention,
        streamed=settings.offload,
    )


def weight_shardings(settings: ModelSettings, model: DecoderModel, mesh: Mesh) -> Params:
    """The sharding of each weight, and its memory space: a tree like the params."""
    abstract = model.abstract_params(settings.param_dtype)
    shardings = param_shardings(abstract, logical_axes(abstract), mesh, TABLES[settings.sharding])
    return shardings | {"layers": in_host_memory(shardings["layers"])} if settings.offload else shardings
