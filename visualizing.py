"""`--visualize`: a page of pictures for each image, in files."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

from PIL import ImageOps

import diffrate
import models
from build import compress, input_size_of, plain_model, read_weights
from class_names import class_names
from datasets import load_image
from diffrate.files import whole_file
from pictures import Seen, likeliest, see, sheet
from resume import use_searched
from utils import Runtime, UsageError

log = logging.getLogger(__name__)
DPI = 110


def visualize(args: Namespace, runtime: Runtime) -> None:
    """Write `NAME.png`, the page, and `NAME_tokens.png`, the final groups alone, for each of `--visualize`.

    Raises:
        DataError, CheckpointError, ScheduleError, UsageError: an image, the weights, the schedule or a
            block is not there or does not fit; before anything is written.
    """
    for path in args.visualize:
        load_image(path)
    model, names = _model_and_names(args, runtime)
    _check_blocks(model, args.blocks)
    assert runtime.output_dir is not None, "flags make sure of a folder"
    for (path, seen), name in zip(_seen(model, args, runtime), _file_names(args.visualize), strict=True):
        page = sheet(seen, names, f"{path.name}  |  {args.model}  |  {model.flops() / 1e9:.3f} GFLOPs", args.blocks)
        target = runtime.output_dir / f"{name}.png"
        with whole_file(target) as file:
            page.savefig(file, format="png", dpi=DPI)
        with whole_file(target.with_name(f"{name}_tokens.png")) as file:
            seen.tokens_after(len(seen.kept) - 1).save(file, format="PNG")
        said = {"dense": likeliest(seen.dense, names), "compressed": likeliest(seen.compressed, names)}
        runtime.record({"mode": "visualize", "model": args.model, "image": str(path), "kept": seen.kept, **said})
        log.info("%s: dense %s, compressed %s -> %s", path, said["dense"], said["compressed"], target)


def _check_blocks(model: diffrate.CompressedModel, chosen: Sequence[int] | None) -> None:
    last = len(model.compressible_blocks()) - 1
    wrong = [block for block in chosen or () if block > last]
    if wrong:
        raise UsageError(f"--blocks {wrong[0]}: accepted: 0 to {last}")


def _model_and_names(args: Namespace, runtime: Runtime) -> tuple[diffrate.CompressedModel, Sequence[str]]:
    entry = models.lookup(args.model)
    state, name = read_weights(args, entry, runtime)
    model = compress(plain_model(args, entry, state, name, entry.num_classes), entry, args)
    use_searched(model, args, runtime)
    return model.to(runtime.device), class_names(args, entry, model.num_classes)


def _seen(model: diffrate.CompressedModel, args: Namespace, runtime: Runtime) -> Iterator[tuple[Path, Seen]]:
    """Every image, read and run in batches."""
    entry = models.lookup(args.model)
    size, crop_pct = input_size_of(args, entry), args.crop_pct or entry.crop_pct
    for start in range(0, len(args.visualize), args.batch_size):
        paths = args.visualize[start : start + args.batch_size]
        # Turned upright as their camera says: people look at them.
        photographs = [ImageOps.exif_transpose(load_image(path)) for path in paths]
        with runtime.autocast():
            pictures = see(model, photographs, size, crop_pct)
        yield from zip(paths, pictures, strict=True)


def _file_names(paths: Sequence[Path]) -> list[str]:
    """A name for each image: its own, numbered where another has it."""
    used: set[str] = set()
    names = []
    for path in paths:
        candidates = (path.stem if number == 1 else f"{path.stem}-{number}" for number in count(1))
        name = next(name for name in candidates if used.isdisjoint({name, f"{name}_tokens"}))
        used |= {name, f"{name}_tokens"}
        names.append(name)
    return names
