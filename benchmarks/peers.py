"""Our plain KD and RTD steps against google-tunix and TRL: same weights, same tokens, same CPU, in turn.

pip install -e '.[bench]' && python benchmarks/peers.py  # 20 minutes on two cores; writes docs/benchmarks.md
"""

import argparse
import sys
import tempfile
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
# name: (vocabulary, rows, tokens of a row, updates)
SIZES = {"8,192 entries, 8 x 128 tokens": (8192, 8, 128, 23), "128,256 entries, 2 x 256 tokens": (128_256, 2, 256, 11)}


def write_checkpoints(folder: Path, vocab_size: int, rows: int, length: int, updates: int) -> None:
    """A teacher of 4 layers x 256 and a student of 2 x 128 with random weights, and random tokens for them."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1, "a": 2}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    for name, layers, width in (("teacher", 4, 256), ("student", 2, 128)):
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=width // 8,
            rope_theta=1_000_000.0,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
        )
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    tokens = np.random.default_rng(0).integers(2, vocab_size, (updates, rows, length))
    np.save(folder / "tokens.npy", tokens.astype(np.int32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="how often each system is run, in turn")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--no-write", action="store_true", help="print the table, leave docs/benchmarks.md as it is")
    arguments = parser.parse_args()
    rows = []
    for size, (vocab_size, batch, length, updates) in SIZES.items():
        with tempfile.TemporaryDirectory() as name:
            write_checkpoints(Path(name), vocab_size, batch, length, updates)
            commands = {
                system: [sys.executable, "benchmarks/peer_step.py", system, name, str(updates)]
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
    text = markdown_table(columns, rows) + f"\n\n{arguments.rounds} rounds in turn on {machine()}."
    print(text)
    if not arguments.no_write:
        write_section(ROOT / "docs" / "benchmarks.md", "peers", text)


if __name__ == "__main__":
    main()
