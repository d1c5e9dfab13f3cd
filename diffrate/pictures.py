"""Pictures of what compression did: merged regions in one colour each, pruned ones dimmed and hatched; and maps of what
attention looks at."""

from __future__ import annotations

from itertools import chain, count
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from diffrate.blocks.block import attention_map
from diffrate.blocks.reduction import full_product
from diffrate.blocks.tokens import TokenState, size_dtype, standing
from diffrate.evaluation import evaluating
from diffrate.patch.base import CompressedModel, require_patched
from diffrate.schedule import Schedule

PRUNED = -1
# Okabe and Ito's colours, which colour-blind readers tell apart, in an order of alternating lightness:
# neighbours differ in grey print too. More neighbours than these take lighter and darker turns of them.
PALETTE = np.array(
    [(0, 114, 178), (240, 228, 66), (213, 94, 0), (86, 180, 233), (0, 158, 115), (230, 159, 0), (204, 121, 167)]
)
TINT = 0.6  # of a merged region's colour over the image below
DIM = 0.3  # what is left of the light where a region was pruned
PIXELS_A_LINE = 200  # of a picture's side for each pixel of the width of lines
HATCH = 8  # pixels between the lines over pruned regions
BITS_PER_SAMPLE = 258  # a tag of TIFF
# Formats of which Pillow gives grey pictures as 32-bit integers that fill 16 bits.
SCALED_TO_16_BITS = ("PNG", "PPM")

Groups = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.float64]


class VisualizationError(ValueError):
    """An image, an origin and a patch size that do not belong together."""


def make_visualization(
    image: Image.Image, source: Tensor, patch_size: int = 16, class_token: bool | int = True
) -> Image.Image:
    """`image` with its tokens drawn in, at the image's own size.

    `source` says where input tokens went: origins `[N0]` or `[1, N0]` as in `TokenState.origin`, or
    the published form, a matrix `[1, K, N0]` that is positive where kept token k stands for input
    token i. With `class_token` the first input token is no patch; a number says how many are none,
    where a model has register or distillation tokens.

    Raises:
        VisualizationError: `source` has another shape, or another number of tokens than the image has patches; or one
            of the two is of another type; or the image's values have no known range.
    """
    if not isinstance(image, Image.Image) or not isinstance(source, Tensor):
        found = f"{type(image).__name__} and {type(source).__name__}"
        raise VisualizationError(f"image, source: found {found}; accepted: a PIL image and a tensor")
    origin = source
    if source.ndim == 3 and len(source) == 1:
        strongest = source[0].max(dim=0)
        origin = torch.where(strongest.values > 0, strongest.indices, PRUNED)
    elif source.ndim == 2 and len(source) == 1:
        origin = source[0]
    elif source.ndim != 1:
        raise VisualizationError(
            f"source of {list(source.shape)}: accepted: [N0], [1, N0] or [1, K, N0], one image at a time"
        )
    origin = origin[int(class_token) :]
    grid = (image.height // patch_size, image.width // patch_size)
    if grid[0] * grid[1] != len(origin):
        raise VisualizationError(
            f"image of {image.width} x {image.height} with patches of {patch_size}: {grid[0] * grid[1]} patches; "
            f"accepted: {len(origin)}, the input tokens"
        )
    return draw_groups(image, origin_groups(origin, grid))


def in_rgb(image: Image.Image, name: str = "image") -> Image.Image:
    """A picture in RGB, 8 bits a colour: on white where it is transparent, scaled where it is of 16-bit integers or of
    floats from 0 to 1, which Pillow itself would cut off at 255.

    Raises:
        VisualizationError: its values have no known range; starts with the `name` of the picture.
    """
    floats = image.mode == "F"
    if not (floats or image.mode.startswith("I")):
        if not image.has_transparency_data:
            return image.convert("RGB")
        layer = image.convert("RGBA")
        picture = Image.new("RGB", layer.size, "white")
        picture.paste(layer, mask=layer)
        return picture
    values, most = np.asarray(image), 1 if floats else 65535
    known = floats or image.mode != "I" or image.format in SCALED_TO_16_BITS
    if image.format == "TIFF" and not floats:
        most = 2 ** image.tag_v2.get(BITS_PER_SAMPLE, (16,))[0] - 1  # type: ignore[attr-defined]  # some use 12 of 16
    if not (known and values.min() >= 0 and values.max() <= most):  # also where there is one that is no number
        kind = "floats" if floats else "integers"
        accepted = "8 or 16 bits, or floats from 0 to 1"
        raise VisualizationError(f"{name}: found {kind} from {values.min()} to {values.max()}; accepted: {accepted}")
    pixels = np.rint(values / most * 255).astype(np.uint8)
    if "transparency" in image.info:  # the one grey that stands for it
        pixels[values == image.info["transparency"]] = 255
    return Image.fromarray(pixels).convert("RGB")


def origin_groups(origin: Tensor, grid: tuple[int, int]) -> Groups:
    """Group of each patch, `[rows, columns]`, from the origins `[rows * columns]` of patch tokens.

    Groups are counted from 0 in the order in which the patches come; -1 was pruned.
    """
    flat = origin.tolist()
    kept = dict.fromkeys(token for token in flat if token != PRUNED)
    numbers = {PRUNED: PRUNED, **{token: number for number, token in enumerate(kept)}}
    return np.array([numbers[token] for token in flat], dtype=np.int64).reshape(grid)


def draw_groups(image: Image.Image, groups: Groups) -> Image.Image:
    """`image` with groups of patches `[rows, columns]` drawn in.

    A group of several patches is tinted in one colour, a patch that stands for itself shows the
    image, and pruned patches are dimmed and hatched. Lines separate groups. Neighbouring regions
    never share a colour, and the same groups always get the same ones.
    """
    picture = np.array(in_rgb(image), dtype=np.float64)
    patch_of_pixel = (np.arange(side) * count // side for side, count in zip(picture.shape, groups.shape, strict=False))
    spread = groups[np.ix_(*patch_of_pixel)]

    merged = np.bincount(groups[groups >= 0], minlength=1) > 1
    table: Any = np.array([color_of(number) for number in group_colors(groups)] or [(0.0, 0.0, 0.0)])
    tinted = (spread >= 0) & merged[np.maximum(spread, 0)]
    picture[tinted] = (1 - TINT) * picture[tinted] + TINT * table[spread[tinted]]

    grey = DIM * picture.mean(axis=2, keepdims=True)
    rows, columns = np.indices(spread.shape)
    hatched = (rows + columns) % HATCH == 0  # diagonal lines, which show in grey print too
    shaded = np.where(hatched[..., None], grey + 60, grey)
    picture = np.where(spread[..., None] == PRUNED, shaded, picture)

    lines = np.zeros(spread.shape, dtype=bool)  # on the near side of each border, broader in larger pictures
    for reach in range(1, 1 + max(1, min(spread.shape) // PIXELS_A_LINE)):
        lines[:-reach] |= spread[:-reach] != spread[reach:]
        lines[:, :-reach] |= spread[:, :-reach] != spread[:, reach:]
    picture[lines] = 255
    return Image.fromarray(picture.round().astype(np.uint8))


def group_colors(groups: Groups) -> list[int]:
    """A colour number per group such that groups with a common edge differ: greedy, largest first."""
    neighbours: list[set[int]] = [set() for _ in range(int(groups.max()) + 1)]
    beside = ((groups[:-1], groups[1:]), (groups[:, :-1], groups[:, 1:]))
    pairs = np.concatenate([np.stack([one.ravel(), other.ravel()], axis=1) for one, other in beside])
    touching = pairs[(pairs[:, 0] != pairs[:, 1]) & (pairs >= 0).all(axis=1)]
    for first, second in touching.tolist():
        neighbours[first].add(second)
        neighbours[second].add(first)
    sizes = np.bincount(groups[groups >= 0], minlength=len(neighbours))
    colors = [-1] * len(neighbours)
    for group in sorted(range(len(neighbours)), key=lambda group: (-sizes[group], group)):
        taken = {colors[other] for other in neighbours[group]}
        # Start at a number of the group's own: else all would crowd at the first few colours.
        tried = ((group + turn) % len(PALETTE) for turn in range(len(PALETTE)))
        colors[group] = next(color for color in chain(tried, count(len(PALETTE))) if color not in taken)
    return colors


def color_of(number: int) -> Pixels:
    """Red, green and blue of a colour number; each further turn of the palette is another shade."""
    turn, position = divmod(number, len(PALETTE))
    towards = 255.0 * (turn % 2)  # light and dark in turn, ever nearer to the end
    share = 1 - 0.6 ** ((turn + 1) // 2)
    return PALETTE[position] * (1 - share) + towards * share


class AttentionMaps(NamedTuple):
    """What the class token looks at, as shares of its attention; the mean over heads. Of models without a class token,
    the attention that is received: the mean over the input positions that tokens stand for.

    blocks: in each compressible block, `[B, blocks, rows, columns]`. A token's attention is shared evenly over the
        patches that it stands for; pruned patches have none.
    rollout: through all of them, `[B, rows, columns]` (Abnar and Zuidema, "Quantifying attention flow in transformers",
        2020, arXiv 2005.00928): attention and skip connection count a half each. A merged token is the mean of what its
        patches were, and a pruned patch has what others took of it before.
    prefix: what is left to class and register tokens, in each block and then in the rollout, `[B, blocks + 1, P]`: with
        the map it sums to 1.
    """

    blocks: Tensor
    rollout: Tensor
    prefix: Tensor


@torch.no_grad()
def attention_maps(model: nn.Module, images: Tensor, schedule: Schedule | None = None) -> AttentionMaps:
    """What the class token of `model`, in evaluation mode, looks at in images `[B, 3, H, W]`, at the full grid.

    schedule: kept counts instead of those that the model is set to, such as `model.dense_schedule()`. The maps are
    softmax weights as the model uses them: with `log(size)` in the scores of merged tokens.

    Raises:
        UnsupportedModelError: a model that is not patched, or whose attention is no single softmax.
        ScheduleError: a schedule that the model cannot run.
    """
    require_patched(model)
    assert isinstance(model, CompressedModel)
    if schedule is not None:
        model.check(schedule)
    prefix, looks = model.compression.space.prefix, []
    with evaluating(model):
        entry = model.enter(images, TokenState.traced)
        state = entry.state
        asking, share = _asking(model, state)
        flow = share  # how much of each input token is at each position, `[B, N0, N0]`
        for step in model.steps(entry, schedule or model.schedule, whole=True):
            weights, within = attention_map(step[0], step[1], state), full_product(share, flow)
            looks.append(full_product(full_product(asking, weights), share))
            assert state.origin is not None
            flow = standing((full_product(weights, within) + within) / 2, state.origin)
            state = model.run([step], state)
            asking, share = _asking(model, state)
    looks.append(full_product(full_product(asking, share), flow))
    rows = torch.cat(looks, dim=1)
    maps = rows[..., prefix:].unflatten(-1, model.token_grid)
    return AttentionMaps(maps[:, :-1], maps[:, -1], rows[..., :prefix])


def _asking(model: CompressedModel, state: TokenState) -> tuple[Tensor, Tensor]:
    """The share that each token has in asking, `[B, 1, N]`: class tokens alike, or else each as much as it stands for;
    and the share of each input token in the token that stands for it, `[B, N, N0]`."""
    assert state.origin is not None
    tokens, queries = state.x.shape[1], model.rule.importance.queries
    stands = F.one_hot(state.origin + 1, tokens + 1)[..., 1:].transpose(1, 2).to(size_dtype(state.x))
    count = stands.sum(-1)
    asking = count if not queries else (torch.arange(tokens, device=count.device) < queries).expand_as(count).to(count)
    return (asking / asking.sum(1, keepdim=True)).unsqueeze(1), stands / count.unsqueeze(-1)
