"""`diffrate.search` and `evaluate` inside a process group: two processes are one with all of the images, and a group of
some of the processes works on its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

import diffrate
from cli.runtime import leave_group
from diffrate import device
from diffrate.latency import measure
from tests.forked import ended, started, two
from tests.test_latency import table_of
from tests.test_patch import patched

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}


def search(folder: Path) -> None:
    """On this process's part of eight images, which is all of them outside a group."""
    processes, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if processes > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = diffrate.patch.vit(timm.create_model("vit_tiny_patch16_224", **SIZES), 1, 1)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
    part = slice(rank * 8 // processes, (rank + 1) * 8 // processes)
    loader = [(images[part], labels[part])]
    found = diffrate.search(model, loader, share=0.8, val=loader, checkpoint=folder / f"{processes}.pth")
    scores = diffrate.evaluate(model, loader)
    assert scores == found.scores
    content = {"kept": model.get_kept_num(), "images": scores.images, "loss": scores.loss}
    torch.save(content, folder / f"{processes}-{rank}.pth")
    if processes > 1:
        for method, said in (("gradient", "found no batch"), ("calibrated", "found 0 images")):
            # The second has no images: nobody is left waiting for it.
            with pytest.raises(ValueError, match=said):
                diffrate.search(model, [] if rank else loader, share=0.8, method=method)
        leave_group()


def test_two_processes_are_one_with_all_of_the_images(tmp_path: Path) -> None:
    search(tmp_path)
    for done in two(partial(search, tmp_path), tmp_path):
        assert done.code == 0, done.err
    one, first, second = (torch.load(tmp_path / f"{name}.pth", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    assert first == second
    assert (first["kept"], first["images"]) == (one["kept"], 8)
    assert abs(first["loss"] - one["loss"]) < 1e-5
    alone, both = (torch.load(tmp_path / f"{name}.pth", weights_only=True)["optimizer"]["state"] for name in "12")
    for index, state in alone.items():
        torch.testing.assert_close(both[index]["exp_avg"], state["exp_avg"], atol=1e-6, rtol=0)
    assert max(float(state["exp_avg"].abs().max()) for state in alone.values()) > 0


def with_one_output() -> diffrate.CompressedModel:
    """Its figures and losses are not sums over images: all processes' outputs, and their variance, are asked for."""
    torch.manual_seed(0)
    return diffrate.patch.vit(timm.create_model("vit_tiny_patch16_224", **SIZES | {"num_classes": 1}), 1, 1)


def noisy(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return images + 0.1 * torch.randn_like(images), labels


def searching(pairs: list[Any], group: Any, file: Path) -> dict[str, Any]:
    """What two processes find, each of which draws its own batches and noise."""
    val = list(DataLoader(pairs, batch_size=4))  # type: ignore[arg-type]
    loader = DataLoader(pairs, batch_size=2, shuffle=True)  # type: ignore[arg-type]
    options: dict[str, Any] = {"share": 0.8, "loss": "distill", "group": group}
    learned = diffrate.search(
        with_one_output(), loader, **options, epochs=2, mixup=noisy, budget="held", val=val, checkpoint=file
    )
    timed = diffrate.search(with_one_output(), loader, **options, minutes=0.001)
    tried = diffrate.search(
        with_one_output(), loader, **options, method="calibrated", work=200.0, checkpoint=file.with_suffix(".tried")
    )
    assert learned.scores is not None
    assert tried.calibrated is not None
    # The first process measures for both.
    measure.measured_speedup = lambda *_: 1.5 - 0.01 * dist.get_rank(group)
    images = [(torch.rand(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64))]
    fast = diffrate.search(patched("deit"), images, target_speedup=1.5, latency=table_of(0.3), group=group)
    assert fast.speed is not None
    return {
        "learned": [vars(record) for record in learned.history],
        "images": learned.scores.images,
        "scores": (learned.scores.loss, learned.scores.r2),
        "timed": len(timed.history),
        "tried": [tried.calibrated.losses, [vars(stage)["work"] for stage in tried.calibrated.stages]],
        "kept": [found.schedule.merge for found in (learned, tried, fast)],
        "measured": fast.speed.measured,
    }


def scoring(pairs: list[Any], group: Any, _: Path) -> dict[str, Any]:
    """What two processes lose on their images, all in all."""
    model, loader = with_one_output(), DataLoader(pairs, batch_size=2)  # type: ignore[arg-type]
    told: list[int] = []
    scores = diffrate.evaluate(model, loader, group=group, callback=lambda tally: told.append(tally.shared().images))

    def not_measured(*given: object) -> None:
        raise RuntimeError(f"not measured by process {dist.get_rank(group)}")

    measure._check_reach = not_measured
    for measured in (diffrate.measure_latency, partial(diffrate.search, loader=loader, target_speedup=1.5)):
        with pytest.raises(RuntimeError, match="not measured by process 0"):
            measured(model, group=group)
    rows = diffrate.sensitivity(model, loader, shares=(0.5,), group=group)
    lost = [row.record() for row in rows]
    return {"images": scores.images, "scores": (scores.loss, scores.r2), "told": told, "lost": lost}


WORK = (scoring, searching)  # of the processes 0 and 1, and of 2 and 3


def worked(number: int, place: int, group: Any, folder: Path) -> None:
    """One of the works, in the first or the second process that is at it, on its part of eight images; saved."""
    folder.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(number))
    pairs = list(zip(images, images.mean((1, 2, 3)), strict=True))[4 * place : 4 * place + 4]
    torch.save(WORK[number](pairs, group, folder / f"search-{place}.pth"), folder / f"{number}-{place}.pth")


CALLS: list[Callable[[diffrate.CompressedModel, Any], object]] = [
    lambda model, group: diffrate.evaluate(model, [], group=group),
    lambda model, group: diffrate.search(model, [], share=0.8, group=group),
    lambda model, group: diffrate.sensitivity(model, [], group=group),
    lambda model, group: diffrate.measure_latency(model, group=group),
]
ACCEPTED = "accepted: a process group of torch.distributed with this process in it, or None"


def refused(group: Any, error: type[Exception], found: str) -> None:
    """By every function that takes a group."""
    model = patched("deit")
    for call in CALLS:
        with pytest.raises(error) as caught:
            call(model, group)
        assert (type(caught.value), str(caught.value)) == (error, f"group: found {found}; {ACCEPTED}")


def with_a_group(function: Callable[..., Any]) -> Callable[..., Any]:
    """One of torch's functions, which fails in the default group: there the other half would have to answer."""

    def called(*given: Any, **options: Any) -> Any:
        assert isinstance(options.get("group", given[-1] if given else None), dist.ProcessGroup), function
        return function(*given, **options)

    return called


def by_halves(folder: Path) -> None:
    """Two of four processes search while the others score."""
    dist.init_process_group("gloo", timeout=timedelta(minutes=1))
    half, place = divmod(dist.get_rank(), 2)
    groups = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    refused(groups[1 - half], ValueError, "one without this process")
    asked = ("get_rank", "get_world_size", "all_reduce", "all_gather_object", "broadcast_object_list")
    device.dist = SimpleNamespace(**vars(dist) | {name: with_a_group(getattr(dist, name)) for name in asked})
    worked(half, place, groups[half], folder / "four")
    leave_group(groups[half])
    refused(groups[half], ValueError, "one without this process")
    leave_group()


def alone(folder: Path) -> None:
    """Two processes do the one work and then the other, in the default group."""
    dist.init_process_group("gloo", timeout=timedelta(minutes=1))
    for number in range(len(WORK)):
        worked(number, dist.get_rank(), None, folder / "two")
    leave_group()


def test_each_half_of_four_processes_works_on_its_own(tmp_path: Path) -> None:
    for done in ended(started(partial(by_halves, tmp_path), tmp_path, 4), tmp_path):
        assert done.code == 0, done.err
    for done in two(partial(alone, tmp_path), tmp_path):
        assert done.code == 0, done.err
    for number in range(len(WORK)):
        outcomes = [
            torch.load(tmp_path / folder / f"{number}-{place}.pth", weights_only=True)
            for folder in ("four", "two")
            for place in (0, 1)
        ]
        steps = [outcome.pop("timed", None) for outcome in outcomes]
        assert (steps[0], steps[2]) == (steps[1], steps[3])
        assert outcomes[0]["images"] == 8
        assert outcomes == outcomes[:1] * 4
    # By the first process of the group alone, which is the third of all.
    assert {path.name for path in (tmp_path / "four").glob("search*")} == {"search-0.pth", "search-0.tried"}


@pytest.mark.parametrize(("group", "found"), [(0, "int"), ([0, 1], "list"), ("gloo", "str")])
def test_what_is_no_group_is_refused(group: Any, found: str) -> None:
    refused(group, TypeError, found)
