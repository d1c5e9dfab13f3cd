"""Google's ViTs as NumPy archives: timm's models read them themselves."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from models.download import first_line
from models.errors import CheckpointError
from models.layouts import COMPRESSION_PREFIX, StateDict

SUFFIX = ".npz"
HEAD = "head/bias"
SHOWN = 3
# What NumPy and timm raise on files that are damaged, or of another model.
UNREADABLE = (
    *(OSError, EOFError, KeyError, ValueError, RuntimeError, AttributeError, TypeError, IndexError),
    *(AssertionError, zipfile.BadZipFile),
)


def is_numpy_file(path: str | Path) -> bool:
    """Whether a file is such an archive, by its name."""
    return Path(path).suffix == SUFFIX


def read_numpy(path: Path, model: nn.Module) -> StateDict:
    """The tensors of an archive under timm's names, at the input's size of `model`, which they are read into.

    Raises:
        CheckpointError: the file is missing, damaged, or not one of such a model.
    """
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path}: no such file")
    reader: Any = model
    if not hasattr(model, "load_pretrained"):
        raise CheckpointError(
            f"checkpoint {path}: timm's {type(model).__name__} reads no {SUFFIX} files; "
            "accepted: a file of torch.save with plain tensors, or safetensors"
        )
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"checkpoint {path}: found no NumPy archive; accepted: one of numpy.savez")
    try:
        reader.reset_classifier(_classes(path))  # a head is read where it has as many classes as the model's
        read = {name: value for name, value in model.named_parameters() if not name.startswith(COMPRESSION_PREFIX)}
        with torch.no_grad():
            for parameter in read.values():
                parameter.fill_(math.nan)  # what is not in the file shows
        reader.load_pretrained(str(path))
    except UNREADABLE as error:
        reason = first_line(error)
        raise CheckpointError(f"checkpoint {path}: cannot be read into {type(model).__name__} ({reason})") from error
    missing = [name for name, parameter in read.items() if parameter.isnan().any()]
    if missing:
        raise CheckpointError(f"checkpoint {path} does not fit the model: no numbers for {', '.join(missing[:SHOWN])}")
    return model.state_dict()


def _classes(path: Path) -> int:
    """The number of classes of the archive's head, 0 where it has none."""
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        name = next((name for name in arrays.files if name == HEAD or name.endswith(f"/{HEAD}")), None)
        return 0 if name is None else arrays[name].shape[-1]
