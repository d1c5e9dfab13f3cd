"""`python -m tests.exporting.table [RULE...] [NAME...]`: how each construction's files compare with the live model.

A RULE may be several, joined by commas: one for each of the blocks in turn.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch

import diffrate
from diffrate.files.graph import traced
from diffrate.files.header import Metadata
from diffrate.files.runtimes import KINDS, load_exported
from diffrate.schedule import PUBLISHED, RULE_NAMES, make_schedule
from tests.constructions import CONSTRUCTIONS, build, images_for, size_of

# Shares of the patches that four blocks keep. Of the last, many models read the class token alone.
PRUNED, MERGED = (0.95, 0.8, 0.6, 0.4), (0.9, 0.7, 0.5, 0.3)


def compressed(name: str, rule: str = PUBLISHED, **options: Any) -> diffrate.CompressedModel:
    """The construction in float32, which prunes and merges by `rule`, or by the rules that it joins."""
    model = diffrate.patch.vit(build(name, **options).float(), 1, 1, size_of(name))
    space = model.compression.space
    patches = space.limits[0] - space.prefix
    rows = (row[: len(space.limits)] for row in (PRUNED, MERGED))
    prune, merge = ([space.prefix + round(share * patches) for share in row] for row in rows)
    model.schedule = make_schedule(prune, merge, list(itertools.islice(itertools.cycle(rule.split(",")), len(merge))))
    return model


def differences(
    name: str, folder: Path, suffixes: Collection[str] = tuple(KINDS), **options: Any
) -> Iterator[tuple[str, float | str]]:
    """For each kind of file the largest difference of logits at batches of 1, 3 and 8, or why there is none."""
    model = compressed(name, **options)
    program = traced(model, torch.float32, None)
    said = Metadata(
        **{"model": name, "schedule": model.compression.current(), "gflops": 0.0, "dense_gflops": 0.0},
        **{"input_size": (3, *size_of(name)), "mean": None, "std": None, "normalizes": False},
        **{"precision": "", "versions": {}},
    )
    for suffix in suffixes:
        kind, path = KINDS[suffix], folder / f"{name}{suffix}"
        try:
            kind.write(program, said.entries(), path)
            run = load_exported(path).logits
            found = 0.0
            for count in (1, 3, 8):
                images = images_for(name, count).float()
                found = max(found, float((run(images) - model(images, return_flop=False)).abs().max()))
            yield suffix, found
        except Exception as error:
            yield suffix, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def main(names: list[str]) -> None:
    """Print a row for each construction that is named, or for all, by each rule that is named, or by the paper's."""
    rules = [name for name in names if {*name.split(",")} <= {*RULE_NAMES}] or [PUBLISHED]
    chosen = [name for name in names if name not in rules] or CONSTRUCTIONS
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for rule, name in itertools.product(rules, chosen):
            found = differences(name, Path(folder), rule=rule)
            cells = [one if isinstance(one, str) else f"{one:.1e}" for _, one in found]
            print(f"| {rule} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
