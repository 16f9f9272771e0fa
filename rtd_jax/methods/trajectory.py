"""What alignment, coherence and token alignment share: whose states are matched, and through which maps."""

from dataclasses import dataclass

from rtd_jax.methods.maps import Maps
from rtd_jax.methods.term import MethodSettings, Reads, Setup


@dataclass(frozen=True)
class TrajectorySettings(MethodSettings):
    """Keys of `loss` that the terms on hidden states share."""

    hidden_layer: int = -1  # of the teacher, matched at the boundaries; -1 is the final normed state
    student_hidden_layer: int = -1  # of the student; -1 is the final normed state
    projections: Maps = "separate"  # f for states and g for transitions: separate, shared (one map) or none

    def matched_layers(self, setup: Setup) -> tuple[int, int]:
        """(student's, teacher's) layer whose states are compared, counted from 0.

        Raises:
          ValueError: a layer that does not exist.
        """
        return (
            setup.student.layer_index(self.student_hidden_layer),
            setup.teacher.layer_index(self.hidden_layer),
        )


def boundary_reads(layers: tuple[int, int]) -> Reads:
    """The states of a (student, teacher) pair of layers at the boundaries."""
    student, teacher = layers
    return Reads(student_boundaries=(student,), teacher_boundaries=(teacher,))
