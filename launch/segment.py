"""Cuts texts into reasoning steps: any JSONL of texts in, stepwise JSONL (`prompt`, `completions`) out.

python launch/segment.py --teacher=MODEL --classifier=runs/boundaries_smollm2/classifier --data=texts.jsonl
"""

from entry import run

if __name__ == "__main__":
    run("segment")
