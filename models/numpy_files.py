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
from models.layouts import COMPRESSION_PREFIX, StateDict, check_patches

SUFFIX = ".npz"
HEAD, PATCHES, POSITIONS = "head/bias", "embedding/kernel", "pos_embedding"
SHOWN = 3
# What NumPy and timm raise on files that are damaged, or of another model.
UNREADABLE = (
    *(OSError, EOFError, KeyError, ValueError, RuntimeError, AttributeError, TypeError, IndexError),
    *(AssertionError, zipfile.BadZipFile),
)


def is_numpy_file(path: str | Path) -> bool:
    """Whether a file is such an archive, by its name."""
    return Path(path).suffix == SUFFIX


def read_numpy(path: Path, model: nn.Module) -> tuple[StateDict, list[str]]:
    """The tensors of an archive under timm's names, at the input's size of `model`, which they are read into; and a
    note on positions that were interpolated for it, if any.

    Raises:
        CheckpointError: the file is missing, damaged, or not one of such a model, or for patches of another size.
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
        head, patches, positions = (_shape(path, name) for name in (HEAD, PATCHES, POSITIONS))
        if len(patches) == 4:  # rows, columns, channels, width
            check_patches(patches[:2], model, str(path))
        reader.reset_classifier(head[-1] if head else 0)  # read where it has as many classes as the model's
        read = {name: value for name, value in model.named_parameters() if not name.startswith(COMPRESSION_PREFIX)}
        with torch.no_grad():
            for parameter in read.values():
                parameter.fill_(math.nan)  # what is not in the file shows
        reader.load_pretrained(str(path))
    except CheckpointError:
        raise
    except UNREADABLE as error:
        reason = first_line(error)
        raise CheckpointError(f"checkpoint {path}: cannot be read into {type(model).__name__} ({reason})") from error
    missing = [name for name, parameter in read.items() if parameter.isnan().any()]
    if missing:
        raise CheckpointError(f"checkpoint {path} does not fit the model: no numbers for {', '.join(missing[:SHOWN])}")
    state = model.state_dict()
    own, notes = state.get("pos_embed"), []
    if own is not None and len(positions) == 3 and positions[1] != own.shape[1]:
        notes.append(f"{path}: positions resampled, {list(positions)} to {list(own.shape)}")
    return state, notes


def _shape(path: Path, ending: str) -> tuple[int, ...]:
    """That of the archive's array whose name is, or ends in, `ending`; of no dimensions where there is none."""
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        name = next((name for name in arrays.files if name == ending or name.endswith(f"/{ending}")), None)
        return () if name is None else arrays[name].shape
