"""Distributions of times that cannot work, refused in a line."""

import math

import pytest
from torch import Tensor

import denoiselab
from denoiselab.errors import UserError
from denoiselab.schedule import Schedule
from exact import make


class Even(Schedule):
    """Without points of its own: log-SNR 10 - 20 t."""

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return (10 - 20 * t).sigmoid().sqrt(), (20 * t - 10).sigmoid().sqrt()


REFUSED = [
    (
        "slots",
        {"curve": None},
        "boundaries=null: slots have no boundaries of their own; give them boundaries=[...] or ",
    ),
    ("slots", {"boundaries": [0.1]}, "boundaries=[0.1]: given beside a curve; curve=null"),
    ("slots", {"curve": "x.csv"}, "curve=x.csv: no such file"),
    ("slots", {"slots": 1}, "slots=1: need at least 2"),
    ("slots", {"curve": None, "boundaries": [0.5, 0.2]}, "boundaries=[0.5, 0.2]: need"),
    ("slots", {"curve": None, "boundaries": []}, "boundaries=[]: need"),
    ("slots", {"curve": None, "boundaries": [0, 0.5]}, "boundaries=[0, 0.5]: need"),
    ("slots", {"curve": None, "boundaries": [0.5, math.nan]}, "boundaries=[0.5, nan]: need"),
    ("slots", {"probabilities": [1, 2]}, "probabilities=[1.0, 2.0]: need 10"),
    ("slots", {"slots": 2, "probabilities": [0, 1]}, "probabilities=[0.0, 1.0]: need 2 numbers > 0, or correct=false"),
    ("slots", {"slots": 2, "probabilities": [0, 0], "correct": False}, "probabilities=[0.0, 0.0]: need 2 numbers >= 0"),
    ("slot", {"slot": 10}, "slot=10: need"),
    ("slot", {"slot": -1}, "slot=-1: need"),
    ("slot", {"curve": None}, "boundaries=null: slots have no boundaries"),
    ("curriculum", {"budget": 0}, "budget=0"),
    ("curriculum", {"slots": 2}, "order=[9, 8,"),
    ("curriculum", {"order": []}, "order=[]"),
    ("curriculum", {"curve": None}, "boundaries=null: slots have no boundaries"),
    ("curriculum", {"order": [1], "correct": True}, "order=[1]: need"),
    ("from_curve", {"curve": None}, "curve=null: need a text"),
    ("from_curve", {"panel": "mse"}, "panel=mse: need one of"),
    ("from_curve", {"correct": True, "curve": '{"t": [0, 1], "value": [0, 1]}'}, "correct=true: the curve is 0"),
    ("importance", {"floor": 0}, "floor=0: need"),
    ("importance", {"floor": -0.1}, "floor=-0.1: need"),
    ("importance", {"floor": 1.1}, "floor=1.1: need"),
    ("importance", {"history": 0}, "history=0: need"),
    ("importance", {"steps": 100}, "steps=100: need 1000"),
    ("importance", {"schedule": Even(), "points": 1}, "points=1: need"),
    ("uniform", {"steps": 1}, "steps=1: need"),
    ("uniform", {"steps": "ten"}, "steps=ten: need"),
    ("logit_normal", {"scale": 0}, "scale=0: need"),
    ("lognormal", {"p_std": math.inf}, "p_std=inf: need"),
    ("speed", {"tau": 1}, "tau=1: need"),
    ("speed", {"k": 0.5}, "k=0.5: need"),
    ("mode", {"s": 3}, "s=3: need"),
]


@pytest.mark.parametrize(("timesteps", "arguments", "message"), REFUSED)
def test_what_cannot_work_is_refused_in_one_line(timesteps, arguments, message):
    with pytest.raises(UserError) as error:
        make("timesteps", timesteps, **arguments)
    assert str(error.value).startswith(f"timesteps.{message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("timesteps=slots timesteps.curve=null", "timesteps.boundaries=null: slots have no boundaries of their own"),
        ("timesteps=slots timesteps.curve=null timesteps.boundaries=[0.5,0.4]", "timesteps.boundaries=[0.5, 0.4]: "),
        ("timesteps=from_curve timesteps.curve=nowhere", "timesteps.curve=nowhere: no such file"),
        ("spacing=loss_density spacing.curve=null", "spacing.curve=null: need a text"),
    ],
)
def test_a_command_line_is_refused_in_one_line(line, message):
    with pytest.raises(UserError) as error:
        getattr(denoiselab.build(*line.split()), line.partition("=")[0])
    assert str(error.value).startswith(message)
