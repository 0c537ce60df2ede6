"""Measured curves over t: from files, integrated and inverted, and the spacing that follows one."""

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate

from denoiselab.curve import Curve
from denoiselab.sampler import LossDensity
from denoiselab.schedule import Linear
from exact import every, one

BROKEN = {
    "a.csv": "",
    "b.csv": "time,loss\n0,1\n",
    "c.csv": "t,value\n0,1\n0.5\n",
    "d.csv": "t,value\n0,one\n",
    "e.csv": "t,value\n0,-1\n",
    "f.csv": "t,value\n0.5,1\n0.5,2\n",
    "g.csv": "t,value\n0,1\n1.5,2\n",
    "h.csv": "t,value\n0,nan\n1,1\n",
    "i.csv": "t,value\nnan,1\n1,1\n",
    "j.csv": "t,value\n0,0\n1,0\n",
    "k.json": "[1, 2]",
    "l.json": '{"t": 3, "value": [1]}',
    "m.json": '{"t": [0, 1], "value": [1]}',
    "n.json": '{"t": [0, 1], "value": [1, 1e999]}',
    "o.json": '{"t": [0, 1], "value": [1, null]}',
    "p.json": '{"t": [0, 1], "value": [1, ' + "9" * 400 + "]}",
    "q.json": "[" * 100_000,
    "r.json": '{"t": [], "value": []}',
    "s.json": '{"t": [0, 1], "value": [[1], {}]}',
    "metrics.jsonl": '{"buckets/val/x_0": [1]}\n[1]\nnull\n',
    "u.jsonl": '{"buckets/val/eps": [null, null]}\n',
    "v.jsonl": '{"buckets/val/eps": 3}\n["buckets/val/eps"]\n',
    "w.csv": b"\xff\xfe\x00t,value",
    "x.csv": "t,value\n" + "0," * 200_000 + "\n",
}
"""Files that hold no curve."""


class TestCurve:
    CURVES = st.integers(1, 8).flatmap(
        lambda n: st.tuples(
            st.lists(st.integers(0, 1000), min_size=n, max_size=n, unique=True),
            st.lists(st.sampled_from([0.0, 0.001, 0.5, 1.0, 7.0, 1e4]), min_size=n, max_size=n),
        ).filter(lambda pair: sum(pair[1]) > 0)
    )

    @given(CURVES)
    @settings(max_examples=60, deadline=None)
    def test_its_integral_is_exact_and_its_inverse_undoes_it(self, pair):
        t, value = sorted(v / 1000 for v in pair[0]), pair[1]
        curve = Curve(t, value)
        u = torch.linspace(0, 1, 301, dtype=torch.float64)
        whole = curve.cumulative(u)
        knots = [0.0, *[v for v in t if 0 < v < 1], 1.0]
        fine = torch.cat([torch.linspace(a, b, 11, dtype=torch.float64) for a, b in itertools.pairwise(knots)])
        area = integrate.cumulative_trapezoid(curve(fine), fine, initial=0)
        torch.testing.assert_close(curve.cumulative(fine), torch.from_numpy(area), rtol=1e-9, atol=1e-9)
        assert (whole.diff() >= -1e-12).all()
        again = curve.inverse(u)
        assert (again.diff() >= 0).all()
        assert 0 <= again[0] <= again[-1] <= 1
        torch.testing.assert_close(curve.cumulative(again), u * curve.total, rtol=1e-6, atol=1e-9 * max(value))

    def test_it_is_the_least_t_where_the_curve_is_nought(self):
        curve = Curve([0, 0.25, 0.5, 0.75, 1], [1, 0, 0, 0, 1])
        assert curve.inverse(torch.tensor([0.5], dtype=torch.float64)).item() == pytest.approx(0.25)

    def test_it_is_constant_beyond_its_points(self):
        curve = Curve([0.4, 0.6], [1, 3])
        assert curve(torch.tensor([0, 0.2, 0.4, 0.5, 0.6, 0.8, 1]).double()).tolist() == pytest.approx(
            [1, 1, 1, 2, 3, 3, 3]
        )
        assert curve.total.item() == pytest.approx(0.4 + 0.4 + 1.2)

    def test_files_of_each_kind_are_the_same_curve(self, tmp_path):
        csv, table = tmp_path / "l.csv", tmp_path / "l.json"
        csv.write_text("t,other,value\n0.05,x,4\n0.45,y,2\n0.95,z,1\n")
        table.write_text(json.dumps({"t": [0.05, 0.45, 0.95], "value": [4, 2, 1]}))
        run = tmp_path / "run"
        run.mkdir()
        none = [None] * 10
        panels = {"eps": {0: 4.0, 4: 2.0, 9: 1.0}, "x_0": {0: 1.0, 9: 5.0}}
        last = {f"buckets/val/{key}": [row.get(k) for k in range(10)] for key, row in panels.items()}
        older = {"step": 1, "buckets/val/eps": [9.0] * 10, "buckets/val/x_0": none}
        later = {"step": 3, "train/loss": 0.1, "buckets/val/eps_se": none}
        text = "".join(json.dumps(row) + "\n" for row in (older, {"step": 2, **last}, later))
        (run / "metrics.jsonl").write_text(text + '{"step": 4, "buckets/val/eps": [1, ')
        for source in (csv, table, table.read_text(), run, run / "metrics.jsonl"):
            found = Curve.load(str(source))
            assert found.t.tolist() == pytest.approx([0, 0.05, 0.45, 0.95, 1])
            assert found.value.tolist() == [4, 4, 2, 1, 1]
        assert Curve.load(run, "x_0").value.tolist() == [1, 1, 5, 5]

    @pytest.mark.parametrize("name", BROKEN)
    def test_a_broken_file_is_one_line_that_names_it(self, name, tmp_path):
        content = BROKEN[name]
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ValueError, match=name) as error:
            Curve.load(str(tmp_path / name))
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 600

    @pytest.mark.parametrize("source", ["", "nowhere.csv", "a\nb.csv", "{", "/dev/null", "x" * 5000, "a\0b", None, 3])
    def test_what_is_no_file_is_one_line(self, source):
        with pytest.raises(ValueError, match=r"^curve=") as error:
            Curve.load(source)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 600

    def test_a_panel_is_one_of_three(self):
        with pytest.raises(ValueError, match=r"^panel=mse: need one of eps, x_0, v"):
            Curve.load('{"t": [0], "value": [1]}', "mse")


class TestLossDensity:
    @every("schedule")
    @pytest.mark.parametrize("steps", [1, 2, 10, 1500])
    def test_times_fall_strictly_from_pure_noise(self, schedule, steps):
        levels = one("schedule", schedule)
        for curve in (Curve([0, 0.2, 1], [4, 2, 1]), Curve([0, 0.1, 0.2, 0.6, 0.8, 1], [1e4, 1, 0, 0, 1, 0])):
            times = LossDensity(curve)(levels, steps)
            assert len(times) == steps
            assert times[0] == 1
            assert (times.diff() < 0).all()
            assert times[-1] > levels.earliest or steps == 1

    def test_they_cut_the_loss_into_equal_parts(self):
        curve = Curve([0, 0.1, 0.5, 1], [9, 2, 0.5, 1])
        times = LossDensity(curve)(Linear(), 20)
        parts = curve.cumulative(torch.cat([times, times.new_zeros(1)])).diff() / curve.total
        torch.testing.assert_close(parts, torch.full_like(parts, -1 / 20))

    def test_a_constant_loss_gives_even_times(self):
        times = LossDensity(Curve([0], [1]))(Linear(), 4)
        assert times.tolist() == pytest.approx([1, 0.75, 0.5, 0.25])
