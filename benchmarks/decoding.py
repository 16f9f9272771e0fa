"""Greedy decoding against transformers.generate: same model, prompts, number of tokens and cores, in turn.

python benchmarks/decoding.py --model=DIR --gsm8k=FOLDER  # 15 minutes on two quiet cores; writes docs/benchmarks.md
python benchmarks/decoding.py --model=DIR --ragged        # 64 prompts whose lengths differ by 8x; 15 minutes

Two processes stay loaded, one a system, and take turns. FOLDER holds GSM8K's test.jsonl; without it prompts are random
ids of GSM8K's lengths. No text ends by itself: all have the same number of ids, or, with --ragged, each its own limit,
which also differ by 8x and are paired with the prompts at random. Ids are counted up to each text's limit. What is
compiled or warmed up is the first call of each size: it is reported, not timed.
"""

import argparse
import functools
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
# (prompts, new ids of each, texts at a time) -> what was written
Generate = Callable[[list[list[int]], list[int], int], list[list[int]]]
SLOTS = 16  # texts at a time for ragged prompts; on two cores more cost as much a text


def ours(model: Path) -> Generate:
    """rtd_jax, float32."""
    from rtd_jax.eval.decoding import GenerateSettings, generate
    from rtd_jax.models.from_hf import load_config, load_params
    from rtd_jax.models.model import DecoderModel

    config = load_config(model)
    llama, params = DecoderModel(config), load_params(model, config)

    def run(prompts: list[list[int]], limits: list[int], batch: int) -> list[list[int]]:
        settings = GenerateSettings(max(limits), (), config.vocab_size, batch)
        return generate(llama, params, prompts, settings, limits=limits)

    return run


def theirs(model: Path) -> Generate:
    """transformers on PyTorch, float32, with its own defaults: SDPA attention and a growing cache."""
    import torch
    from transformers import LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

    class Limits(StoppingCriteria):
        """Ends each row at its own number of new ids; generate stops when all rows have ended."""

        def __init__(self, prompt: int, limits: list[int]) -> None:
            self._lengths = prompt + torch.tensor(limits)

        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            return input_ids.shape[1] >= self._lengths

    llama = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    llama.generation_config.eos_token_id = None

    def one_batch(prompts: list[list[int]], limits: list[int]) -> list[list[int]]:
        longest = max(map(len, prompts))
        ids, mask = (
            torch.tensor([[0] * (longest - len(row)) + row for row in rows])
            for rows in (prompts, [[1] * len(prompt) for prompt in prompts])
        )
        how = {"max_new_tokens": max(limits), "do_sample": False, "pad_token_id": 0}
        if len(set(limits)) > 1:
            how["stopping_criteria"] = StoppingCriteriaList([Limits(longest, limits)])
        with torch.inference_mode():
            written = llama.generate(ids, attention_mask=mask, **how)
        return [row[longest : longest + limit] for row, limit in zip(written.tolist(), limits, strict=True)]

    def run(prompts: list[list[int]], limits: list[int], batch: int) -> list[list[int]]:
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        found: dict[int, list[int]] = {}
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            rows = one_batch([prompts[i] for i in chosen], [limits[i] for i in chosen])
            found |= dict(zip(chosen, rows, strict=True))
        return [found[i] for i in range(len(prompts))]

    return run


def work(system: str, model: Path, cores: int) -> None:
    """Serves a request a line, arguments of a `Generate`, with the ids, seconds, and seconds of all cores together."""
    if cores:  # both systems take as many threads as the process may have cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    run = {"ours": ours, "theirs": theirs}[system](model)
    report(ready=True)
    for line in sys.stdin:
        request = json.loads(line)
        started, used = time.perf_counter(), time.process_time()
        ids = run(**request)
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

    def run(self, prompts: list[list[int]], limits: list[int], batch: int) -> dict[str, Any]:
        """Its answer, with `others`: how many cores all other processes kept busy meanwhile."""
        busy, started = busy_seconds(), time.monotonic()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "limits": limits, "batch": batch}) + "\n")
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
    runs: dict[str, Callable[[], dict[str, Any]]], label: str, rounds: int, attempts: int
) -> dict[str, list[dict[str, Any]]]:
    """Rounds in turn; one that others disturbed is taken again while attempts last, the quietest are kept.

    The first answer of each is that of the call that compiles or warms up.
    """
    first = {name: run() for name, run in runs.items()}
    found: list[dict[str, dict[str, Any]]] = []
    for attempt in range(attempts):
        names = list(runs) if attempt % 2 else list(reversed(runs))
        found.append({name: runs[name]() for name in names})
        shown = ", ".join(
            f"{SYSTEMS.get(n, n)} {a['seconds']:.2f} s, {a['cpu']:.2f} s of CPU (others {a['others']:.2f} cores)"
            for n, a in found[-1].items()
        )
        print(f"{label}, round {attempt + 1}: {shown}", flush=True)
        quiet = [pair for pair in found if max(a["others"] for a in pair.values()) <= DISTURBED]
        if len(quiet) >= rounds:
            break
    found.sort(key=lambda pair: max(a["others"] for a in pair.values()))
    return {name: [first[name], *(pair[name] for pair in found[:rounds])] for name in runs}


def ratios(theirs: list[dict[str, Any]], ours: list[dict[str, Any]], key: str) -> str:
    """Median and range of their seconds over ours, round by round."""
    values = sorted(a[key] / b[key] for a, b in zip(theirs[1:], ours[1:], strict=True))
    return f"{statistics.median(values):.2f} ({values[0]:.2f} to {values[-1]:.2f})"


def of_others(found: dict[str, list[dict[str, Any]]]) -> list[float]:
    """Cores that other processes kept busy, of each timed call."""
    return [a["others"] for answers in found.values() for a in answers[1:]]


def equal_lengths(
    workers: dict[str, Worker], vocab_size: int, arguments: argparse.Namespace
) -> tuple[str, list[float]]:
    """The table of batches that all have the same number of new ids a row, and what others used meanwhile."""
    prompts = make_prompts(arguments.model, arguments.gsm8k, max(arguments.batches), vocab_size)
    rows, others = [], []
    for batch in arguments.batches:
        chosen, new = prompts[:batch], arguments.tokens

        def compared(tokens: int, chosen: list[list[int]] = chosen) -> dict[str, list[dict[str, Any]]]:
            limits = [tokens] * len(chosen)
            runs = {name: functools.partial(w.run, chosen, limits, len(chosen)) for name, w in workers.items()}
            return compare(runs, f"batch {len(chosen)}", arguments.rounds, arguments.attempts)

        found, reading = compared(new), compared(1)
        equal, share = agreement(found["ours"][0]["ids"], found["theirs"][0]["ids"])
        others += of_others(found) + of_others(reading)
        for name, answers in found.items():
            seconds = statistics.median(a["seconds"] for a in answers[1:])
            cpu = statistics.median(a["cpu"] for a in answers[1:])
            of_reading = statistics.median(a["seconds"] for a in reading[name][1:])
            is_ours = name == "ours"
            speeds = [ratios(found["theirs"], answers, key) if is_ours else "" for key in ("seconds", "cpu")]
            same = f"{equal} of {batch}, {100 * share:.1f}%" if is_ours else ""
            cells = (f"{batch * new / seconds:.1f}", f"{of_reading:.2f}", f"{1e3 * cpu / (batch * new):.1f}")
            rows.append((f"batch {batch}: {SYSTEMS[name]}", *cells, f"{answers[0]['seconds']:.1f}", *speeds, same))
    columns = ("", "tokens/s", "s of reading the prompts", "ms of CPU a token", "s of the first call")
    columns += ("our speed / its (range)", "its CPU time / ours", "rows equal, ids before a difference")
    text = markdown_table(columns, rows) + (
        f"\n\n{arguments.model.name}, float32, {arguments.tokens} new tokens a row, "
        f"{'GSM8K questions' if arguments.gsm8k else 'random ids'} of {min(map(len, prompts))} to "
        f"{max(map(len, prompts))} tokens."
    )
    return text, others


def ragged(workers: dict[str, Worker], vocab_size: int, arguments: argparse.Namespace) -> tuple[str, list[float]]:
    """The table of prompts, and of texts, whose lengths differ by 8x; and what others used meanwhile."""
    count, most, rng = 64, arguments.tokens, np.random.default_rng(0)
    lengths, limits = (rng.permutation(np.linspace(top // 8, top, count).astype(int)).tolist() for top in (128, most))
    prompts = [rng.integers(3, vocab_size, length).tolist() for length in lengths]
    ours, theirs = workers["ours"], workers["theirs"]
    runs = {
        f"rtd_jax, {SLOTS} at a time": functools.partial(ours.run, prompts, limits, SLOTS),
        f"transformers, one batch of {count}": functools.partial(theirs.run, prompts, limits, count),
        f"transformers, batches of {SLOTS} by length": functools.partial(theirs.run, prompts, limits, SLOTS),
    }
    found = compare(runs, "ragged", arguments.rounds, arguments.attempts)
    mine = next(iter(found.values()))
    rows = []
    for name, answers in found.items():
        seconds = statistics.median(a["seconds"] for a in answers[1:])
        cpu = statistics.median(a["cpu"] for a in answers[1:])
        cells = (f"{sum(limits) / seconds:.1f}", f"{1e3 * cpu / sum(limits):.1f}", f"{answers[0]['seconds']:.1f}")
        equal, share = agreement(mine[0]["ids"], answers[0]["ids"])
        compared = [ratios(answers, mine, key) for key in ("seconds", "cpu")]
        same = f"{equal} of {count}, {100 * share:.1f}%"
        rows.append((name, *cells, *((*compared, same) if answers is not mine else ("", "", ""))))
    columns = ("", "tokens/s", "ms of CPU a token", "s of the first call", "our speed / its (range)")
    columns += ("its CPU time / ours", "rows equal, ids before a difference")
    text = markdown_table(columns, rows) + (
        f"\n\n{arguments.model.name}, float32, {count} prompts of {min(lengths)} to {max(lengths)} random ids, "
        f"{min(limits)} to {max(limits)} new tokens a row, {sum(limits):,} in all, which alone are counted."
    )
    return text, of_others(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / ".cache/smollm2-135m-instruct", help="a model's folder")
    parser.add_argument("--gsm8k", type=Path, help="folder with GSM8K's test.jsonl; without it prompts are random ids")
    parser.add_argument("--ragged", action="store_true", help="prompts and texts whose lengths differ by 8x")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of every row; ragged, the most")
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
    workers = {name: Worker(name, arguments.model, arguments.cores) for name in SYSTEMS}
    measure = ragged if arguments.ragged else equal_lengths
    text, others = measure(workers, config["vocab_size"], arguments)
    for worker in workers.values():
        worker.close()
    text += (
        f" Medians of {arguments.rounds} rounds in turn; {arguments.cores or os.cpu_count()} core(s) for each; other "
        f"processes used {statistics.median(others):.2f} cores (median; at most {max(others):.2f}). On {machine()}, "
        f"{', '.join(f'{name} {version(name)}' for name in ('jax', 'torch', 'transformers'))}."
    )
    print(text)
    if not arguments.no_write:
        section = "decoding-ragged" if arguments.ragged else "decoding"
        write_section(ROOT / "docs" / "benchmarks.md", section, text)


if __name__ == "__main__":
    main()
