"""How long the step judge takes, ordinary solutions and hostile ones, and what it says of GSM8K's own solutions.

    python benchmarks/judge_speed.py --data=gsm8k.dev.jsonl --references=/data

The solutions of a file of ProcessBench's schema are judged again and again, with the caches that a run has. Seconds are
of the processor, on one core.
"""

import argparse
import time
from pathlib import Path

from rtd_jax.apps.judge import find_references
from rtd_jax.base.files import read_jsonl
from rtd_jax.data.trace import problem_key
from rtd_jax.eval.judge.judge import judge_steps

HOSTILE = {
    "digits": "9" * 100_000,
    "nested braces": "{" * 100_000,
    "nested fractions": "\\frac{" * 16_000,
    "a tower of powers": "9^{9^{9^9}} = 3",
    "equals": "1=" * 50_000,
    "numbers": "1 " * 50_000,
    "decimals": ".5" * 50_000,
    "a sum": " + ".join(["1"] * 25_000) + " = 5",
    "a product": "*".join(["7"] * 50_000) + "=3",
    "words": "a " * 50_000,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--references", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=10_000)
    arguments = parser.parse_args()
    rows = [row for _, row in read_jsonl(arguments.data)]
    references = find_references(str(arguments.references))
    work = [(row["problem"], row["steps"], references.get(problem_key(row["problem"]))) for row in rows]
    start = time.process_time()
    for i in range(arguments.texts):
        # A letter more, so that no step's tokens are found in the cache.
        problem, steps, reference = work[i % len(work)]
        judge_steps(problem, [f"{step} {i}th" for step in steps], reference)
    print(f"{arguments.texts} solutions: {time.process_time() - start:.1f} s")
    traces = references.values()
    chains = [(trace, trace.completion.splitlines()) for trace in traces]
    own = sum(judge_steps(trace.prompt, chain, trace).first_error < 0 for trace, chain in chains)
    alone = sum(judge_steps(trace.prompt, chain).first_error < 0 for trace, chain in chains)
    print(f"of {len(chains)} solutions that people wrote {own} are right as their own references, {alone} without")
    problem, _, reference = work[0]
    for name, text in HOSTILE.items():
        start = time.process_time()
        judge_steps(problem, [text], reference)
        print(f"{name}, {len(text)} characters: {time.process_time() - start:.2f} s")


if __name__ == "__main__":
    main()
