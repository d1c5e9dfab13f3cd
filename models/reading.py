"""The weights of an entry, wherever they are, in the form of the model that they are for."""

from __future__ import annotations

from typing import Any, NamedTuple

from models.checkpoint import local_file, read_noted
from models.download import official_file
from models.layouts import StateDict, convert, resampled
from models.numpy_files import is_numpy_file, read_numpy
from models.registry import Size, create
from models.shapes import shapes_alone
from models.timm_weights import timm_state
from models.zoo import ModelEntry, TimmWeights


class Read(NamedTuple):
    """Tensors under timm's names and at the input's size, and as they were found; what to call them in messages; a note
    on where in the file they were, and on each thing that was adapted."""

    state: StateDict
    found: StateDict
    name: str
    notes: tuple[str, ...] = ()


def read_official(entry: ModelEntry, input_size: Size, bar: bool = True) -> Read:
    """The published weights of an entry, downloaded on first use.

    Raises:
        CheckpointError: there are none, or they cannot be had.
    """
    if isinstance(entry.weights, TimmWeights):
        found, notes, name = timm_state(entry.weights, bar), [], entry.name
    else:
        path = official_file(entry, bar)
        name = str(path)
        (found, _), notes = read_noted(path, name), []  # a published file has its weights in one place
    return _read(found, notes, entry, input_size, name, entry.input_size)


def read_file(entry: ModelEntry, source: str, input_size: Size, bar: bool = True, made_at: Size | None = None) -> Read:
    """The weights in a file, or at a URL.

    They were made for images of `made_at`. Where nobody knows, it is taken to be `input_size` if they have as
    many positions as the model has there, and else the entry's own size.

    Raises:
        CheckpointError: the file is missing or unreadable, or of another model.
    """
    path = local_file(source, bar)
    if is_numpy_file(path):
        # Read for another grid of as many positions, timm would leave them as they are: oblong ones come after.
        made_at = input_size if input_size[0] == input_size[1] else entry.input_size
        found, notes = read_numpy(path, create(entry, made_at))
    else:
        found, notes = read_noted(path, source)
    return _read(found, notes, entry, input_size, source, made_at)


def _read(
    found: StateDict, notes: list[str], entry: ModelEntry, input_size: Size, name: str, made_at: Size | None
) -> Read:
    """`found` as the entry's model at `input_size` has its tensors."""
    with shapes_alone():
        model: Any = create(entry, input_size)
    positions, own = found.get("pos_embed"), dict(model.named_parameters()).get("pos_embed")
    if made_at is None:
        fits = positions is not None and own is not None and positions.shape == own.shape
        made_at = input_size if fits else entry.input_size
    model.pretrained_model_args = {"img_size": made_at}  # where timm looks for the source's size
    state = convert(found, model, name)
    return Read(state, found, name, (*notes, *resampled(found, state, name)))
