"""The published models by their published names, and all others that timm has, on timm's architectures.

Importing this package registers the published names with timm, so that
`timm.create_model("vit_deit_small_patch16_224")` works.
"""

from models.build import create, register, shapes_alone
from models.download import fetch, official_file
from models.names import bare_name, entry_of, full_name, supported_names
from models.weights import (
    LoadReport,
    Read,
    StateDict,
    check_finite,
    fit_state,
    head_classes,
    load_weights,
    read_file,
    read_official,
    read_state,
)
from models.zoo import ZOO, CheckpointError, InputSizeError, ModelEntry, Size, UnknownModelError

register(ZOO)

__all__ = [
    "ZOO",
    "CheckpointError",
    "InputSizeError",
    "LoadReport",
    "ModelEntry",
    "Read",
    "Size",
    "StateDict",
    "UnknownModelError",
    "bare_name",
    "check_finite",
    "create",
    "entry_of",
    "fetch",
    "fit_state",
    "full_name",
    "head_classes",
    "load_weights",
    "official_file",
    "read_file",
    "read_official",
    "read_state",
    "shapes_alone",
    "supported_names",
]
