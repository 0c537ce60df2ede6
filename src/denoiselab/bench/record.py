"""What a benchmark found, for people and for files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from denoiselab.bench.timing import Contender, median_interval, quartiles


@dataclass
class Time:
    """Milliseconds of one piece of work: the median and the quartiles over the rounds.

    Attributes:
        peak_mib: the most memory it needed, weights included; None where that was not measured.
    """

    ms: float
    quartiles: tuple[float, float]
    peak_mib: float | None = None


@dataclass
class Result:
    """One number per round: its median, the 95% confidence interval of that, and the quartiles.

    Attributes:
        of: what it is, such as "ours / diffusers": the ratio of their times in the same round.
    """

    of: str
    median: float
    interval: tuple[float, float]
    quartiles: tuple[float, float]


@dataclass
class Record:
    """One benchmark.

    Attributes:
        part: of ``denoiselab bench``.
        name: what was measured.
        work: the piece of work that times are of.
        rounds: turns of each contender.
        times: by contender.
        result: what the benchmark is made for.
        need: {"at_most": number} or {"at_least": number}, what the result should reach; {} where nothing was promised.
        facts: sizes, and what else was found.
    """

    part: str
    name: str
    work: str
    rounds: int
    times: dict[str, Time]
    result: Result
    need: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}

    @property
    def verdict(self) -> str | None:
        """Whether the result is as needed: with its whole interval, or with its median only; None without a need."""
        for kind, bound in self.need.items():
            sign = 1 if kind == "at_most" else -1
            low, high = sorted(sign * end for end in self.result.interval)
            if high <= sign * bound:
                return "met"
            if low > sign * bound:
                return "missed"
            return "met by the median" if sign * (self.result.median - bound) <= 0 else "missed by the median"
        return None


def need(options: dict[str, Any], kind: str) -> dict[str, float]:
    """What the options say of "at_most" or "at_least", if they say it."""
    return {} if options.get(kind) is None else {kind: options[kind]}


def times(contenders: Sequence[Contender], peaks: dict[str, float] | None = None) -> dict[str, Time]:
    """Of contenders that had their turns."""
    found = {}
    for contender in contenders:
        low, middle, high = (1e3 * value for value in quartiles(contender.seconds))
        found[contender.name] = Time(middle, (low, high), (peaks or {}).get(contender.name))
    return found


def result(of: str, values: Sequence[float]) -> Result:
    """Of one value per round."""
    low, middle, high = quartiles(values)
    return Result(of, middle, median_interval(values), (low, high))


def ratio(over: Contender, under: Contender) -> Result:
    """The ratio of two contenders' times, round by round."""
    pairs = [a / b for a, b in zip(over.seconds, under.seconds, strict=True)]
    return result(f"{over.name} / {under.name}", pairs)
