"""Runs the teacher once over a recipe's chains and keeps its outputs. Run it again to continue.

python launch/cache_teacher.py --config=configs/rtd_tiny.py --config.teacher.cache=runs/cache
python launch/train.py --config=configs/rtd_tiny.py --config.teacher.cache=runs/cache    # never loads the teacher

With --config.teacher.server and --config.teacher.served_model a vLLM or SGLang server is asked (docs/teacher-cache.md).
"""

from entry import run

if __name__ == "__main__":
    run("cache_teacher")
