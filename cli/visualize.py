"""`--visualize`: a page for each image, with its tokens after the blocks, the predictions, and on request attention."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from PIL import Image
from torch import Tensor

import diffrate
from cli.data import View, crop_view, eval_transform, view_of
from cli.model import chosen_entry, named_model
from cli.plot import as_drawn
from cli.runtime import Runtime
from cli.settings import Settings
from datasets import DataError, load_image
from diffrate.atomic import whole_file
from diffrate.patch.parts import TextHead
from diffrate.pictures import draw_groups, origin_groups
from utils import UsageError

SIDE = 448  # pixels at least of the short side of a picture with tokens: lines stay thin beside the patches
SHOWN_CLASSES = 5
MOST_BLOCKS = 12  # panels of a page, unless blocks are chosen
COLUMNS = 4
WIDTH, TITLE = 2.6, 0.2  # inches of a panel, and above its picture
TALLEST = 2.0  # of a panel, against its width
HEADING = 0.1  # of a row, above the maps of attention
DPI = 110
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Seen:
    """What a model makes of one image.

    view: what it sees of the photograph, at a size for people.
    grid: rows and columns of the patches.
    origins: after each block, which kept token stands for each patch, `[rows * columns]`, -1 for pruned.
    kept: tokens after each block, class token included; `tokens` before the first.
    dense, compressed: probabilities of the classes, `[K]`; None of a model without a head.
    attention: whose it is, and of this image alone its maps, dense and compressed; None where nobody asked.
    """

    view: Image.Image
    grid: tuple[int, int]
    origins: tuple[Tensor, ...]
    kept: tuple[int, ...]
    tokens: int
    dense: Tensor | None
    compressed: Tensor | None
    attention: tuple[str, diffrate.AttentionMaps, diffrate.AttentionMaps] | None = None

    def tokens_after(self, block: int) -> Image.Image:
        """The view with the groups of patches after `block`, drawn in."""
        return draw_groups(self.view, origin_groups(self.origins[block], self.grid))

    def has_patches(self, block: int) -> bool:
        """Whether any patch is left after `block`; where only the class token is, its picture would be all dark."""
        return bool((self.origins[block] >= 0).any())

    def last(self) -> int:
        """The last block that leaves patches, or the last one where none does."""
        return max(filter(self.has_patches, range(len(self.kept))), default=len(self.kept) - 1)


@torch.inference_mode()
def see(
    model: diffrate.CompressedModel, photographs: Sequence[Image.Image], view: View, attention: bool = False
) -> list[Seen]:
    """Run `photographs`, of any size, through `model` at its kept counts and, for comparison, with all tokens."""
    transform = eval_transform(view)
    weight = next(model.parameters())
    images = torch.stack([transform(photograph) for photograph in photographs]).to(weight.device, weight.dtype)
    model.eval()
    states = model.forward_blocks(images)
    dense = compressed = [None] * len(photographs)
    if model.has_head():
        logits = model.outputs_at(images, model.dense_schedule()), model.classify(states[-1])
        apart = isinstance(model.head, TextHead) and model.head.logit_bias is not None  # each text by itself
        dense, compressed = ((one.float().sigmoid() if apart else one.float().softmax(-1)).cpu() for one in logits)
    schedules, asking = (model.dense_schedule(), model.schedule) if attention else (), model.rule.importance.queries
    maps = [diffrate.attention_maps(model, images, schedule) for schedule in schedules]
    whose = {0: "all tokens", 1: "the class token"}.get(asking, f"the first {asking} tokens")

    def looks(index: int) -> Any:
        return (whose, *(diffrate.AttentionMaps(*(part[index].cpu() for part in one)) for one in maps))

    first = model.compression.space.prefix
    zoom = -(-SIDE // min(view.size))  # whole pixels for every pixel of the input
    rows, columns = (zoom * side for side in view.size)
    below, right = (zoom * side for side in _covered(model, view.size))
    return [
        Seen(
            view=crop_view(photograph, view, (rows, columns)).crop((0, 0, right, below)),
            grid=model.token_grid,
            origins=tuple(state.origin[index, first:].cpu() for state in states if state.origin is not None),
            kept=tuple(state.x.shape[1] for state in states),
            tokens=model.compression.space.limits[0],
            dense=dense[index],
            compressed=compressed[index],
            attention=looks(index) if attention else None,
        )
        for index, photograph in enumerate(photographs)
    ]


def shown_blocks(seen: Seen) -> list[int]:
    """The blocks that remove tokens and leave patches, evenly thinned out, the last of them kept."""
    before = (seen.tokens, *seen.kept)
    last = seen.last()
    removing = [block for block in range(last + 1) if seen.kept[block] < before[block]] or [last]
    step = -(-len(removing) // MOST_BLOCKS)
    return removing[::-1][::step][::-1]


def page(seen: Seen, names: Sequence[str], title: str, blocks: Sequence[int] | None = None) -> Figure:
    """One page: the view, the tokens after the last block that leaves patches and after `blocks` (by default
    those that remove tokens), the predictions, if there are any, and attention in the same blocks, if it was asked."""
    shown, last = shown_blocks(seen) if blocks is None else blocks, seen.last()
    rows = -(-len(shown) // COLUMNS)
    height = WIDTH * min(seen.view.height / seen.view.width, TALLEST) + TITLE
    looking = 0 if seen.attention is None else 1 + -(-len(shown) // 2) + HEADING
    figure = Figure(figsize=(WIDTH * COLUMNS, height * (1 + rows + looking) + 0.3), layout="constrained")
    figure.suptitle(as_drawn(title))
    parts = (1, rows, looking) if looking else (1, rows)
    above, below, *beneath = figure.subfigures(len(parts), 1, height_ratios=parts)
    view, end, predictions = above.subplots(1, 3, width_ratios=(1, 1, 2))
    _picture(view, seen.view, "input")
    when = "at the end" if last == len(seen.kept) - 1 else f"after block {last}, the last with patches"
    _picture(end, seen.tokens_after(last), f"{when}: {_count(seen, last)}")
    draw_predictions(predictions, seen, names)
    for axes, block in zip_longest(below.subplots(rows, COLUMNS, squeeze=False).flat, shown):
        axes.set_axis_off()
        if block is not None:
            _picture(axes, seen.tokens_after(block), f"after block {block}: {_count(seen, block)}")
    for part in beneath:
        draw_attention(part, seen, shown)
    return figure


def draw_attention(figure: SubFigure, seen: Seen, blocks: Sequence[int]) -> None:
    """The rollout, then attention in each of `blocks`, dense beside compressed, two blocks in a row of one scale."""
    assert seen.attention is not None
    whose, dense, compressed = seen.attention
    figure.suptitle(f"attention of {whose} to each patch, in % of all (grey: pruned before)", fontsize=10)
    pairs = [[("rollout", dense.rollout, compressed.rollout)]]
    found = [(f"in block {block}", dense.blocks[block], compressed.blocks[block]) for block in blocks]
    pairs += [found[first : first + 2] for first in range(0, len(found), 2)]
    colors, extent = colormaps["viridis"].with_extremes(bad="0.8"), (0, seen.view.width, seen.view.height, 0)
    for row, panels in zip(pairs, figure.subplots(len(pairs), COLUMNS, squeeze=False), strict=True):
        shown = [
            (f"{name}, {who}", 100 * one)
            for name, *maps in row
            for who, one in zip(("dense", "compressed"), maps, strict=True)
        ]
        most = max(float(one.max()) for _, one in shown)
        for axes, drawn in zip_longest(panels, shown):
            axes.set_axis_off()
            if drawn is not None:
                axes.set_title(drawn[0], fontsize=9)
                there = np.ma.masked_equal(drawn[1].numpy(), 0)
                image = axes.imshow(there, cmap=colors, vmin=0, vmax=most, extent=extent)
        figure.colorbar(image, ax=list(panels), shrink=0.8, pad=0.01)


def draw_predictions(axes: Axes, seen: Seen, names: Sequence[str]) -> None:
    """The likeliest classes of the dense model, with the compressed model's word on them beside; nothing of a
    model without a head."""
    if seen.dense is None or seen.compressed is None:
        axes.set_axis_off()
        return
    classes = seen.dense.topk(min(SHOWN_CLASSES, len(seen.dense))).indices.tolist()
    sides = (("dense", seen.dense, -0.2, "#bbbbbb", ""), ("compressed", seen.compressed, 0.2, "#0072b2", "///"))
    for name, found, offset, color, hatch in sides:
        rows = [row + offset for row in range(len(classes))]
        values = [100 * float(found[index]) for index in classes]
        bars = axes.barh(rows, values, 0.4, label=name, color=color, hatch=hatch, edgecolor="white")
        axes.bar_label(bars, fmt="{:.1f} %", padding=2, fontsize=8)
    axes.set_yticks(range(len(classes)), [as_drawn(names[index]) for index in classes], fontsize=9)
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="probability in %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=8)


def _covered(model: diffrate.CompressedModel, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of pixels that patches stand for: they leave some out where they do not tile the input."""
    module: Any = model
    embedding = getattr(module, "patch_embed", None) or getattr(module, "embeds", None)
    patch = getattr(embedding, "patch_size", (1, 1))
    rows, columns = (count * side for count, side in zip(model.token_grid, patch, strict=True))
    # Where convolutions come first, what is called a patch is none of the input's.
    left_out = (size[0] - rows, size[1] - columns)
    return (rows, columns) if all(0 <= rest < side for rest, side in zip(left_out, patch, strict=True)) else size


def _picture(axes: Axes, image: Image.Image, title: str) -> None:
    axes.imshow(image)
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()


def _count(seen: Seen, block: int) -> str:
    return f"{seen.kept[block]} of {seen.tokens} tokens" + ("" if seen.has_patches(block) else ", no patches")


def run(settings: Settings, runtime: Runtime) -> None:
    """Write `NAME.png`, the page, and `NAME_tokens.png`, the groups after the last block with patches alone, for each
    image; nothing where an image, the weights, the schedule or a block is not there or does not fit."""
    paths, blocks = _readable(settings.run.images, settings.data.skip_unreadable, runtime), settings.run.blocks
    entry, folder = chosen_entry(settings.model), runtime.output_dir
    model, words = named_model(settings, entry, runtime)
    names = words if words is not None else [f"class {index}" for index in range(model.num_classes)]
    last = len(model.compressible_blocks()) - 1
    for block in blocks or ():
        if block > last:
            raise UsageError(f"--blocks {block}: accepted: 0 to {last}")
    assert folder is not None, "flags make sure of a folder"
    view, size = view_of(settings, entry), settings.data.batch_size

    def looked_at(batch: Sequence[Path]) -> list[Seen]:
        with runtime.autocast():
            return see(model, [load_image(path) for path in batch], view, settings.run.attention)

    seen_images = chain.from_iterable(looked_at(paths[start : start + size]) for start in range(0, len(paths), size))
    for path, name, seen in zip(paths, _file_names(paths), seen_images, strict=True):
        drawn = page(seen, names, f"{path.name}  |  {entry.name}  |  {model.flops() / 1e9:.3f} GFLOPs", blocks)
        with whole_file(folder / f"{name}.png") as file:
            drawn.savefig(file, format="png", dpi=DPI)
        with whole_file(folder / f"{name}_tokens.png") as file:
            seen.tokens_after(seen.last()).save(file, format="PNG")
        said = {}
        for who, found in (("dense", seen.dense), ("compressed", seen.compressed)):
            if found is not None:
                best = int(found.argmax())
                said[who] = f"{names[best]} {100 * float(found[best]):.1f} %"
        runtime.record({"mode": "visualize", "model": entry.name, "image": str(path), "kept": seen.kept, **said})
        predictions = ", ".join(f"{who} {what}" for who, what in said.items()) or "no head"
        log.info("%s: %s -> %s", path, predictions, folder / f"{name}.png")


def _readable(paths: Sequence[Path], skip: bool, runtime: Runtime) -> list[Path]:
    """The images that can be read; others are left out with `skip`, else an error."""
    found = []
    for path in paths:
        try:
            load_image(path)
            found.append(path)
        except DataError:
            if not skip:
                raise
            runtime.unreadable[str(path)] = None
    if not found:
        raise DataError(f"image {paths[0]}: cannot be read, nor any other; accepted: one that can")
    return found


def _file_names(paths: Sequence[Path]) -> Iterator[str]:
    """A name for each image: its own, numbered where another has it."""
    used: set[str] = set()
    for path in paths:
        candidates = (path.stem if number == 1 else f"{path.stem}-{number}" for number in count(1))
        name = next(name for name in candidates if used.isdisjoint({name, f"{name}_tokens"}))
        used |= {name, f"{name}_tokens"}
        yield name
