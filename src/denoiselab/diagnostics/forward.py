"""What noise does to the data: real samples along the schedule, and the schedule itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from denoiselab.diagnostics.base import Diagnostic, Finding
from denoiselab.diagnostics.figure import COLOURS, GREY, render, sheet
from denoiselab.diagnostics.subject import Subject
from denoiselab.pictures import captioned, panels, stacked, tiles
from denoiselab.rng import Noise


class ForwardNoising(Diagnostic):
    """x_t = alpha_t x_0 + sigma_t eps of held-out samples, a row per t; and alpha_t, sigma_t and log_snr over t.

    What a trajectory of a sampler is to be compared with: at t = 1/2 of many schedules real samples look like noise
    too. Table: t, alpha_t, sigma_t, log_snr, and the standard deviation of x_t, measured and as
    sqrt(alpha_t^2 m + sigma_t^2) says, m being the mean square of x_0.

    Args:
        times: where to look, in [0, 1].
        n: held-out samples in a row; points take 100 times as many.
    """

    def __init__(
        self,
        times: Sequence[float] = (0, 0.25, 0.5, 0.75, 1),
        n: int = 10,
        every: int = 1_000_000,
        budget: str | None = "5%",
    ):
        super().__init__(every, budget)
        if n < 1:
            raise ValueError(f"n={n}: need at least 1")
        if not times or not all(0 <= t <= 1 for t in times):
            raise ValueError(f"times={list(times)}: need times in [0, 1]")
        self.times, self.n = [float(t) for t in times], n

    def look(self, subject: Subject) -> Finding:
        flat = len(subject.data.shape) == 1
        batch = subject.real(100 * self.n if flat else self.n)
        x_0 = batch["x_0"].to(subject.device)
        eps = Noise(subject.seed, batch["id"].tolist(), subject.data.shape, subject.device)()
        mean_square = x_0.double().square().mean().item()
        rows, columns = [], {name: [] for name in ("t", "alpha_t", "sigma_t", "log_snr", "std_x_t", "std_expected")}
        for t in self.times:
            at = torch.tensor(t, dtype=torch.float64, device=subject.device)
            alpha_t, sigma_t = (level.item() for level in subject.schedule(at))
            x_t = alpha_t * x_0 + sigma_t * eps
            rows.append((x_t if flat else subject.decode(x_t)).float().cpu())
            values = (t, alpha_t, sigma_t, subject.schedule.log_snr(at).item())
            spread = (x_t.double().square().mean().sqrt().item(), (alpha_t**2 * mean_square + sigma_t**2) ** 0.5)
            for name, value in zip(columns, (*values, *spread), strict=True):
                columns[name].append(value)
        grid = torch.linspace(0, 1, 201, dtype=torch.float64, device=subject.device)
        alpha, sigma = subject.schedule(grid)
        curves = {"t": grid, "alpha_t": alpha, "sigma_t": sigma, "log_snr": subject.schedule.log_snr(grid)}
        return Finding(
            table=columns,
            protocol=subject.protocol(len(x_0), sampled=False),
            facts={name: values.tolist() for name, values in curves.items()},
            tensors={"x_t": torch.stack(rows)},
        )

    def draw(self, finding: Finding) -> Image.Image:
        x_t, facts, times = finding.tensors["x_t"], finding.facts, finding.table["t"]
        captions = [f"t = {t:g}" for t in times]
        if x_t.ndim == 3:
            strip = panels([*x_t], captions, unit="diffused units")
        else:
            strip = captioned([tiles(row, len(row)) for row in x_t], captions, "held-out images, noised")
        figure, (levels, log_snr) = sheet(1, 2, 4.2, 2.9)
        for name, colour in (("alpha_t", COLOURS[0]), ("sigma_t", COLOURS[1])):
            levels.plot(facts["t"], facts[name], color=colour, label=name)
        levels.set(xlabel="t (0 data, 1 noise)", ylabel="level", title="the schedule")
        levels.legend()
        log_snr.plot(facts["t"], facts["log_snr"], color=COLOURS[0])
        log_snr.axhline(0, color=GREY, linewidth=0.8)
        log_snr.set(xlabel="t (0 data, 1 noise)", ylabel="log SNR (nats)", title="log(alpha_t²/sigma_t²)")
        return stacked([strip, render(figure)])
