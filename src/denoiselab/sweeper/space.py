"""From an option's values, as they are written in a command, to the distribution that a search draws from."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from denoiselab.compose import interval, option, sweep
from denoiselab.errors import UserError, one_line

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


@dataclass
class Axis:
    """One option that is searched over."""

    key: str
    """As it is written before the =, with a + if it has one."""
    distribution: BaseDistribution
    ends: tuple[float, float] | None = None
    """Of an interval; None where values are listed."""
    values: list[str] = field(default_factory=list)
    """Of one that lists them, as written, numbers of a range from the lowest up."""

    def override(self, value: Any) -> str:
        """For a value that was drawn. Numbers of a range are as a grid has them, so that both make the same runs."""
        if self.ends is None and not isinstance(value, str):
            value = min(self.values, key=lambda one: abs(float(one) - value))
        return f"{self.key}={value}"

    @property
    def probes(self) -> list[str]:
        """Overrides that are known before anything is drawn: all that are listed, or the ends."""
        return [f"{self.key}={value}" for value in self.values or self.ends or ()]


def axis(line: str) -> Axis:
    """The axis that an override with several values is.

    ``a,b,c`` is drawn from as it is; ``range(1,9,2)`` is 1, 3, 5, 7 in their order; ``interval(1e-4,1e-2)`` is any
    number between, ``int(interval(1,64))`` any whole one, the ends included; ``tag(log,interval(...))`` is uniform in
    the logarithm.

    Raises:
        UserError: it cannot be drawn from.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    key, _, text = line.partition("=")
    text = text.replace(" ", "")
    tagged = text.startswith("tag(") or re.match(r"\w+\(tag\(", text)
    try:
        if between := interval(line):
            low, high, tags = between
            if tags - {"log"}:
                raise UserError(f"{line}: no tag {', '.join(sorted(tags - {'log'}))}; log is one")
            kind = IntDistribution if isinstance(low, int) else FloatDistribution
            return Axis(key, kind(low, high, log="log" in tags), (low, high))  # pyright: ignore[reportArgumentType]
        if tagged:
            raise UserError(f"{line}: a tag is for interval(LOW,HIGH), as in {key}=tag(log,interval(1e-4,1e-2))")
        values = [one.partition("=")[2] for [one] in sweep([line])]
        if len(values) != len({*values}) or not values:
            raise UserError(f"{line}: need different values")
        if not re.match(r"(\w+\()*range\(", text):
            return Axis(key, CategoricalDistribution(values), values=values)
        values.sort(key=float)
        numbers = [float(value) for value in values]
        step = numbers[1] - numbers[0] if len(numbers) > 1 else 1.0
        if all(re.fullmatch(r"-?\d+", value) for value in values):
            return Axis(key, IntDistribution(int(values[0]), int(values[-1]), step=round(step)), values=values)
        return Axis(
            key, FloatDistribution(numbers[0], numbers[0] + (len(numbers) - 1) * step, step=step), values=values
        )
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{option(line)}: {text}: {one_line(error)}") from None
