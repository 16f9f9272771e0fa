"""Our updates against those of google-tunix and TRL: same weights, same tokens or prompts, same machine, in turn.

pip install -e '.[bench]' && python benchmarks/peers.py  # 20 minutes on two cores; writes docs/benchmarks.md
python benchmarks/peers.py --on_policy  # on what the student writes; 20 minutes; google-tunix is not needed for it
python benchmarks/peers.py --gpu --rounds=1  # larger models in bfloat16 on one NVIDIA GPU of 80 GB
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from measure import ROOT, Result, alternate, machine, markdown_table, median, spread, write_section

OFF_POLICY = {
    "ours_kd": "rtd_jax, plain KD",
    "ours_rtd": "rtd_jax, RTD",
    "tunix": "google-tunix, logit strategy",
    "trl": "TRL GKDTrainer",
}
ON_POLICY = {
    "ours_on_policy": "rtd_jax, on_policy.fraction 1",
    "trl_on_policy": "TRL GKDTrainer, lmbda 1",
    "trl_distillation": "TRL DistillationTrainer",
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
    new_tokens: int = 0  # at the end of each row, which the student writes itself

    def __str__(self) -> str:
        length = f"({self.length - self.new_tokens} + {self.new_tokens})" if self.new_tokens else f"{self.length:,}"
        return f"{self.vocab_size:,} entries, {self.rows} x {length} tokens"


SIZES = (Size(8192, 8, 128, 23), Size(128_256, 2, 256, 11))
ON_POLICY_SIZES = (Size(8192, 8, 128, 23, new_tokens=64), Size(128_256, 2, 128, 11, new_tokens=64))
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


def compare(size: Size, systems: Sequence[str], rounds: int, dtype: str) -> dict[str, list[Result]]:
    """What the workers of each system reported, on the same checkpoints and tokens."""
    script, last = ("peer_on_policy.py", size.new_tokens) if size.new_tokens else ("peer_step.py", dtype)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoints(Path(folder), size, dtype)
        commands = {
            system: [sys.executable, f"benchmarks/{script}", system, folder, str(size.updates), str(last)]
            for system in systems
        }
        return alternate(commands, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="how often each system is run, in turn")
    parser.add_argument("--systems", nargs="+", choices=(*OFF_POLICY, *ON_POLICY), help="by default all of a kind")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--on_policy", action="store_true", help="updates on what the student writes, drawing included")
    kind.add_argument("--gpu", action="store_true", help="models of a GPU's size, on it, in bfloat16")
    parser.add_argument("--no-write", action="store_true", help="print the table, leave docs/benchmarks.md as it is")
    arguments = parser.parse_args()
    names = ON_POLICY if arguments.on_policy else OFF_POLICY
    systems = [system for system in names if system in (arguments.systems or names)]
    if not systems:
        parser.error(f"--systems has none of {', '.join(names)}")
    sizes = ON_POLICY_SIZES if arguments.on_policy else GPU_SIZES if arguments.gpu else SIZES
    rows = []
    for size in sizes:
        found = compare(size, systems, arguments.rounds, "bfloat16" if arguments.gpu else "float32")
        ours = found.get("ours_on_policy" if arguments.on_policy else "ours_kd")
        for system, results in found.items():
            ratios = ["-", "-"]
            if ours:
                ratios = [f"{median(ours, key) / median(results, key):.2f}" for key in ("tokens_per_sec", "peak_gb")]
            cells = [spread(results, "tokens_per_sec"), f"{median(results, 'peak_gb'):.2f}", *ratios]
            if arguments.on_policy:
                means = (f"{1e3 * median(results, key):.2f}" for key in ("first_loss", "last_loss"))
                cells += [f"{100 * median(results, 'drawing_share'):.0f}%", " to ".join(means)]
            rows.append((f"{size}: {names[system]}", *cells))
    more = ("our KD's speed / its", "our KD's memory / its")
    if arguments.on_policy:
        losses = "divergence, 1e-3 nats: first and last 3 updates"
        more = ("our speed / its", "our memory / its", "share of drawing", losses)
    columns = ("", "tokens/s: median (range)", "peak memory, GB", *more)
    text = markdown_table(columns, rows) + f"\n\n{arguments.rounds} round(s) in turn on {machine(arguments.gpu)}."
    print(text)
    section = "peers_on_policy" if arguments.on_policy else "peers_gpu" if arguments.gpu else "peers"
    if not arguments.no_write:
        write_section(ROOT / "docs" / "benchmarks.md", section, text)


if __name__ == "__main__":
    main()
