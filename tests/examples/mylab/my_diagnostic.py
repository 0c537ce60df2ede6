"""A diagnostic of one's own."""

import torch
from PIL import Image

from denoiselab.diagnostics import Diagnostic, Finding, Subject
from denoiselab.diagnostics.figure import COLOURS, GREY, render, sheet
from denoiselab.rng import Noise


class Contrast(Diagnostic):
    """E|x_0_hat|^2 over t; for the exact x_0_hat = E[x_0 | x_t] it is E|x_0|^2 - E|x_0_hat - x_0|^2."""

    @torch.no_grad()
    def look(self, subject: Subject) -> Finding:
        batch, device = subject.real(256), subject.device
        x_0, cond = batch["x_0"].to(device), {name: value.to(device) for name, value in batch["cond"].items()}
        eps = Noise(subject.seed, batch["id"].tolist(), subject.data.shape, device)()
        table = {"t": torch.linspace(0.05, 0.95, 10).tolist(), "measured": [], "expected": []}
        for t in table["t"]:
            alpha_t, sigma_t = subject.schedule(torch.full((len(x_0), *[1] * (x_0.ndim - 1)), t, device=device))
            x_0_hat = subject.denoiser(alpha_t * x_0 + sigma_t * eps, alpha_t, sigma_t, **cond)
            table["measured"].append(x_0_hat.square().mean().item())
            table["expected"].append((x_0.square().mean() - (x_0_hat - x_0).square().mean()).item())
        return Finding(table, subject.protocol(len(x_0), sampled=False))

    def draw(self, finding: Finding) -> Image.Image:
        figure, (axis,) = sheet(width=6)
        axis.plot(finding.table["t"], finding.table["expected"], color=GREY, label="of an exact estimate")
        axis.plot(finding.table["t"], finding.table["measured"], color=COLOURS[0], label="measured")
        axis.set(xlabel="t (0 data, 1 noise)", ylabel="mean square of x_0_hat", title="contrast of the estimate")
        axis.legend()
        return render(figure)
