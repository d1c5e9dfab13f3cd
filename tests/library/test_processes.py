"""`diffrate.search` and `evaluate` inside a process group: two processes are one with all of the images."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist

import diffrate
from tests.forked import two

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
        dist.barrier()  # nobody leaves while the other still waits for it
        dist.destroy_process_group()


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
