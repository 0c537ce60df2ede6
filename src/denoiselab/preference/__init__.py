"""Which of two sets of samples do people prefer? A blinded sheet of pairs, and the score of its answers."""

from denoiselab.preference.answers import Answers, read_answers, read_key
from denoiselab.preference.score import clopper_pearson, fleiss_kappa, over_pairs, score
from denoiselab.preference.sheet import Pictures, Trial, order, write_sheet

__all__ = [
    "Answers",
    "Pictures",
    "Trial",
    "clopper_pearson",
    "fleiss_kappa",
    "order",
    "over_pairs",
    "read_answers",
    "read_key",
    "score",
    "write_sheet",
]
