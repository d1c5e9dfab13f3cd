"""The code that merges in one call: compiled ahead of time by torch from the function that runs in eager mode.

It is for any number of images, tokens, kept tokens and channels, so that all blocks, and all models with the same
rules, share it, and it is kept on disk.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

import torch
from torch import Tensor, nn
from torch.export import Dim

from diffrate import blocks
from diffrate.blocks.block import kept_and_merged
from diffrate.blocks.rules import ReductionRules
from diffrate.blocks.tokens import TokenState, size_dtype
from diffrate.budgets.schedule import Kept
from diffrate.files import cache_folder, first_line
from diffrate.running.machine import cpu_features, machine_name
from diffrate.running.quiet import errors_alone, no_warnings_of

# What the graph is traced with; it runs with any. All differ, so that torch does not take two for the same.
IMAGES, OTHERS, STAYING, LEAVING, CHANNELS, AT_FIRST = 2, 31, 13, 7, 64, 90

LEAST_TORCH = (2, 14)  # 2.6 does not trace it for any size, and the loader of 2.9 takes no folder
Run = Callable[[list[Tensor]], list[Tensor]]
_one_at_a_time = threading.Lock()


class MergingCompileError(RuntimeError):
    """Merging cannot be compiled on this machine; one line."""


class Kind(NamedTuple):
    """What compiled code is for: features in `dtype`, tokens of which `followed` is known, a family whose rules say the
    rest, and so many threads, which torch makes part of it."""

    dtype: torch.dtype
    followed: tuple[str, ...]
    prefix: int
    spared: int
    weigh_by_similarity: bool
    threads: int


@cache
def merging_of(kind: Kind) -> Run:
    """The compiled code, from disk or made now.

    Raises:
        MergingCompileError: there is no compiler that works.
    """
    folder = cache_folder("merging")
    with (
        _one_at_a_time,
        errors_alone("torch"),
        tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as scratch,
    ):
        if folder is None:
            return _loaded(_made(kind, Path(scratch)))
        kept = folder / _name(kind)
        if kept.is_dir():
            with suppress(RuntimeError):  # it was cut short, or is of another system
                return _loaded(kept)
            shutil.rmtree(kept)
        made = _made(kind, Path(scratch))
        with suppress(OSError):  # another process was first
            made = made.rename(kept)
        return _loaded(made)


class _Merging(nn.Module):
    """Pruning and merging of tensors alone: the numbers of tokens that are kept, and that join them, are the shape of
    `counts` `[K, S]`, since compiled graphs take no integers."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.rules = ReductionRules(kind.prefix, 0, kind.spared, kind.weigh_by_similarity)
        self.followed = kind.followed

    def forward(
        self, x: Tensor, size: Tensor, importance: Tensor, counts: Tensor, known: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, ...]:
        """Features, sizes, and what is known of the tokens."""
        stay, leave = counts.shape
        state = TokenState(x, size, **dict(zip(self.followed, known, strict=True)))
        left = kept_and_merged(self.rules, state, importance, Kept(x.shape[1], stay + leave, stay))
        return left.x, left.size, *(getattr(left, name) for name in self.followed)


def _example(kind: Kind) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    tokens = kind.prefix + OTHERS
    with torch.device("cpu"):
        x = torch.zeros(IMAGES, tokens, CHANNELS, dtype=kind.dtype)
        known = {
            "place": torch.arange(tokens).repeat(IMAGES, 1),
            "origin": torch.zeros(IMAGES, AT_FIRST, dtype=torch.int64),
            "last": torch.zeros(IMAGES, AT_FIRST, CHANNELS, dtype=kind.dtype),
        }
        size, importance = (torch.ones(IMAGES, count, dtype=size_dtype(x)) for count in (tokens, OTHERS))
        counts = torch.empty(kind.spared + STAYING, LEAVING)
    return x, size, importance, counts, tuple(known[name] for name in kind.followed)


def _made(kind: Kind, scratch: Path) -> Path:
    """A folder with the compiled code, in the folder `scratch`."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < LEAST_TORCH:
        raise MergingCompileError(
            f"compile_merging: needs torch {'.'.join(map(str, LEAST_TORCH))}; found {torch.__version__}"
        )
    package, folder = scratch / "merging.pt2", scratch / "merging"
    try:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
            no_warnings_of(r"torch\.|copyreg"),
        ):
            *tensors, known = example = _example(kind)
            shapes = (*map(_any_size, tensors), tuple(map(_any_size, known)))
            program = torch.export.export(_Merging(kind), example, dynamic_shapes=shapes)
            # One small graph, for which a pool of compiling processes would only have to start.
            alone = {"compile_threads": 1}
            torch._inductor.aoti_compile_and_package(program, package_path=str(package), inductor_configs=alone)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch has a class for each thing that goes wrong, and compilers have more
        raise MergingCompileError(
            f"compile_merging: {first_line(error)}; accepted: with a C++ compiler that works"
        ) from error
    with ZipFile(package) as archive:
        archive.extractall(folder)
    return folder


def _any_size(one: Tensor) -> dict[int, object]:
    return dict.fromkeys(range(one.ndim), Dim.DYNAMIC(min=1))


def _loaded(folder: Path) -> Run:
    # The loader itself, since what wraps it looks up at each call how to flatten its arguments, and a folder, since it
    # leaves what it takes out of a file in the system's folder for temporary files.
    loader = torch._C._aoti.AOTIModelPackageLoader  # type: ignore[reportAttributeAccessIssue]
    return loader(str(folder), "model", False, 1, -1).boxed_run


def _name(kind: Kind) -> str:
    """Of what is kept: another one for other code, another torch and another machine."""
    cpu = platform.machine(), machine_name(torch.device("cpu")), cpu_features()
    sources = [Path(__file__), *sorted(Path(blocks.__file__).parent.glob("*.py"))]
    content = b"".join(source.read_bytes() for source in sources)
    return hashlib.sha256(repr((kind, torch.__version__, cpu)).encode() + content).hexdigest()[:16]
