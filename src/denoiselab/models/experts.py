"""A network per interval of noise levels, behind the call of one."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from denoiselab.models.embedding import LogSNR, NoiseEmbedding
from denoiselab.models.layers import require


class Experts(nn.Module):
    """net_k(x, c_noise, ...) where edge_k <= log_snr < edge_{k+1}: one expert per interval of noise levels (eDiff-I,
    Balaji et al. 2022, arXiv:2211.01324, section 4).

    A sample costs one expert, however many there are: a batch is sorted by expert, and each is called on its own rows.
    That needs the numbers of rows on the host, one wait for the device per call; it keeps what is compiled to the
    experts' own units; and an optimizer step, the EMA and memory grow with the number of experts. Training also calls
    an expert that no sample of the batch needs, on one row whose result is dropped: its gradient is zero rather than
    missing, on which all ranks agree. On the meta device, where there are no levels, the first takes all rows.

    Experts may differ in kind and in size. The paper starts them from one network that was trained on all levels:
    ``experts.load_state_dict(experts.repeated(net.state_dict()))``.

    Args:
        shape: one sample's shape.
        experts: a constructor of a network per interval, by name, from noise to data. Each gets those of the other
            arguments that it names.
        edges: log-SNRs between the intervals, in nats, rising, one fewer than experts. An edge belongs to the cleaner
            side; the first and the last interval have no end.
        num_classes, vector, low_res, embedding, outputs: as for each network.
    """

    def __init__(
        self,
        shape: Sequence[int],
        experts: Mapping[str, Callable[..., nn.Module]],
        edges: Sequence[float],
        num_classes: int = 0,
        vector: int = 0,
        low_res: int = 0,
        embedding: NoiseEmbedding | None = None,
        outputs: int = 1,
    ):
        super().__init__()
        rising = all(a < b for a, b in zip([-math.inf, *edges], [*edges, math.inf], strict=True))
        fit = rising and len(edges) == len(experts) - 1
        require("edges", list(edges), fit, f"rising log-SNRs, one fewer than the {len(experts)} experts")
        shared = {"shape": tuple(shape), "num_classes": num_classes, "vector": vector, "low_res": low_res}
        shared |= {"embedding": embedding, "outputs": outputs}
        told = isinstance(embedding, LogSNR | None) or any("embedding" in _named(make) for make in experts.values())
        require("embedding", type(embedding).__name__, told, "an expert that takes an embedding")
        self.edges = [float(edge) for edge in edges]
        self.experts = nn.ModuleDict({name: _made(name, make, shared) for name, make in experts.items()})

    @property
    def units(self) -> list[nn.Module]:
        """The experts' own units, in order."""
        return [unit for expert in self.experts.values() for unit in getattr(expert, "units", [])]

    def repeated(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict in which every expert has the weights of one network.

        Args:
            state: that network's state dict.
        """
        return {f"experts.{name}.{key}": value for name in self.experts for key, value in state.items()}

    def route(self, c_noise: Tensor) -> Tensor:
        """The number of each sample's expert, (B,)."""
        log_snr = -8 * c_noise.double()
        return sum((log_snr >= edge for edge in self.edges), torch.zeros_like(c_noise, dtype=torch.int64))

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None, **cond: Tensor | None) -> Tensor:
        given = {key: value for key, value in {"label": label, **cond}.items() if value is not None}
        experts = [*self.experts.values()]
        if x.is_meta:
            return experts[0](x, c_noise, **given)
        choice = self.route(c_noise)  # (B,)
        order = choice.argsort(stable=True)
        counts = (
            (choice[:, None] == torch.arange(len(experts), device=x.device)).sum(0).tolist()
        )  # waits for the device
        answers = []
        for expert, rows in zip(experts, order.split(counts), strict=True):
            if len(rows) or self.training or _on_several_ranks():
                some = rows if len(rows) else order[:1]
                y = expert(x[some], c_noise[some], **{key: value[some] for key, value in given.items()})
                answers.append(y[: len(rows)])
        return torch.cat(answers)[order.argsort()]  # (B, outputs C, ...)


def _on_several_ranks() -> bool:
    """Whether weights may be sharded, so that all ranks must call the same networks."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _named(make: Callable[..., nn.Module]) -> Mapping[str, inspect.Parameter]:
    """The arguments that a constructor takes."""
    return inspect.signature(make).parameters


def _made(name: str, make: Callable[..., nn.Module], shared: dict[str, object]) -> nn.Module:
    """The expert, told what it names of the shared arguments."""
    known = _named(make)
    for key in ("num_classes", "vector", "low_res", "outputs"):
        if key not in known and shared[key] != (key == "outputs"):
            raise ValueError(f"experts.{name}: need a network with an argument {key}, here {shared[key]}")
    try:
        return make(**{key: value for key, value in shared.items() if key in known})
    except ValueError as error:
        raise ValueError(f"experts.{name}.{error}") from error
