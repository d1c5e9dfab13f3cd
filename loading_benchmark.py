"""`--benchmark loading`: whether reading images keeps up with the model."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

import models
from build import compress, dense_model, eval_loader, input_size_of
from datasets import DataError, build_dataset, load_image
from flags import PROJECT
from inference import for_inference
from transforms import eval_transform
from utils import Runtime

PHOTOGRAPHS = PROJECT / "figures"
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


def loading_row(args: Namespace, runtime: Runtime) -> LoadingRow:
    """Measure on the validation images of `--data-path`, or on JPEGs of 500 pixels made for the purpose.

    Raises:
        DataError: fewer images than two batches.
    """
    entry = models.lookup(args.model)
    compressed = compress(dense_model(entry, input_size_of(args, entry)), entry, args)
    flops = compressed.flops()
    model, runtime = for_inference(compressed, args, runtime)
    model.eval()
    wanted = args.batch_size * args.rounds
    with _photographs(args, wanted) as (name, root):
        transform = eval_transform(input_size_of(args, entry), args.crop_pct or entry.crop_pct)
        dataset: Any = build_dataset(name, root, "val", transform)
        batches = min(wanted, len(dataset)) // args.batch_size
        if batches < 2:
            raise DataError(
                f"--batch-size {args.batch_size}: found {len(dataset)} images; accepted: two batches at least"
            )
        loader = eval_loader(Subset(dataset, range(batches * args.batch_size)), args, runtime)  # type: ignore[arg-type]
        times = [_one_pass(model, loader, runtime) for _ in range(1 + PASSES)][
            1:
        ]  # in the first, processes start and files are cached
    images = batches * args.batch_size
    loading, computing, both = (images / median(side) for side in zip(*times, strict=True))
    return LoadingRow(args.model, args.batch_size, flops / 1e9, images, loading, computing, both)


def _one_pass(model: nn.Module, loader: DataLoader[Any], runtime: Runtime) -> tuple[float, float, float]:
    """Seconds for all images: the loader alone, the model alone, both together."""
    batch = next(iter(loader))[0].to(runtime.device, runtime.dtype)

    def compute(batches: Iterable[Any]) -> float:
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
def _photographs(args: Namespace, count: int) -> Iterator[tuple[str, Path | None]]:
    """The data set to read: name and folder."""
    if args.data_path is not None:
        yield args.data_set, args.data_path
        return
    with TemporaryDirectory() as folder:
        photographs = sorted(PHOTOGRAPHS.glob("*.jpg"))
        for index in range(count):
            path = photographs[index % len(photographs)]
            target = Path(folder, "val", path.stem, f"{index}.jpg")
            target.parent.mkdir(parents=True, exist_ok=True)
            photograph = load_image(path)
            longer = max(photograph.size)
            width, height = (round(side * SIDE / longer) for side in photograph.size)
            photograph.resize((width, height)).save(target, quality=90)
        yield "IMNET", Path(folder)
