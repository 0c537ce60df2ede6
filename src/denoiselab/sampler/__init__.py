"""Samplers: from noise to data along any schedule."""

from denoiselab.sampler.base import Rung, Sampler, State, Walk
from denoiselab.sampler.consistency import Consistency
from denoiselab.sampler.ddim import DDIM, DDPM, LearnedDDPM
from denoiselab.sampler.dpm_solver import DPMSolver2, DPMSolver2M, DPMSolver3, DPMSolver3M, DPMSolver3MCorrected
from denoiselab.sampler.dpmpp import DPMpp2M, DPMpp2S, DPMpp3M, DPMpp3MCorrected
from denoiselab.sampler.dpmpp_sde import DPMpp2MSDE, DPMpp3MSDE, DPMppSDE
from denoiselab.sampler.edm import EDMStochastic
from denoiselab.sampler.heun import FlowHeun, Heun
from denoiselab.sampler.inversion import invert
from denoiselab.sampler.linear_multistep import AB4, PNDM
from denoiselab.sampler.loss_density import LossDensity
from denoiselab.sampler.rk45 import RK45
from denoiselab.sampler.spacing import Karras, Leading, Linspace, LogSNR, Quadratic, Spacing, Trailing
from denoiselab.sampler.unipc import UniPC, UniPCB1

__all__ = [
    "AB4",
    "DDIM",
    "DDPM",
    "PNDM",
    "RK45",
    "Consistency",
    "DPMSolver2",
    "DPMSolver2M",
    "DPMSolver3",
    "DPMSolver3M",
    "DPMSolver3MCorrected",
    "DPMpp2M",
    "DPMpp2MSDE",
    "DPMpp2S",
    "DPMpp3M",
    "DPMpp3MCorrected",
    "DPMpp3MSDE",
    "DPMppSDE",
    "EDMStochastic",
    "FlowHeun",
    "Heun",
    "Karras",
    "Leading",
    "LearnedDDPM",
    "Linspace",
    "LogSNR",
    "LossDensity",
    "Quadratic",
    "Rung",
    "Sampler",
    "Spacing",
    "State",
    "Trailing",
    "UniPC",
    "UniPCB1",
    "Walk",
    "invert",
]
