"""What a recipe needs on hardware that is not here; nothing is allocated, the real compilers are asked.

python launch/plan.py --config=configs/rtd_8b.py --target=a100-80gb:8      (also tpu-v5p:2x2x2, tpu-v6e:4x4, cpu:8)
"""

from entry import run

if __name__ == "__main__":
    run("plan")
