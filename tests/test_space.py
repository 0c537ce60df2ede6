"""What a search draws from, by how an option's values are written."""

from typing import Any

import pytest

from denoiselab.compose import sweep
from denoiselab.errors import UserError
from denoiselab.sweeper.space import axis


@pytest.mark.parametrize(
    ("line", "kind", "facts", "drawn", "written"),
    [
        ("x=a,b", "Categorical", {"choices": ("a", "b")}, "b", "x=b"),
        ("x=1,[2,3],null", "Categorical", {"choices": ("1", "[2,3]", "null")}, "[2,3]", "x=[2,3]"),
        ("x=range(1,4)", "Int", {"low": 1, "high": 3, "step": 1, "log": False}, 3, "x=3"),
        ("x=range(1,8,3)", "Int", {"low": 1, "high": 7, "step": 3}, 4, "x=4"),
        ("x=range(5,0,-2)", "Int", {"low": 1, "high": 5, "step": 2}, 3, "x=3"),
        ("x=range(0.5,2.0,0.25)", "Float", {"low": 0.5, "high": 1.75, "step": 0.25}, 1.25, "x=1.25"),
        ("x=interval(0,1)", "Float", {"low": 0.0, "high": 1.0, "step": None, "log": False}, 1e-05, "x=1e-05"),
        ("+x=tag(log, interval(1e-4,1e-2))", "Float", {"low": 1e-4, "high": 1e-2, "log": True}, 0.001, "+x=0.001"),
        ("x=int(interval(1,64))", "Int", {"low": 1, "high": 64, "step": 1, "log": False}, 64, "x=64"),
        ("x=int(tag(log,interval(1,64)))", "Int", {"low": 1, "high": 64, "log": True}, 8, "x=8"),
        ("x=tag(log,int(interval(1,64)))", "Int", {"low": 1, "high": 64, "log": True}, 8, "x=8"),
    ],
)
def test_values_are_distributions(line: str, kind: str, facts: dict[str, Any], drawn: Any, written: str):
    found = axis(line)
    assert type(found.distribution).__name__ == f"{kind}Distribution"
    assert {name: getattr(found.distribution, name) for name in facts} == facts
    assert found.override(drawn) == written


def test_numbers_of_a_range_are_those_of_a_grid():
    line = "x=range(0.1,0.9,0.1)"
    found, listed = axis(line), [one for [one] in sweep([line])]
    step = found.distribution.step  # pyright: ignore[reportAttributeAccessIssue]
    assert [found.override(0.1 + k * step) for k in range(8)] == listed[:8]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("x=interval(1,0)", r"x: interval\(1,0\): "),
        ("x=tag(log,interval(0,1))", r"x: tag\(log,interval\(0,1\)\): "),
        ("x=tag(loud,interval(0,1))", "no tag loud; log is one"),
        ("x=tag(log,range(1,9))", r"a tag is for interval\(LOW,HIGH\)"),
        ("x=a,a", "need different values"),
        ("x=range(3,3)", "need different values"),
        ("schedule=glob(*)", "cannot be expanded"),
    ],
)
def test_what_cannot_be_drawn_from_is_one_line(line: str, says: str):
    with pytest.raises(UserError, match=says) as caught:
        axis(line)
    assert "\n" not in str(caught.value)
