"""Scoring a preference study: shares with exact intervals, who was left out and why, and how far raters agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from denoiselab.preference.answers import Answers, Key

LEVEL = 0.95


def score(key: Key, raters: Sequence[Answers], attention: float = 0.9) -> dict[str, Any]:
    """The share of answers that prefer b over a, with its interval, and what it rests on.

    Answers to pairs count; repeats and checks do not. A rater who prefers the real picture in less than ``attention``
    of the checks is left out of everything that is over raters.

    Args:
        key: of the sheet.
        raters: one or more, of different names.
        attention: in [0, 1].

    Returns:
        prefer_b: ``share``; ``n`` answers; ``interval``, exact where answers are independent (``clopper_pearson``);
        ``interval_over_pairs``, which allows for raters who agree because of what the pairs show (``over_pairs``) and
        is the one to quote of several raters; ``p``, two-sided and exact, that neither is preferred, if answers are
        independent. agreement: Fleiss' kappa. raters: for each the same of the own answers, checks passed, and repeats
        answered alike. excluded: by name, why. A part that cannot be computed is None.

    Raises:
        ValueError: two raters of one name, or nobody is left.
    """
    names = [rater.rater for rater in raters]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"rater {twice} answered twice; need one file of each")
    single = {rater.rater: alone(key, rater) for rater in raters}
    excluded = {
        name: f"passed {found['checks_passed']} of {found['checks']} checks; need {attention:.0%}"
        for name, found in single.items()
        if found["checks"] and found["checks_passed"] < attention * found["checks"] - 1e-9
    }
    kept = [rater for rater in raters if rater.rater not in excluded]
    if not kept:
        raise ValueError(f"attention={attention:g}: no rater passed as many of the checks")
    chosen = np.array([prefers_b(key, rater) for rater in kept]).T  # (pairs, raters)
    wins, n = int(chosen.sum()), chosen.size
    counts = np.stack([chosen.sum(1), (~chosen).sum(1)], 1)
    return {
        "prefer_b": {
            "share": wins / n,
            "n": n,
            "pairs": len(chosen),
            "raters": len(kept),
            "interval": clopper_pearson(wins, n),
            "interval_over_pairs": over_pairs(chosen),
            "p": two_sided(wins, n),
            "level": LEVEL,
        },
        "agreement": {"fleiss_kappa": fleiss_kappa(counts) if len(kept) > 1 else None},
        "raters": single,
        "excluded": excluded,
        "rule": f"a rater takes part who passed {attention:.0%} of the checks",
    }


def alone(key: Key, rater: Answers) -> dict[str, Any]:
    """What one rater's answers say."""
    chosen = prefers_b(key, rater)
    picked = [picks(key, rater, kind) for kind in ("check", "repeat", "pair")]
    pairs = dict(picked[2])
    alike = sum(pairs[item] == side for item, side in picked[1])
    wins, n = int(chosen.sum()), len(chosen)
    return {
        "share": wins / n,
        "n": n,
        "interval": clopper_pearson(wins, n),
        "p": two_sided(wins, n),
        "checks": len(picked[0]),
        "checks_passed": sum(side == "real" for _, side in picked[0]),
        "repeats": len(picked[1]),
        "repeats_alike": alike,
        "left_share": sum(choice == "left" for choice in rater.choices) / len(rater.choices),
    }


def picks(key: Key, rater: Answers, kind: str) -> list[tuple[int, str]]:
    """(item, what was chosen) of the trials of a kind."""
    rows = zip(key.trials, rater.choices, strict=True)
    return [
        (trial.item, trial.left if choice == "left" else trial.right) for trial, choice in rows if trial.kind == kind
    ]


def prefers_b(key: Key, rater: Answers) -> np.ndarray:
    """Whether b was preferred, pair by pair."""
    return np.array([side == "b" for _, side in sorted(picks(key, rater, "pair"))])


def clopper_pearson(wins: float, n: float, level: float = LEVEL) -> list[float]:
    """The exact interval of a share: those p for which neither tail of Binomial(n, p) beyond ``wins`` is below
    (1 - level)/2 (Clopper and Pearson 1934, doi:10.1093/biomet/26.4.404). It covers at least as often as it says.

    >>> [round(end, 4) for end in clopper_pearson(8, 10)]
    [0.4439, 0.9748]
    """
    from scipy.stats import beta

    tail = (1 - level) / 2
    low = float(beta.ppf(tail, wins, n - wins + 1)) if wins > 0 else 0.0
    high = float(beta.ppf(1 - tail, wins + 1, n - wins)) if wins < n else 1.0
    return [low, high]


def over_pairs(chosen: np.ndarray) -> list[float] | None:
    """The interval of the share of True, pairs being the units that are drawn and not answers (Korn and Graubard 1998,
    Survey Methodology 24): Clopper and Pearson's of as many independent answers as have the variance of the mean over
    pairs.

    With share p of N answers on m pairs and v = var(share of a pair)/m::

        N' = min(N, (t_{N-1} / t_{m-1})^2 p (1 - p) / v)    t_k the 97.5 % point of Student's t

    Where all answers are alike there is no variance to go by, and N' = m. None for fewer than 2 pairs.

    Args:
        chosen: (pairs, raters).
    """
    from scipy.stats import t

    m, raters = chosen.shape
    if m < 2:
        return None
    n, p = m * raters, float(chosen.mean())
    v = float(chosen.mean(1).var(ddof=1)) / m
    tail = (1 + LEVEL) / 2
    effective = float(m) if p in (0.0, 1.0) else float(n)
    if v > 0:
        effective = min(n, float(t.ppf(tail, n - 1) / t.ppf(tail, m - 1)) ** 2 * p * (1 - p) / v)
    return clopper_pearson(p * effective, effective)


def two_sided(wins: int, n: int) -> float:
    """The exact p-value of a share of one half."""
    from scipy.stats import binomtest

    return float(binomtest(wins, n).pvalue)


def fleiss_kappa(counts: np.ndarray) -> float | None:
    """(P - P_e)/(1 - P_e): P the share of pairs of raters that agree, P_e what chance gives at the shares of the
    categories (Fleiss 1971, doi:10.1037/h0031619). 1: always; 0: as chance; None where all answers are alike.

    Args:
        counts: (subjects, categories), the same number of raters in each row, at least 2.
    """
    k = counts.sum(1)[0]
    agree = ((counts**2).sum(1) - k) / (k * (k - 1))
    chance = float(((counts.sum(0) / counts.sum()) ** 2).sum())
    return None if chance == 1 else float((agree.mean() - chance) / (1 - chance))
