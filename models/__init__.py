"""The published models by their published names, and all others that timm has, on timm's architectures.

Importing this package registers the published names with timm, so that
`timm.create_model("vit_deit_small_patch16_224")` works.
"""

# ruff: noqa: F401
from models.names import bare_name, create, entry_of, full_name, supported_names
from models.weights import (
    Read,
    StateDict,
    fetch,
    fit_state,
    head_classes,
    load_weights,
    official_file,
    read_file,
    read_official,
)
from models.zoo import ZOO, CheckpointError, InputSizeError, ModelEntry, Size, UnknownModelError
