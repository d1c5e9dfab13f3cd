"""`--visualize`: a page of pictures for each image, in files."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import diffrate
from cli.data import view_of
from cli.image_page import Seen, likeliest, page, see
from cli.model import chosen_entry, named_model
from cli.runtime import Runtime
from cli.settings import Settings
from cli.transforms import View
from datasets import load_image
from diffrate.atomic import whole_file
from utils import UsageError

log = logging.getLogger(__name__)
DPI = 110


def run(settings: Settings, runtime: Runtime) -> None:
    """Write `NAME.png`, the page, and `NAME_tokens.png`, the final groups alone, for each image.

    Raises:
        DataError, CheckpointError, ScheduleError, UsageError: an image, the weights, the schedule or a
            block is not there or does not fit; before anything is written.
    """
    images, blocks = settings.run.images, settings.run.blocks
    for path in images:
        load_image(path)
    entry = chosen_entry(settings.model)
    model, words = named_model(settings, entry, runtime)
    names = words if words is not None else [f"class {index}" for index in range(model.num_classes)]
    last = len(model.compressible_blocks()) - 1
    for block in blocks or ():
        if block > last:
            raise UsageError(f"--blocks {block}: accepted: 0 to {last}")
    assert runtime.output_dir is not None, "flags make sure of a folder"
    seen_images = _seen(model, images, view_of(settings, entry), settings.data.batch_size, runtime)
    for path, name, seen in zip(images, _file_names(images), seen_images, strict=True):
        drawn = page(seen, names, f"{path.name}  |  {entry.name}  |  {model.flops() / 1e9:.3f} GFLOPs", blocks)
        target = runtime.output_dir / f"{name}.png"
        with whole_file(target) as file:
            drawn.savefig(file, format="png", dpi=DPI)
        with whole_file(target.with_name(f"{name}_tokens.png")) as file:
            seen.tokens_after(len(seen.kept) - 1).save(file, format="PNG")
        both = {"dense": seen.dense, "compressed": seen.compressed}
        said = {who: likeliest(found, names) for who, found in both.items() if found is not None}
        runtime.record({"mode": "visualize", "model": entry.name, "image": str(path), "kept": seen.kept, **said})
        log.info("%s: %s -> %s", path, ", ".join(f"{who} {what}" for who, what in said.items()) or "no head", target)


def _seen(
    model: diffrate.CompressedModel, paths: Sequence[Path], view: View, batch_size: int, runtime: Runtime
) -> Iterator[Seen]:
    """What is seen of every image, read and run in batches."""
    for start in range(0, len(paths), batch_size):
        photographs = [load_image(path) for path in paths[start : start + batch_size]]
        with runtime.autocast():
            seen = see(model, photographs, view)
        yield from seen


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
