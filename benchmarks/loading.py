"""`--benchmark loading`: whether reading images keeps up with the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from torch import nn

from cli.runtime import Runtime
from datasets import ImageLoader, load_image

PHOTOGRAPHS = Path(__file__).resolve().parent.parent / "figures"
SIDE = 500  # pixels of the longer side, as ImageNet's pictures have in the median
PASSES = 3
HEADINGS = {
    "model": "model",
    "batch_size": "batch",
    "gflops": "GFLOPs",
    "loader_images_per_second": "loader img/s",
    "model_images_per_second": "model img/s",
    "whole_images_per_second": "both img/s",
    "bound_by": "bound by",
}


@dataclass(frozen=True)
class LoadingRow:
    """Throughputs of the loader alone, of the model alone, and of evaluation, medians over passes in turn."""

    model: str
    batch_size: int
    gflops: float
    images: int
    loader_images_per_second: float
    model_images_per_second: float
    whole_images_per_second: float

    def line(self) -> str:
        """The row as a sentence."""
        loader, model = self.loader_images_per_second, self.model_images_per_second
        both = self.whole_images_per_second
        figures = f"loader alone {loader:.1f} images/s, model alone {model:.1f}, both {both:.1f}"
        return f"{figures}: bound by the {self.bound_by}"

    @property
    def bound_by(self) -> str:
        """Which of the two an evaluation waits for."""
        return "model" if self.loader_images_per_second > self.model_images_per_second else "loader"


def loading_row(model: nn.Module, loader: ImageLoader, name: str, flops: int, runtime: Runtime) -> LoadingRow:
    """Measure `model`, called `name` and of `flops` an image, on whole batches of `loader`."""
    model.eval()
    times = [_one_pass(model, loader, runtime) for _ in range(1 + PASSES)]
    sides = zip(*times[1:], strict=True)  # in the first, processes start and files are cached
    batch_size = loader.batch_size or 1
    images = len(loader) * batch_size
    loading, computing, both = (images / median(side) for side in sides)
    return LoadingRow(name, batch_size, flops / 1e9, images, loading, computing, both)


def _one_pass(model: nn.Module, loader: ImageLoader, runtime: Runtime) -> tuple[float, float, float]:
    """Seconds for all images: the loader alone, the model alone, both together."""
    batch = next(iter(loader))[0].to(runtime.device, runtime.dtype)

    def compute(batches: Iterable[torch.Tensor]) -> float:
        start = perf_counter()
        with torch.inference_mode(), runtime.autocast():
            for images in batches:
                model(images, return_flop=False)
        if runtime.device.type == "cuda":
            torch.cuda.synchronize(runtime.device)
        return perf_counter() - start

    start = perf_counter()
    for _ in loader:
        pass
    loading = perf_counter() - start
    computing = compute([batch] * len(loader))
    moved = (images.to(runtime.device, runtime.dtype, non_blocking=True) for images, _ in loader)
    return loading, computing, compute(moved)


@contextmanager
def photographs(count: int) -> Iterator[Path]:
    """A folder with `count` JPEGs of 500 pixels in ImageNet's layout, made of the photographs that ship."""
    with TemporaryDirectory() as folder:
        paths = sorted(PHOTOGRAPHS.glob("*.jpg"))
        for index in range(count):
            path = paths[index % len(paths)]
            target = Path(folder, "val", path.stem, f"{index}.jpg")
            target.parent.mkdir(parents=True, exist_ok=True)
            photograph = load_image(path)
            longer = max(photograph.size)
            width, height = (round(side * SIDE / longer) for side in photograph.size)
            photograph.resize((width, height)).save(target, quality=90)
        yield Path(folder)
