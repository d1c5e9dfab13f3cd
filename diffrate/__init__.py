"""DiffRate: compress the tokens of pretrained Vision Transformers (arXiv 2305.17997)."""

from diffrate import patch
from diffrate.block import UnsupportedModelError
from diffrate.patch import CompressedModel
from diffrate.rate import RateError
from diffrate.schedule import Schedule, ScheduleError
from diffrate.tokens import TokenState
from diffrate.visualize import VisualizationError, make_visualization

__all__ = [
    "CompressedModel",
    "RateError",
    "Schedule",
    "ScheduleError",
    "TokenState",
    "UnsupportedModelError",
    "VisualizationError",
    "make_visualization",
    "patch",
]
