"""The article's numbers, of its own models and data: shown beside what is measured here, and compared with it.

Accuracies are in %, gains in percentage points. "Deep" means four steps and more. KD is logit matching.
"""

# Gain of RTD over KD in full-chain accuracy on GSM8K, by number of steps.
GAINS = {"2": 1.9, "3": 8.3, "4+": 18.7, "5+": 23.1}
DEEP_GAIN = GAINS["4+"]
# RTD without one component, on the deep problems of GSM8K and MATH: the gain that is left, and the share of the gain
# that the article says is lost.
GAIN_WITHOUT = {"coherence": 7.1, "curriculum": 11.4, "alignment": 13.2}
SHARE_LOST = {"coherence": 62, "curriculum": 24, "alignment": 14}

DEEP_STEP_ACCURACY, DEEP_CHAIN_ACCURACY = 90.4, 52.6  # of KD's student
GAP = 37.8  # between these two
OVER_TEACHER = 1.3  # RTD's student above the teacher at two steps
QUANTISED_GAIN = 11.2  # DEEP_GAIN of the student at 4 bits, rounded after training
SMALL_STUDENT_GAIN = 9.3  # DEEP_GAIN of the student with 1B parameters
OVERHEAD = 60  # % of training time that RTD adds to KD
PERPLEXITY_ABOVE_TEACHER = 3  # %, at most, of KD's student

CKA = {1: 0.89, 2: 0.81, 3: 0.72, 4: 0.58}  # biased, between KD's student and the teacher, by step
AUROC = 0.83  # of the transition cosine for the next step

ALIGNMENT_WEIGHT, COHERENCE_WEIGHT = 0.3, 0.5  # found by a grid search on held-out data
