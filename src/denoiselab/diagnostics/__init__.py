"""Looks at a model: each leaves a picture, the data behind it, and what it says of the model's health."""

from denoiselab.diagnostics.base import Diagnostic, Finding
from denoiselab.diagnostics.forward import ForwardNoising
from denoiselab.diagnostics.subject import Subject

__all__ = [
    "Diagnostic",
    "Finding",
    "ForwardNoising",
    "Subject",
]
