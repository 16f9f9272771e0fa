"""What a real model loses at few bits: bytes, perplexity on GSM8K text, and whether transformers computes the same.

    python benchmarks/few_bits.py --data=/data/gsm8k/test.jsonl    # SmolLM2-135M-Instruct
    python benchmarks/few_bits.py --model=FOLDER --data=... --limit=64 --schemes=int4,w4a16_gptq

For every scheme the model is written as launch/compress.py writes it. Then: the bytes of its weights; the perplexity of
questions with their solutions, by rtd_jax on the folder as it is read back; and on the first text the largest
difference of a logit between rtd_jax and transformers, which decompresses the folder by compressed-tensors or
bitsandbytes, both in float32. GPTQ reads texts that are not measured. Writes a section of docs/compression.md.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from measure import ROOT, markdown_table, write_section

from rtd_jax.apps.compress.methods import USUAL_GROUPS, parse_method
from rtd_jax.data.sources import SourceSettings, load_traces
from rtd_jax.data.tokenizer_match import vocab_size
from rtd_jax.eval.scoring import ScoringSettings, score_chains
from rtd_jax.models.gptq import gptq
from rtd_jax.models.open import load_tokenizer
from rtd_jax.models.quantized_folders import save_quantized
from rtd_jax.models.schemes import rounded
from rtd_jax.models.to_hf import save_pretrained
from rtd_jax.models.weight_files import weight_files
from rtd_jax.train.saved_models import LoadedModel, load_model

SCHEMES = ("int8", "fp8", "int4", "w4a16_gptq", "nf4", "int3", "w3a16_gptq", "int2", "w2a16_gptq")
GROUP = 64  # divides the 576 and 1,536 inputs of SmolLM2's matrices
CALIBRATION = 32  # texts
ROW = 256  # tokens of a row of calibration text


def texts_of(path: Path, limit: int) -> tuple[list[str], list[str]]:
    """(texts to measure, texts to calibrate on): questions with their solutions, as GSM8K has them."""
    traces = load_traces(SourceSettings("gsm8k", str(path), keep_marks=False, limit=limit + CALIBRATION))
    texts = [f"{trace.prompt}\n{trace.completion}" for trace in traces]
    return texts[:limit], texts[limit:]


def perplexity(loaded: LoadedModel, texts: list[str]) -> float:
    """exp of the mean cross-entropy of all tokens but each text's first."""
    ids = loaded.tokenizer(texts)["input_ids"]
    scores = score_chains(
        loaded.model, loaded.params, ids, ScoringSettings(batch_size=4), vocab_size=vocab_size(loaded.tokenizer)
    )
    return float(np.exp(-np.concatenate([score.log_probs[1:] for score in scores]).mean(dtype=np.float64)))


def rows_of(ids: list[list[int]]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Calibration text in rows of one length, eight at a time."""
    tokens_BL = np.zeros((len(ids), ROW), np.int32)
    chains_BL = np.zeros_like(tokens_BL)
    for row, text in enumerate(ids):
        tokens_BL[row, : len(text[:ROW])], chains_BL[row, : len(text[:ROW])] = text[:ROW], 1
    positions_BL = np.broadcast_to(np.arange(ROW, dtype=np.int32), (8, ROW))
    return [(tokens_BL[i : i + 8], positions_BL, chains_BL[i : i + 8]) for i in range(0, len(ids) // 8 * 8, 8)]


def difference(folder: Path, loaded: LoadedModel, text: str) -> tuple[float, bool]:
    """(largest difference of a logit to transformers', whether the same tokens are most probable), in float32."""
    import torch
    import transformers

    ids_BL = np.array([loaded.tokenizer(text)["input_ids"]], np.int32)
    positions_BL = np.arange(ids_BL.shape[1], dtype=np.int32)[None]
    model = loaded.model
    logits = jax.jit(lambda params: model.logits(params, model.hidden(params, ids_BL, positions_BL, None)))
    ours = np.asarray(logits(loaded.params))
    other = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for module in other.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes would multiply in bfloat16
            module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        theirs = other(torch.tensor(ids_BL.astype(np.int64))).logits.numpy()[..., : ours.shape[-1]]
    return float(np.abs(ours - theirs).max()), bool((ours.argmax(-1) == theirs.argmax(-1)).all())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="Hugging Face folder; SmolLM2-135M-Instruct by default")
    parser.add_argument("--data", required=True, help="GSM8K's test.jsonl")
    parser.add_argument("--limit", type=int, default=64, help="texts whose perplexity is measured")
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--group_size", type=int, default=GROUP)
    args = parser.parse_args()
    if args.model:
        source = Path(args.model)
    else:
        sys.path.append(str(ROOT / "tests"))
        from real_weights import real_weights_dir

        source = real_weights_dir()
    texts, calibration = texts_of(Path(args.data), args.limit)
    before = load_model(str(source))
    tokenizer, config = load_tokenizer(source), before.model.config
    batches = rows_of(before.tokenizer(calibration)["input_ids"])
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("float32", *args.schemes.split(",")):
            started, folder = time.monotonic(), Path(scratch) / name
            if name == "float32":
                save_pretrained(folder, config, before.params, tokenizer=tokenizer)
            else:
                method = parse_method(name, USUAL_GROUPS.get(name, args.group_size))
                assert method.scheme is not None, name
                if method.is_gptq:
                    params = gptq(before.model, before.params, batches, method.scheme)
                else:
                    params = jax.jit(rounded, static_argnums=1)(before.params, method.scheme)
                save_quantized(folder, config, params, method.scheme, tokenizer=tokenizer)
            seconds = time.monotonic() - started
            loaded = before if name == "float32" else load_model(str(folder))
            size = sum(path.stat().st_size for path in weight_files(folder).values())
            apart, is_same = difference(folder, loaded, texts[0])
            cells = (
                f"{size / 2**20:.1f}",
                f"{perplexity(loaded, texts):.3f}",
                f"{apart:.1e}",
                "yes" if is_same else "no",
            )
            rows.append((name, *cells, f"{seconds:.0f}"))
            print(*rows[-1], sep="  ", flush=True)
    head = ("scheme", "MiB", "perplexity", "max logit difference", "same tokens", "seconds")
    text = (
        f"`python benchmarks/few_bits.py`: {source.name}, groups of {args.group_size} inputs (nf4 64, fp8 a whole "
        f"channel), embedding and head as floats; {len(texts)} texts of GSM8K, {len(batches) * 8} others for GPTQ."
    )
    write_section(ROOT / "docs" / "compression.md", "real model", f"{text}\n\n{markdown_table(head, rows)}")


if __name__ == "__main__":
    main()
