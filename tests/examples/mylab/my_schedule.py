"""A noise schedule of one's own."""

from torch import Tensor

from denoiselab.schedule import Schedule


class Power(Schedule):
    """log_snr = high - (high - low) t^power, variance preserving.

    Args:
        power: >= 1; larger stays longer at the clean end.
        high, low: log-SNR at t = 0 and t = 1, in nats.
    """

    def __init__(self, power: float = 1.0, high: float = 10.0, low: float = -10.0):
        super().__init__()
        if not power >= 1:
            raise ValueError(f"power={power}: need a number >= 1")
        if not low < high:
            raise ValueError(f"low={low}: need a number below high={high}")
        self.power, self.high, self.low = power, high, low

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_snr = self.high - (self.high - self.low) * t**self.power
        return log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
