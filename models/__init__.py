"""The published models by their published names, on timm's architectures.

Importing this package registers the names with timm, so that
`timm.create_model("vit_deit_small_patch16_224")` works.
"""

from models.checkpoint import LoadReport, StateDict, check_finite, fit_state, head_classes, load_weights, read_state
from models.download import fetch, official_file
from models.errors import CheckpointError, InputSizeError
from models.registry import create, register
from models.zoo import ZOO, ModelEntry, UnknownModelError, lookup

register(ZOO)

__all__ = [
    "ZOO",
    "CheckpointError",
    "InputSizeError",
    "LoadReport",
    "ModelEntry",
    "StateDict",
    "UnknownModelError",
    "check_finite",
    "create",
    "fetch",
    "fit_state",
    "head_classes",
    "load_weights",
    "lookup",
    "official_file",
    "read_state",
]
