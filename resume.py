"""Checkpoints of a search: written whole, refused by name when they belong to another run."""

from __future__ import annotations

import logging
import pickle
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import diffrate
from diffrate.schedule import Schedule, ScheduleError, make_schedule
from engine import Scores
from searching import Search, SearchState
from utils import Runtime, UsageError

log = logging.getLogger(__name__)
LAST, BEST, AUTO = "checkpoint.pth", "model_best.pth", "auto"
UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, pickle.UnpicklingError)


def search_identity(args: Namespace, target: float) -> dict[str, Any]:
    """The flags that decide how a search goes on: with other values, it is another search."""
    return {
        "model": args.model,
        "granularity": args.granularity,
        "target_flops": target,
        "flops_loss": args.flops_loss,
        "flops_weight": args.flops_weight,
        "warmup_compression_rate": args.warmup_compression_rate,
        "epochs": args.epochs,
        "arch-lr": args.arch_lr,
        "arch-min-lr": args.arch_min_lr,
        "batch-size": args.batch_size,
        "accum-steps": args.accum_steps,
        "seed": args.seed,
    }


def saver(args: Namespace, identity: dict[str, Any], runtime: Runtime) -> Callable[[Search, bool], None]:
    """What `Search.run` calls: writes `checkpoint.pth`, and `model_best.pth` for the best schedule."""
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()} | identity

    def save(search: Search, best: bool) -> None:
        content = search_content(search, flags)
        runtime.save(content, LAST)
        if best:
            runtime.save(content, BEST)

    return save


def search_content(search: Search, flags: dict[str, Any]) -> dict[str, Any]:
    """A search as plain values and tensors, which `torch.load` reads with `weights_only`."""
    state, settings = search.state, search.settings
    return {
        "mode": "search",
        "rates": [rate.detach().cpu() for rate in search.rates],
        "schedule": _plain(search.schedule()),
        "best_schedule": None if state.best is None else _plain(state.best[0]),
        "best_scores": None if state.best is None else asdict(state.best[1]),
        "optimizer": search.optimizer.state_dict(),
        "scheduler": {"rate": settings.rate, "least_rate": settings.least_rate, "steps": settings.steps},
        "scaler": search.scaler.state_dict(),
        "epoch": state.epoch,
        "step": state.step,
        "sums": state.sums,
        # Every step draws from a seed made of these and its position: no generator state is left over.
        "random": {"seed": settings.seed},
        "flags": flags,
    }


def resume_path(args: Namespace, runtime: Runtime) -> Path | None:
    """The checkpoint that `--resume` names; for `auto` the output folder's, None while there is none."""
    if args.resume is None:
        return None
    if args.resume != AUTO:
        return Path(args.resume)
    if runtime.output_dir is None:
        raise UsageError("--resume auto needs --output_dir")
    path = runtime.output_dir / LAST
    return path if path.exists() else None


def restore(search: Search, path: Path, identity: dict[str, Any]) -> None:
    """Put a search back where a checkpoint left it.

    Raises:
        UsageError: the file is missing, damaged, or of another search; names what differs.
    """
    content = read_search(path)
    for name, expected in identity.items():
        found = content["flags"].get(name)
        if found != expected:
            raise UsageError(f"--resume {path}: was made with --{name} {found}; accepted: {expected}, as in this run")
    with torch.no_grad():
        for rate, saved in zip(search.rates, content["rates"], strict=True):
            rate.copy_(saved)
    search.optimizer.load_state_dict(content["optimizer"])
    search.scaler.load_state_dict(content["scaler"])
    best = content["best_schedule"]
    search.state = SearchState(
        epoch=content["epoch"],
        step=content["step"],
        sums=content["sums"],
        best=None if best is None else (make_schedule(*best), Scores(**content["best_scores"])),
    )
    log.info("going on from %s at epoch %d, step %d", path, search.state.epoch, search.state.step)


def use_searched(model: diffrate.CompressedModel, args: Namespace, runtime: Runtime) -> None:
    """Give `model` the schedule of the search that `--resume` names, if it names one.

    Raises:
        UsageError: there is none, or it is damaged or of another model.
    """
    if args.resume is None:
        return
    path = resume_path(args, runtime)
    if path is None:
        raise UsageError(f"--resume auto: no {LAST} in --output_dir {runtime.output_dir}")
    schedule = searched_schedule(path, args.model)
    model.set_kept_num(schedule.prune, schedule.merge)


def searched_schedule(path: Path, model: str) -> Schedule:
    """The best schedule of a search's checkpoint, or before its first epoch ended that of its rates.

    Raises:
        UsageError: the file is missing, damaged, or of another model.
    """
    content = read_search(path)
    found = content["flags"]["model"]
    if found != model:
        raise UsageError(f"--resume {path}: was made with --model {found}; accepted: {model}, as in this run")
    return make_schedule(*(content["best_schedule"] or content["schedule"]))


def read_search(path: Path) -> dict[str, Any]:
    """The content of a search's checkpoint.

    Raises:
        UsageError: the file is missing, damaged, or no search's.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["mode"] != "search":
            raise ScheduleError(f"of a {content['mode']}")
    except UNREADABLE as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"--resume {path}: cannot be read ({reason}); accepted: the {LAST} of a search") from error
    return content


def _plain(schedule: Schedule) -> tuple[list[int] | None, list[int]]:
    return None if schedule.prune is None else list(schedule.prune), list(schedule.merge)
