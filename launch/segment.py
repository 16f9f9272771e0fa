"""Cuts texts into reasoning steps: any JSONL of texts in, stepwise JSONL (`prompt`, `completions`) out.

python launch/segment.py --teacher=MODEL --classifier=runs/boundaries_smollm2/classifier --data=texts.jsonl
"""

import flag_entry

from rtd_jax.apps.segment import SegmentSettings, segment

if __name__ == "__main__":
    flag_entry.run(SegmentSettings, segment)
