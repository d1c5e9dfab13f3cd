"""The published models by their published names, and all others that timm has, on timm's architectures.

Importing this package registers the published names with timm, so that
`timm.create_model("vit_deit_small_patch16_224")` works.
"""

from models.checkpoint import LoadReport, check_finite, fit_state, head_classes, load_weights, read_state
from models.download import fetch, official_file
from models.errors import CheckpointError, InputSizeError, UnknownModelError
from models.layouts import StateDict, convert
from models.names import bare_name, entry_of, full_name
from models.reading import Read, read_file, read_official
from models.registry import Size, create, register
from models.shapes import shapes_alone
from models.supported import supported_names
from models.zoo import ZOO, ModelEntry, lookup

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
    "convert",
    "create",
    "entry_of",
    "fetch",
    "fit_state",
    "full_name",
    "head_classes",
    "load_weights",
    "lookup",
    "official_file",
    "read_file",
    "read_official",
    "read_state",
    "register",
    "shapes_alone",
    "supported_names",
]
