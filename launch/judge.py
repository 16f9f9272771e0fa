"""Says how well a judge of steps finds the first wrong one, on labelled solutions of ProcessBench's schema.

python launch/judge.py --data=gsm8k.jsonl --references=/data --out=runs/judge
"""

from entry import run

if __name__ == "__main__":
    run("judge")
