"""`python -m rtd_jax train --config=...` runs launch/train.py of the clone that this package belongs to."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    script = Path(__file__).resolve().parents[1] / "launch" / f"{sys.argv.pop(1)}.py"
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
