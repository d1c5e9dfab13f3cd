"""Weights in every layout that timm knows: fetched, read for a timm model, dense or patched, and copied into one."""

from __future__ import annotations

import copy
import inspect
import logging
import math
import re
import socket
import sys
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import huggingface_hub
import numpy as np
import timm
import torch
from huggingface_hub.utils import disable_progress_bars
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import build_model_with_cfg, clean_state_dict, is_model, model_entrypoint
from torch import Tensor, nn
from torch.serialization import safe_globals

from diffrate.atomic import UNREADABLE as UNREADABLE_BY_TORCH
from diffrate.atomic import check_unpacked, first_line, holds_weights, load_tensors, refuse_pipe
from diffrate.hub import answers, hub_or_cache
from models.zoo import HUB_SITE, CheckpointError, ModelEntry, OfficialWeights, Size

StateDict = dict[str, Tensor]
SHOWN = 3  # names of each kind in a message
MOST_WRAPPERS = 8  # words around the tensors, one in another
LEAST_REPEATED = 2**20  # bytes of a tensor, up to which it may repeat numbers
# What a patched model adds to its state: absent from official files, skipped for dense models.
COMPRESSION_PREFIX = "compression."
# The last layers of the classifiers in each layout: ViTs, with a distilled one's second; timm's CAFormer; the original
# CAFormer. The first that is there says how many classes there are.
CLASSIFIERS = ("head.weight", "head_dist.weight", "head.fc.fc2.weight", "head.fc2.weight")
# The errors of safetensors, NumPy and timm, too, on files that are cut short, damaged or something else.
UNREADABLE = (*UNREADABLE_BY_TORCH, AssertionError, SafetensorError, zipfile.BadZipFile)
# Words that tensors stand under, in timm's order, the averaged ones first; then those of BEiT v2 and I-JEPA.
WRAPPERS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "state_dict", "model", "module", "encoder")
POOLING = "attn_pool."  # files have it, and a model may be built without: timm leaves it out, too
POSITIONS = ("pos_embed", "relative_position_bias_table")
NUMPY = ".npz"  # Google's ViTs
CONVERTER = "checkpoint_filter_fn"  # timm's name for what converts, in the file of each family
TIMM = "timm.models."
# Positions of another input size are interpolated as the weights were trained, which timm tells by the name.
BILINEAR = ("flexi", "radio")
ALIGNED_CORNERS = ("base_patch16_radio_v3", "huge_patch16_radio_v3")
# From timm 1.0.31 on. Before, it takes all positions for a square's, and leaves as many as the model has as they are.
HEARS_OF_SIZES = "pretrained_model_args" in inspect.signature(build_model_with_cfg).parameters
FLEXIBLE = "flexi"  # trained on patches of many sizes: those of another are interpolated
# torch.hub checks a download against the first hex digits of its SHA-256 when the name carries them.
HASH_IN_NAME = re.compile(r"-([a-f0-9]{8,})\.")
CONNECT_SECONDS = 30
log = logging.getLogger(__name__)
progress = logging.getLogger("progress")  # --quiet silences it


class Read(NamedTuple):
    """What a file holds for a model.

    state: tensors under timm's names and at the input's size. found: the same as they stand in the file. name: what
    messages call them. notes: where in the file they were, and what was adapted.
    """

    state: StateDict
    found: StateDict
    name: str
    notes: tuple[str, ...] = ()


class LoadReport(NamedTuple):
    """What loading did besides copying: the names of fresh tensors, and notes for the log."""

    reinitialized: tuple[str, ...]
    notes: tuple[str, ...]


def load_weights(model: nn.Module, path_or_url: str | Path) -> LoadReport:
    """Copy the weights of a checkpoint into `model`, whatever layout the file has.

    Reads what timm's converter of the model's family reads: official files of DeiT and DeiT III, MAE, CAFormer, BEiT,
    EVA, CLIP, DINOv2 and others, timm's own, safetensors, the NumPy archives (`.npz`) of Google's ViTs, and what
    this project saves. A head with another number of classes keeps the model's fresh weights, and position
    embeddings and tables of relative positions of another size are interpolated; the report and the log say so.

    Raises:
        CheckpointError: the file is missing or unreadable, or does not fit the model.
    """
    read = read_file(str(path_or_url), model)
    fresh, notes = fit_state(model, read.state, read.name)
    report = LoadReport(fresh, (*notes, *read.notes))
    for note in report.notes:
        log.info(note)
    return report


def read_official(entry: ModelEntry, model: nn.Module, bar: bool = True) -> Read:
    """The published weights of an entry, downloaded on first use, for `model`, the entry's at any input's size.

    Raises:
        CheckpointError: there are none, or they cannot be had.
    """
    if isinstance(entry.weights, str):
        found, name = timm_state(entry.name, entry.weights, bar), entry.name
    else:
        name = str(official_file(entry, bar))
        found, _ = _tensors(Path(name), name)  # a published file has its weights in one place
    return _converted(found, [], model, name, entry.input_size)


def read_file(
    source: str,
    model: nn.Module,
    size: Size | None = None,
    own: Size | None = None,
    made_at: Size | None = None,
    bar: bool = True,
) -> Read:
    """The weights in a file, or at a URL, for `model` at an input of `size`; its tensors need no storage.

    They were made for images of `made_at`. Where unknown, that is taken to be `size` if they have as many positions
    as the model has there, and else the model's `own` size; without `own`, what timm takes it to be.

    Raises:
        CheckpointError: the file is missing or unreadable, or of another model.
    """
    path = fetch(source, bar) if source.startswith(("http://", "https://")) else Path(source).expanduser()
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path}: no such file")
    if path.suffix == NUMPY:
        if own is not None and size is not None:
            # Read for another grid of as many positions, timm would leave them as they are: oblong ones come after.
            made_at = size if size[0] == size[1] else own
        return _converted(*_numpy_tensors(path, copy.deepcopy(model), made_at), model, source, made_at)
    found, notes = _tensors(path, source)
    if made_at is None:
        theirs, ours = found.get("pos_embed"), dict(model.named_parameters()).get("pos_embed")
        made_at = size if theirs is not None and ours is not None and theirs.shape == ours.shape else own
    return _converted(found, notes, model, source, made_at)


def fit_state(model: nn.Module, state: StateDict, name: str, fresh_head: bool = False) -> LoadReport:
    """Copy tensors under timm's names, as in `Read`, into `model`; `name` stands for them in messages.

    With `fresh_head`, tensors without any head leave the model's as it is.

    Raises:
        CheckpointError: the tensors do not fit the model.
    """
    expected = model.state_dict()
    optional = {key for key in expected if key.startswith(COMPRESSION_PREFIX)}
    # What this project saves has buffers that timm computes by itself, at this size of images.
    left_out = {key for key, _ in model.named_buffers()} - expected.keys()
    if not optional:
        left_out |= {key for key in state if key.startswith(COMPRESSION_PREFIX)}
    notes: list[str] = []
    fresh: list[str] = []
    pooling = {key for key in state if key.startswith(POOLING)}
    if pooling and not any(key.startswith(POOLING) for key in expected):
        left_out |= pooling
        notes.append(f"{name}: the pooling {POOLING}* is left out, which the model has not")
    headless = fresh_head and head_classes(state) is None
    for weight in CLASSIFIERS:
        ours, theirs = (tensors[weight].shape if weight in tensors else None for tensors in (expected, state))
        if ours and (headless or (theirs and theirs[0] != ours[0] and theirs[1:] == ours[1:])):
            fresh += [key for key in (weight, weight.removesuffix("weight") + "bias") if key in {*expected, *state}]
    if fresh:
        why = "there is no head" if headless else "the head has another number of classes"
        notes.append(f"{name}: {why}; {', '.join(fresh)} start fresh")
    found = {key: value for key, value in state.items() if key not in left_out.union(fresh)}
    wanted, given = ({key: list(value.shape) for key, value in tensors.items()} for tensors in (expected, found))
    unchecked = optional.union(fresh)
    wrong = [key for key in {**given, **wanted} if key not in unchecked and given.get(key) != wanted.get(key)]
    if wrong:
        wrong.sort(key=lambda key: (key not in wanted, key not in given))  # other shapes, missing, unexpected
        rows = [f"{key} expected {wanted.get(key, 'nothing')} found {given.get(key, 'nothing')}" for key in wrong]
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise CheckpointError(f"checkpoint {name} does not fit the model: {'; '.join(rows[:SHOWN])}{more}")
    model.load_state_dict(found, strict=False)
    return LoadReport(tuple(fresh), tuple(notes))


def head_classes(state: StateDict) -> int | None:
    """The number of classes of a checkpoint's head, None when it has no head."""
    return next(
        (state[key].shape[0] for key in CLASSIFIERS if key in state and state[key].ndim and len(state[key])), None
    )


def _tensors(path: Path, name: str) -> tuple[StateDict, list[str]]:
    """The tensors of a file called `name` under their own names, unwrapped, and notes on where in the file they were.

    Averaged weights (`model_ema`) go before the plain ones when a file has both, as in timm.
    """
    try:
        with safe_globals([Namespace]):  # official files hold their flags
            refuse_pipe(path)
            safe = path.suffix == ".safetensors"
            content: Any = load_file(path) if safe else load_tensors(path)
    except UNREADABLE as error:
        raise CheckpointError(
            f"checkpoint {path}: cannot be read, cut short or not a checkpoint ({first_line(error)}); "
            "accepted: a file of torch.save with plain tensors, safetensors, or for Google's ViTs .npz"
        ) from error
    notes: list[str] = []
    while isinstance(content, dict) and (words := [word for word in WRAPPERS if _holds(content, word)]):
        if len(notes) == MOST_WRAPPERS:
            raise CheckpointError(f"checkpoint {path}: found {words[0]!r} in itself; accepted: a state dict")
        others = f", not {', '.join(map(repr, words[1:]))}" if len(words) > 1 else ""
        notes.append(f"{name}: weights read from {words[0]!r}{others}")
        content = content[words[0]]
    found = content if isinstance(content, dict) else {}
    named = {key: value for key, value in found.items() if isinstance(value, Tensor) and isinstance(key, str)}
    named.pop("n_averaged", None)  # how many torch's AveragedModel, which calls its weights `module.`, has averaged
    tensors, size = clean_state_dict(named), path.stat().st_size
    if not tensors:
        raise CheckpointError(f"checkpoint {path}: found no tensors; accepted: a state dict, alone or under 'model'")
    for key, value in tensors.items():
        # Sparse ones, and those that repeat few numbers, take far more memory than they have in the file.
        if value.layout != torch.strided or value.numel() * value.element_size() > max(2 * size, LEAST_REPEATED):
            kind = "sparse tensor" if value.layout != torch.strided else f"tensor of {list(value.shape)}"
            raise CheckpointError(f"checkpoint {path}: {key}: found a {kind}; accepted: one with all its numbers")
    # Words that all names begin with, such as `model.` or `backbone.`: a training framework or another module held the
    # model, which has parts of several names itself.
    while len(tensors) > 1 and all("." in key for key in tensors) and len({key.split(".")[0] for key in tensors}) == 1:
        tensors = {key.partition(".")[2]: value for key, value in tensors.items()}
    return tensors, notes


def _holds(content: dict[Any, Any], word: str) -> bool:
    return isinstance(content.get(word), dict) and bool(content[word])


def _numpy_tensors(path: Path, model: Any, size: Size | None) -> tuple[StateDict, list[str]]:
    """The tensors of an archive as timm reads them into `model`, at an input of `size`, and a note on positions that
    were interpolated for it."""
    if not hasattr(model, "load_pretrained"):
        accepted = "a file of torch.save with plain tensors, or safetensors"
        kind = type(model).__name__
        raise CheckpointError(f"checkpoint {path}: timm's {kind} reads no {NUMPY} files; accepted: {accepted}")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"checkpoint {path}: found no NumPy archive; accepted: one of numpy.savez")
    try:
        check_unpacked(path)
        with np.load(path, allow_pickle=False) as arrays:
            head, kernel, positions = (
                next((arrays[name].shape for name in arrays.files if f"/{name}".endswith(f"/{ending}")), ())
                for ending in ("head/bias", "embedding/kernel", "pos_embedding")
            )
        if len(kernel) == 4:
            rows, columns, channels, width = kernel
            _check_patches([(width, channels, rows, columns)], model, str(path))
        if size is not None:
            # As timm has it: a patched model refuses it, and this copy is for its tensors alone.
            next(kind for kind in type(model).__mro__ if kind.__module__.startswith(TIMM)).set_input_size(model, size)
        model.reset_classifier(head[-1] if head else 0)  # read where it has as many classes as the model's
        model.to_empty(device="cpu")
        read = {name: value for name, value in model.named_parameters() if not name.startswith(COMPRESSION_PREFIX)}
        with torch.no_grad():
            for parameter in read.values():
                parameter.fill_(math.nan)  # what is not in the file shows
        model.load_pretrained(str(path))
    except CheckpointError:
        raise
    except UNREADABLE as error:
        reason = first_line(error)
        raise CheckpointError(f"checkpoint {path}: cannot be read into {type(model).__name__} ({reason})") from error
    missing = [name for name, parameter in read.items() if parameter.isnan().any()]
    if missing:
        raise CheckpointError(f"checkpoint {path} does not fit the model: no numbers for {', '.join(missing[:SHOWN])}")
    own, notes = read.get("pos_embed"), []
    if own is not None and len(positions) == 3 and positions[1] != own.shape[1]:
        notes = [f"{path}: positions resampled, {list(positions)} to {list(own.shape)}"]
    return {name: value.detach() for name, value in read.items()}, notes


def _converted(found: StateDict, notes: list[str], model: Any, name: str, made_at: Size | None) -> Read:
    """`found` under timm's names and at the input's size of `model`, trained at `made_at`; `name` starts messages."""
    _check_patches([value.shape for value in found.values()], model, name)
    _check_positions(model, made_at, name)
    if made_at is not None:
        model.pretrained_model_args = {"img_size": made_at}  # where timm looks for the source's size
    # timm's converters do not know our tensors, and some look every key up in the model.
    ours = {key: value for key, value in found.items() if key.startswith(COMPRESSION_PREFIX)}
    state = _convert({key: value for key, value in found.items() if key not in ours}, model, name) | ours
    expected = model.state_dict().keys()
    if not state.keys() & expected:
        names, accepted = (", ".join(list(keys)[:SHOWN]) for keys in (found, expected))
        told = f"found {names}, ...; accepted: {accepted}, ..."
        raise CheckpointError(f"checkpoint {name} does not fit the model: {told}")
    learned = {key for key, _ in model.named_parameters()}
    for key, value in state.items():
        if key in learned and not holds_weights(value):
            raise CheckpointError(f"checkpoint {name}: {key}: found {value.dtype}; accepted: floats of 16 bits or more")
        if holds_weights(value) and not bool(value.isfinite().all()):
            raise CheckpointError(f"checkpoint {name}: {key} holds NaN or infinite values; accepted: finite weights")
    held = {value.untyped_storage().data_ptr() for value in found.values()}
    made = [key for key in state if key.endswith(POSITIONS) and state[key].untyped_storage().data_ptr() not in held]
    if made:
        before = f" {list(found[made[0]].shape)}" if made[0] in found else ""
        more = f", and {len(made) - 1} more" if len(made) > 1 else ""
        notes = [*notes, f"{name}: positions resampled, {made[0]}{before} to {list(state[made[0]].shape)}{more}"]
    return Read(state, found, name, tuple(notes))


def _convert(tensors: StateDict, model: nn.Module, name: str) -> StateDict:
    """`tensors` as timm's converter gives them for `model`, called as by the function that builds its architecture."""
    architecture = _architecture(model)
    kinds = [kind for kind in type(model).__mro__ if kind.__module__.startswith(TIMM)]
    modules = [sys.modules[kind.__module__] for kind in kinds]
    if is_model(architecture):
        own = sys.modules[model_entrypoint(architecture).__module__]
        if any(getattr(own, kind.__name__, None) is kind for kind in kinds):  # it builds models of this class
            modules.insert(0, own)
    function: Any = next((getattr(module, CONVERTER) for module in modules if hasattr(module, CONVERTER)), None)
    if function is None:  # for relative positions before timm 1.0.31, which takes them as they are, too
        return tensors
    # What timm's builders give their converters beyond the tensors and the model.
    wanted: dict[str, Any] = {"adapt_layer_scale": True}  # DeiT III's names, which no other model has
    if any(word in architecture for word in BILINEAR):
        aligned = any(word in architecture for word in ALIGNED_CORNERS)
        wanted |= {"interpolation": "bilinear", "antialias": False, "align_corners": aligned}
    options = {name: wanted[name] for name in wanted.keys() & inspect.signature(function).parameters.keys()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, on how timm interpolates relative positions
            return dict(function(tensors, model, **options))
    except KeyError as error:
        raise CheckpointError(f"checkpoint {name} does not fit the model: unexpected {error.args[0]}") from error
    except UNREADABLE as error:
        told = f"timm does not read it as weights of {kinds[0].__name__} ({first_line(error)})"
        raise CheckpointError(f"checkpoint {name} does not fit the model: {told}") from error


def _architecture(model: nn.Module) -> str:
    """timm's name of a model's architecture, as far as the model knows it."""
    return str((getattr(model, "pretrained_cfg", None) or {}).get("architecture", ""))


def _check_positions(model: Any, made_at: Size | None, name: str) -> None:
    """Refuse positions made at a size of images that timm has to hear of, and cannot."""
    stem, config = getattr(model, "patch_embed", None), getattr(model, "pretrained_cfg", None) or {}
    if HEARS_OF_SIZES or stem is None or getattr(model, "pos_embed", None) is None:
        return
    (rows, columns), (own_rows, own_columns) = made_at or config.get("input_size", (3, 224, 224))[1:], stem.img_size
    ours = tuple(stem.grid_size)
    theirs = (rows * ours[0] // own_rows, columns * ours[1] // own_columns)
    if theirs != ours and (theirs[0] != theirs[1] or math.prod(theirs) == math.prod(ours)):
        raise CheckpointError(
            f"checkpoint {name}: positions for {rows} by {columns} pixels at {own_rows} by {own_columns} need timm "
            f"1.0.31; found {timm.__version__}"
        )


def _check_patches(shapes: Iterable[Sequence[int]], model: nn.Module, name: str) -> None:
    """Refuse tensors of these shapes for patches of another size than the model's, unless it was trained for any."""
    architecture, own = _architecture(model), getattr(getattr(model, "patch_embed", None), "proj", None)
    if not isinstance(own, nn.Conv2d) or FLEXIBLE in architecture:
        return
    # Whatever the layout, a kernel of patches has the model's width and channels.
    width, channels, own_rows, own_columns = own.weight.shape
    kernels = [tuple(shape[2:]) for shape in shapes if len(shape) == 4 and tuple(shape[:2]) == (width, channels)]
    if not kernels or (own_rows, own_columns) in kernels:
        return
    rows, columns = kernels[0]
    fitting = re.sub(r"patch\d+", f"patch{rows}", architecture)
    instead = f", or --model {fitting}" if is_model(fitting) else ""
    raise CheckpointError(
        f"checkpoint {name} does not fit the model: it is for patches of {rows} by {columns} pixels; "
        f"accepted: of {own_rows} by {own_columns}{instead}"
    )


def official_file(entry: ModelEntry, bar: bool = True) -> Path:
    """The official weights of an entry of the zoo as a local file, downloaded on first use.

    Raises:
        CheckpointError: there are none, or no source can be reached; the message names each source, and the path where
            the file may be put by hand.
    """
    if isinstance(entry.weights, Path):
        return entry.weights
    if not isinstance(entry.weights, OfficialWeights):
        raise CheckpointError(f"--model {entry.name}: has no pretrained weights; accepted: a file with --checkpoint")
    file, sources = entry.weights
    return _first_of(sources, file, bar, f"the weights of {entry.name}: tried ", "name one with --checkpoint")


def fetch(url: str, bar: bool = True) -> Path:
    """Download `url` into the checkpoint directory, once; the hash in its name is checked if there.

    Raises:
        CheckpointError: the URL cannot be reached or the hash differs.
    """
    try:
        name = Path(urlparse(url).path).name
        if name in ("", ".."):
            raise ValueError("found no file")
    except ValueError as error:
        raise CheckpointError(f"checkpoint {url}: {error}; accepted: a URL that ends in a file's name") from error
    return _first_of([url], name, bar, "", "give its path instead of the URL")


def timm_state(name: str, source: str, bar: bool = True) -> dict[str, Tensor]:
    """The tensors of a pretrained model as timm builds it, downloaded from `source` on first use.

    Raises:
        CheckpointError: they cannot be had; the message names the source and what to do.
    """
    try:
        if "://" in source:
            _check_answer(source, _checkpoints() / Path(urlparse(source).path).name)
        with downloading(source, bar), hub_or_cache() if source.startswith(HUB_SITE) else nullcontext():
            return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:
        remedy = "bring it into the Hugging Face cache (HF_HOME)" if source.startswith(HUB_SITE) else "connect"
        raise CheckpointError(
            f"cannot load the weights of {name}: tried {source} ({first_line(error)}). "
            f"To go on, {remedy}, or name a file with --checkpoint"
        ) from error


@contextmanager
def downloading(source: str, bar: bool = True) -> Iterator[None]:
    """Show a bar for downloads inside, or without `bar` log one line. A silent server times out."""
    if not bar:
        progress.info("downloading %s", source)
        disable_progress_bars()
    timeout, verbosity = socket.getdefaulttimeout(), hub_logging.get_verbosity()
    socket.setdefaulttimeout(CONNECT_SECONDS)  # torch.hub has no argument for it
    hub_logging.set_verbosity_error()  # else the hub warns on each retry
    try:
        yield
    finally:
        socket.setdefaulttimeout(timeout)
        hub_logging.set_verbosity(verbosity)


def _first_of(sources: Sequence[str], file: str, bar: bool, what: str, instead: str) -> Path:
    """`file` in the checkpoint directory, which `TORCH_HOME` moves, from the first source that can be reached; of a
    repository in the hub's own cache."""
    target, failures = _checkpoints() / file, []
    digest = HASH_IN_NAME.search(file)
    if target.is_file():
        return target
    for source in sources:
        try:
            with downloading(source, bar), hub_or_cache() if source.startswith(HUB_SITE) else nullcontext():
                if source.startswith(HUB_SITE):
                    return Path(huggingface_hub.hf_hub_download(source.removeprefix(HUB_SITE), "model.safetensors"))
                _check_answer(source, target)
                target.parent.mkdir(parents=True, exist_ok=True)
                # Writes to a temporary file first, and renames when the hash agrees.
                torch.hub.download_url_to_file(source, str(target), hash_prefix=digest and digest[1], progress=bar)
                return target
        except Exception as error:  # every source fails in its own way, and all mean: try the next
            failures.append(f"{source} ({first_line(error)})")
    tried = "; ".join(failures)
    raise CheckpointError(f"cannot download {what}{tried}. Put the file by hand at {target}, or {instead}")


def _checkpoints() -> Path:
    """Where torch keeps what it downloads."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def _check_answer(source: str, target: Path) -> None:
    """Raise an OSError where `target` is not there yet and the server of the URL `source` is silent."""
    if not target.is_file() and not answers(source):
        raise OSError(f"no answer from {urlparse(source).netloc}")
