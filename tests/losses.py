"""What tests of losses and weightings share: networks that say what they are told, and weights on a schedule."""

from collections.abc import Iterator

import pytest
from torch import Tensor, nn

from denoiselab.schedule import Schedule
from exact import OPTIONS, make

TABLES = ("vlb_beta", "vlb_beta_tilde")
"""Weightings of tables, which other schedules do not have."""


class Says(nn.Module):
    """A network that answers y whatever it is asked."""

    def __init__(self, y: Tensor):
        super().__init__()
        self.y = nn.Parameter(y)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return self.y


def weights(weighting, found: Schedule, t: Tensor) -> Tensor:
    alpha_t, sigma_t = found(t)
    return weighting.weight(alpha_t, sigma_t, found.rate(t))


def weighings(weighting: str, schedule: Schedule) -> Iterator:
    """The option on a schedule: with every target as the run's where it follows the run's."""
    if weighting in TABLES and schedule.points is None:
        pytest.skip("has no table")
    for name in OPTIONS["target"] if weighting == "unit" else ["v"]:
        target = make("target", name, sigma_data=0.5)
        yield target, make("weighting", weighting, target=target, schedule=schedule, sigma_data=0.5)
