"""Makes a folder to share of a finished run's student, with a model card and the teacher's licence, and uploads it.

python launch/export.py --run=runs/rtd_tiny --out=runs/rtd_tiny_export
"""

from entry import run

if __name__ == "__main__":
    run("export")
