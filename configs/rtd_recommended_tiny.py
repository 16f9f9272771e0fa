"""What helped on tiny models, where it was measured: `rtd_tiny` without stages, following the means of steps.

    python launch/train.py --config=configs/rtd_recommended_tiny.py
    python launch/train.py --config=configs/rtd_recommended_tiny.py --config.data.segmentation=soft:12

Soft windows need no steps. A few minutes on two CPU cores. docs/findings.md has what the form is worth where problems
or updates are few.
"""

from ml_collections import ConfigDict

from configs import rtd_tiny
from configs.rtd_recommended_8b import recommended


def get_config() -> ConfigDict:
    c = recommended(rtd_tiny.get_config())
    c.loss.projections = "none"  # of equal widths, where maps brought nothing
    return c
