"""Says what is wrong with a recipe's models and data before it is run, and shows chains as the student will see them.

python launch/check.py --config=configs/rtd_tiny.py --html=runs/check.html
"""

from entry import run

if __name__ == "__main__":
    run("check")
