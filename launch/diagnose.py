"""Does a student lose its teacher's trajectory, and is that why it fails?

python launch/diagnose.py --teacher=rtd_jax/bundled/tiny_teacher --student=runs/rtd_tiny --data=synthetic
python launch/diagnose.py --teacher=MODEL --student=MODEL --student_dtype=int8 --data=/data/gsm8k --schema=gsm8k
"""

from entry import run

if __name__ == "__main__":
    run("diagnose")
