"""Whether an exported file answers as the live model does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from diffrate.exporting.graph import Normalization
from diffrate.exporting.targets import ExportError

BATCHES = (1, 5)  # neither is the one that was traced; more images come in batches of the last
# The largest difference of logits that a file may have: as it is in float32; in half precision as a share of the
# largest logit, since tokens may then go in another order.
LIMITS = {"float32": 1e-3, "fp16": 0.1, "bf16": 0.5}
NUDGE, NUDGES = 1e-5, 3  # of an image's values, more than runtimes differ by in float32; how often each is tried
TIE_NUDGES = 30  # of an image on which a file answers otherwise
TRIES = 20  # images drawn for each that is wanted

Answer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Agreement:
    """How a file compares with the live model on `images` images.

    difference: the largest of logits, where no tokens tie. limit: what it may be. top1: the share of images with equal
    top-1. source: whose images. ties: on how many the file differs by more, and answers as the live model does when
    the last bits of the image change: tokens are as important, or as similar, to the last bits. tied: the largest
    difference on those.
    """

    difference: float
    limit: float
    top1: float
    images: int
    source: str
    ties: int
    tied: float

    def line(self) -> str:
        """The figures as a sentence."""
        said = (
            f"largest difference from the live model {self.difference:.1e} (limit {self.limit:.0e}), "
            f"equal top-1 {self.top1:.1%} of {self.images} {self.source} images"
        )
        return said if not self.ties else f"{said}; up to {self.tied:.1e} on {self.ties} whose tokens nearly tie"


def compare(file: Answer, live: Answer, images: Tensor, precision: str, source: str) -> Agreement:
    """Run both on `images`, in batches of `BATCHES`, and compare logits."""
    sizes = [*BATCHES[:-1], *[BATCHES[-1]] * (len(images) // BATCHES[-1] + 1)]
    ends = torch.tensor(sizes).cumsum(0)
    batches = [batch for batch in images.tensor_split(ends[ends < len(images)]) if len(batch)]
    found, expected = (torch.cat([answer(batch) for batch in batches]) for answer in (file, live))
    limit = LIMITS[precision] * (1.0 if precision == "float32" else float(expected.abs().max()))
    if found.shape != expected.shape:
        raise ExportError(f"logits of the file: found {list(found.shape)}; accepted: {list(expected.shape)}")
    same = (found.argmax(-1) == expected.argmax(-1)).float().mean()
    differences = (found - expected).abs().nan_to_num(nan=torch.inf).flatten(1).amax(1)
    ties = torch.zeros(len(images), dtype=torch.bool)
    for index in (differences > limit).nonzero()[:, 0]:
        ties[index] = _answers_when_nudged(live, images[index][None], found[index][None], limit)
        if not ties[index]:  # of a file that is wrong on one image, it does not matter on how many
            break
    largest = [float(part.max()) if len(part) else 0.0 for part in (differences[~ties], differences[ties])]
    return Agreement(largest[0], limit, float(same), len(images), source, int(ties.sum()), largest[1])


def _answers_when_nudged(live: Answer, image: Tensor, found: Tensor, limit: float) -> bool:
    """Whether `live` comes to what was `found` when the last bits of the image change."""
    generator = torch.Generator().manual_seed(0)
    return any(_largest(live(one) - found) <= limit for one in _nudged(image, TIE_NUDGES, generator))


def fresh_images(live: Answer, size: tuple[int, int, int], outside: Normalization | None, seed: int) -> Tensor:
    """Random images for all `BATCHES`, as the file takes them: in [0, 1], or normalised by `outside`.

    Where two tokens are as important to the last bit, which of them goes is left to the order in which a runtime adds
    up: images whose logits change when the last bits of their values do are no test of a file, and others are drawn.

    Raises:
        ExportError: there are no others.
    """
    generator = torch.Generator().manual_seed(seed)
    found: list[Tensor] = []
    wanted = sum(BATCHES)
    for _ in range(TRIES * wanted):
        images = torch.rand(1, *size, generator=generator)
        images = images if outside is None else outside.apply(images)
        nudged, logits = list(_nudged(images, NUDGES, generator)), live(images)
        if all(_largest(logits - live(one)) < LIMITS["float32"] / 10 for one in nudged):
            found.append(images)
        if len(found) == wanted:
            return torch.cat(found)
    raise ExportError(
        f"found {len(found)} of {wanted} images on which the live model answers alike when they change a "
        "little; accepted: a model that does"
    )


def _nudged(images: Tensor, times: int, generator: torch.Generator) -> Iterator[Tensor]:
    """`images` with other last bits, `times` over."""
    return (images * (1 + NUDGE * torch.randn(images.shape, generator=generator)) for _ in range(times))


def _largest(difference: Tensor) -> float:
    """The largest absolute value; that of anything undefined is infinite."""
    return float(difference.abs().nan_to_num(nan=torch.inf).max())
