"""Makes a student smaller, by rounding its weights to a few bits or by pruning, and says what that costs by depth.

python launch/compress.py --student=runs/rtd_tiny --scheme=int4 --group_size=32 --out=runs/rtd_tiny_int4
"""

from entry import run

if __name__ == "__main__":
    run("compress")
