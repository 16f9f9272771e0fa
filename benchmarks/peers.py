"""Our plain KD and RTD steps against google-tunix and TRL: same weights, same tokens, same machine, in turn.

pip install -e '.[bench]' && python benchmarks/peers.py  # 20 minutes on two cores; writes docs/benchmarks.md
python benchmarks/peers.py --gpu --rounds=1  # larger models in bfloat16 on one NVIDIA GPU of 80 GB
"""

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from measure import ROOT, alternate, machine, markdown_table, median, spread, write_section

SYSTEMS = ("ours_kd", "ours_rtd", "tunix", "trl")
NAMES = {
    "ours_kd": "rtd_jax, plain KD",
    "ours_rtd": "rtd_jax, RTD",
    "tunix": "google-tunix, logit strategy",
    "trl": "TRL GKDTrainer",
}


@dataclass(frozen=True)
class Size:
    """Models of `layers` x `width` (an MLP of four times that), and the tokens they see."""

    vocab_size: int
    rows: int
    length: int
    updates: int
    teacher: tuple[int, int] = (4, 256)
    student: tuple[int, int] = (2, 128)
    heads: int = 8  # of both, half as many for keys and values

    def __str__(self) -> str:
        return f"{self.vocab_size:,} entries, {self.rows} x {self.length:,} tokens"


SIZES = (Size(8192, 8, 128, 23), Size(128_256, 2, 256, 11))
GPU_SIZES = (Size(128_256, 8, 1024, 13, teacher=(16, 2048), student=(8, 1024), heads=16),)


def write_checkpoints(folder: Path, size: Size, dtype: str) -> None:
    """A teacher and a student with random weights, and random tokens for them."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1, "a": 2}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    for name, (layers, width) in (("teacher", size.teacher), ("student", size.student)):
        config = LlamaConfig(
            vocab_size=size.vocab_size,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads // 2,
            head_dim=width // size.heads,
            rope_theta=1_000_000.0,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
        )
        LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    tokens = np.random.default_rng(0).integers(2, size.vocab_size, (size.updates, size.rows, size.length))
    np.save(folder / "tokens.npy", tokens.astype(np.int32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="how often each system is run, in turn")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--gpu", action="store_true", help="models of a GPU's size, on it, in bfloat16")
    parser.add_argument("--no-write", action="store_true", help="print the table, leave docs/benchmarks.md as it is")
    arguments = parser.parse_args()
    dtype = "bfloat16" if arguments.gpu else "float32"
    rows = []
    for size in GPU_SIZES if arguments.gpu else SIZES:
        with tempfile.TemporaryDirectory() as name:
            write_checkpoints(Path(name), size, dtype)
            commands = {
                system: [sys.executable, "benchmarks/peer_step.py", system, name, str(size.updates), dtype]
                for system in arguments.systems
            }
            found = alternate(commands, arguments.rounds)
        ours = found.get("ours_kd")
        for system, results in found.items():
            ratios = ["-", "-"]
            if ours:
                ratios = [f"{median(ours, key) / median(results, key):.2f}" for key in ("tokens_per_sec", "peak_gb")]
            speed, memory = spread(results, "tokens_per_sec"), f"{median(results, 'peak_gb'):.2f}"
            rows.append((f"{size}: {NAMES[system]}", speed, memory, *ratios))
    columns = ["", "tokens/s: median (range)", "peak memory, GB", "our KD's speed / its", "our KD's memory / its"]
    text = markdown_table(columns, rows) + f"\n\n{arguments.rounds} round(s) in turn on {machine(arguments.gpu)}."
    print(text)
    if not arguments.no_write:
        write_section(ROOT / "docs" / "benchmarks.md", "peers_gpu" if arguments.gpu else "peers", text)


if __name__ == "__main__":
    main()
