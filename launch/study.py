"""Compares methods over seeds: `python launch/study.py --config=configs/study_tiny.py`. Run it again to continue."""

import entry

from rtd_jax.apps.study.study import StudyRecipe, study

if __name__ == "__main__":
    entry.run(StudyRecipe, study)
