"""Greedy decoding against transformers.generate: same model, prompts, number of tokens and cores, in turn.

python benchmarks/decoding.py --model=DIR --gsm8k=FOLDER  # 15 minutes on two quiet cores; writes docs/benchmarks.md

Two processes stay loaded, one a system, and take turns. FOLDER holds GSM8K's test.jsonl; without it prompts are random
ids of GSM8K's lengths. Neither system may end a row early, so both make batch x tokens ids. What is compiled or warmed
up is the first call of each size: it is reported, not timed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from measure import DISTURBED, MARK, ROOT, busy_seconds, machine, markdown_table, report, write_section

SYSTEMS = {"ours": "rtd_jax", "theirs": "transformers"}
Generate = Callable[[list[list[int]], int], list[list[int]]]


def ours(model: Path) -> Generate:
    """rtd_jax, float32."""
    from rtd_jax.eval.decoding import GenerateSettings, generate
    from rtd_jax.models.from_hf import load_config, load_params
    from rtd_jax.models.model import LlamaModel

    config = load_config(model)
    llama, params = LlamaModel(config), load_params(model, config)

    def run(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        return generate(llama, params, prompts, GenerateSettings(tokens, (), config.vocab_size, len(prompts)))

    return run


def theirs(model: Path) -> Generate:
    """transformers on PyTorch, float32, with its own defaults: SDPA attention and a growing cache."""
    import torch
    from transformers import LlamaForCausalLM

    llama = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    llama.generation_config.eos_token_id = None

    def run(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        longest = max(map(len, prompts))
        ids, mask = (
            torch.tensor([[0] * (longest - len(p)) + row for p, row in zip(prompts, rows, strict=True)])
            for rows in (prompts, [[1] * len(p) for p in prompts])
        )
        with torch.inference_mode():
            written = llama.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        return written[:, longest:].tolist()

    return run


def work(system: str, model: Path, cores: int) -> None:
    """Serves one request a line, {"prompts", "tokens"}, with the ids, seconds, and seconds of all cores together."""
    if cores:  # both systems take as many threads as the process may have cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    run = {"ours": ours, "theirs": theirs}[system](model)
    report(ready=True)
    for line in sys.stdin:
        request = json.loads(line)
        started, used = time.perf_counter(), time.process_time()
        ids = run(request["prompts"], request["tokens"])
        report(seconds=time.perf_counter() - started, cpu=time.process_time() - used, ids=ids)


class Worker:
    """One system in a process of its own."""

    def __init__(self, system: str, model: Path, cores: int) -> None:
        command = [sys.executable, __file__, f"--work={system}", f"--model={model}", f"--cores={cores}"]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._answer()

    def run(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        """Its answer, with `others`: how many cores all other processes kept busy meanwhile."""
        busy, started = busy_seconds(), time.monotonic()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "tokens": tokens}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        elapsed = time.monotonic() - started
        return answer | {"others": max(0.0, busy_seconds() - busy - answer["cpu"]) / elapsed}

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                return json.loads(line[len(MARK) :])
        raise RuntimeError(f"a worker ended with status {self._process.wait()}; what it printed stands above")


def make_prompts(model: Path, gsm8k: Path | None, count: int, vocab_size: int) -> list[list[int]]:
    """Token ids of GSM8K's first questions as lm-evaluation-harness asks them; or random ids of such lengths."""
    if gsm8k is None:
        rng = np.random.default_rng(0)
        return [rng.integers(3, vocab_size, rng.integers(30, 120)).tolist() for _ in range(count)]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    lines = (gsm8k / "test.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    return [tokenizer(f"Question: {json.loads(line)['question']}\nAnswer:")["input_ids"] for line in lines]


def agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> tuple[int, float]:
    """(rows that are equal throughout, share of all ids that stand before a row's first difference)."""
    alike = []
    for mine, other in zip(ours, theirs, strict=True):
        different = [i for i, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b]
        alike.append(different[0] if different else len(mine))
    return sum(n == len(row) for n, row in zip(alike, ours, strict=True)), sum(alike) / sum(map(len, ours))


def compare(
    workers: dict[str, Worker], prompts: list[list[int]], tokens: int, rounds: int, attempts: int
) -> dict[str, list[dict[str, Any]]]:
    """Rounds in turn; one that others disturbed is taken again while attempts last, the quietest are kept."""
    first = {name: worker.run(prompts, tokens) for name, worker in workers.items()}
    found: list[dict[str, dict[str, Any]]] = []
    for attempt in range(attempts):
        names = list(workers) if attempt % 2 else list(reversed(workers))
        found.append({name: workers[name].run(prompts, tokens) for name in names})
        shown = ", ".join(
            f"{SYSTEMS[n]} {a['seconds']:.2f} s, {a['cpu']:.2f} s of CPU (others {a['others']:.2f} cores)"
            for n, a in found[-1].items()
        )
        print(f"batch {len(prompts)}, round {attempt + 1}: {shown}", flush=True)
        quiet = [pair for pair in found if max(a["others"] for a in pair.values()) <= DISTURBED]
        if len(quiet) >= rounds:
            break
    found.sort(key=lambda pair: max(a["others"] for a in pair.values()))
    return {name: [first[name], *(pair[name] for pair in found[:rounds])] for name in workers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / ".cache/smollm2-135m-instruct", help="a Llama's folder")
    parser.add_argument("--gsm8k", type=Path, help="folder with GSM8K's test.jsonl; without it prompts are random ids")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of every row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--attempts", type=int, default=10, help="rounds at most, where others disturb them")
    parser.add_argument("--cores", type=int, default=0, help="that each system may use; 0 takes all")
    parser.add_argument("--no-write", action="store_true", help="print the table, leave docs/benchmarks.md as it is")
    parser.add_argument("--work", choices=SYSTEMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work, arguments.model, arguments.cores)
        return
    config = json.loads((arguments.model / "config.json").read_text())
    prompts = make_prompts(arguments.model, arguments.gsm8k, max(arguments.batches), config["vocab_size"])
    workers = {name: Worker(name, arguments.model, arguments.cores) for name in SYSTEMS}
    rows, others = [], []
    for batch in arguments.batches:
        chosen, new = prompts[:batch], arguments.tokens
        found = compare(workers, chosen, new, arguments.rounds, arguments.attempts)
        reading = compare(workers, chosen, 1, arguments.rounds, arguments.attempts)
        equal, share = agreement(found["ours"][0]["ids"], found["theirs"][0]["ids"])
        others += [a["others"] for kept in (found, reading) for answers in kept.values() for a in answers[1:]]

        def ratios(of: dict[str, list[dict[str, Any]]], key: str) -> str:
            pairs = zip(of["theirs"][1:], of["ours"][1:], strict=True)
            values = sorted(theirs[key] / ours[key] for theirs, ours in pairs)
            return f"{statistics.median(values):.2f} ({values[0]:.2f} to {values[-1]:.2f})"

        for name, answers in found.items():
            seconds = statistics.median(a["seconds"] for a in answers[1:])
            cpu = statistics.median(a["cpu"] for a in answers[1:])
            of_reading = statistics.median(a["seconds"] for a in reading[name][1:])
            speeds = (ratios(found, "seconds"), ratios(found, "cpu")) if name == "ours" else ("", "")
            same = f"{equal} of {batch}, {100 * share:.1f}%" if name == "ours" else ""
            cells = (f"{batch * new / seconds:.1f}", f"{of_reading:.2f}", f"{1e3 * cpu / (batch * new):.1f}")
            rows.append((f"batch {batch}: {SYSTEMS[name]}", *cells, f"{answers[0]['seconds']:.1f}", *speeds, same))
    for worker in workers.values():
        worker.close()
    columns = ("", "tokens/s", "s of reading the prompts", "ms of CPU a token", "s of the first call")
    columns += ("our speed / its (range)", "its CPU time / ours", "rows equal, ids before a difference")
    text = markdown_table(columns, rows) + (
        f"\n\n{arguments.model.name}, float32, {arguments.tokens} new tokens a row, "
        f"{'GSM8K questions' if arguments.gsm8k else 'random ids'} of {min(map(len, prompts))} to "
        f"{max(map(len, prompts))} tokens. Medians of {arguments.rounds} rounds in turn; "
        f"{arguments.cores or os.cpu_count()} core(s) for each; other processes used "
        f"{statistics.median(others):.2f} cores (median; at most {max(others):.2f}). On {machine()}, "
        f"{', '.join(f'{name} {version(name)}' for name in ('jax', 'torch', 'transformers'))}."
    )
    print(text)
    if not arguments.no_write:
        write_section(ROOT / "docs" / "benchmarks.md", "decoding", text)


if __name__ == "__main__":
    main()
