"""Chain, step and answer accuracy by reasoning depth, of any model or of texts made elsewhere.

python launch/evaluate.py --model=runs/rtd_tiny,rtd_jax/bundled/tiny_teacher --tasks=synthetic --limit=120
python launch/evaluate.py --model=MODEL --tasks=gsm8k,math,strategyqa,arc_challenge --data_root=/data --limit=100
python launch/evaluate.py --generations=runs/evaluation/generations.jsonl --out=runs/rescored
"""

from entry import run

if __name__ == "__main__":
    run("evaluate")
