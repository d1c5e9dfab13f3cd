"""`--benchmark latency`: what the parts of a block take over its tokens, and how well whole schedules are predicted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from random import Random

import diffrate
from diffrate.budgets.schedule import Kept
from diffrate.latency.probing import random_schedule
from diffrate.latency.table import BlockTimes

ROWS = 13  # token counts of the table
RANDOM = 20  # schedules that predictions are held against, beside those of the file
GONE = 0.1  # of the tokens, in the prices of the table
HEADINGS = {
    "block": "block",
    "tokens": "tokens",
    "attention_ms": "attention ms",
    "sized_ms": "sizes ms",
    "mlp_ms": "MLP ms",
    "prune_ms": "pruning ms",
    "merge_ms": "merging ms",
    "rest_ms": "rest ms",
}


@dataclass(frozen=True)
class LatencyRow:
    """Milliseconds of a batch in one block, by the tokens that enter it and, of the MLP, that leave it.

    block: the first of its kind. sized: what attention takes more where tokens stand for several. prune, merge: what
    it takes that a tenth of the tokens goes, MLP apart; None where the kind reduces nothing. rest: outside the blocks.
    """

    model: str
    batch_size: int
    precision: str
    mode: str
    block: int
    tokens: int
    attention_ms: float
    sized_ms: float
    mlp_ms: float
    prune_ms: float | None
    merge_ms: float | None
    rest_ms: float

    def line(self) -> str:
        """The figures as a sentence."""
        priced = self.prune_ms is not None and self.merge_ms is not None
        prices = f", pruning {self.prune_ms:.3f} ms, merging {self.merge_ms:.3f} ms" if priced else ""
        return (
            f"block {self.block}, {self.tokens} tokens: attention {self.attention_ms:.3f} ms, MLP {self.mlp_ms:.3f} ms"
            f"{prices}"
        )


def latency_rows(name: str, table: diffrate.LatencyTable) -> Iterator[LatencyRow]:
    """A row for each kind of block and some of its token counts."""
    for kind, times in enumerate(table.kinds):
        counts = sorted({max(1, round(table.tokens * part / ROWS)) for part in range(1, ROWS + 1)}, reverse=True)
        for tokens in counts:
            prune, merge = (_price(times, tokens, merging) for merging in (False, True))
            yield LatencyRow(
                model=name,
                batch_size=table.batch_size,
                precision=table.setting["precision"],
                mode=table.setting["mode"],
                block=table.order.index(kind),
                tokens=tokens,
                attention_ms=1000 * times.plain[tokens],
                sized_ms=1000 * times.sized[tokens],
                mlp_ms=1000 * times.after[tokens if times.read is None else times.read],
                prune_ms=prune,
                merge_ms=merge,
                rest_ms=1000 * table.rest(),
            )


def schedules_to_check(
    model: diffrate.CompressedModel, known: Iterable[diffrate.Schedule], seed: int
) -> list[diffrate.Schedule]:
    """Those that are `known` of the model, and random ones."""
    rng = Random(seed)
    return [*known, *(random_schedule(model.compression.space, rng) for _ in range(RANDOM))]


def _price(times: BlockTimes, tokens: int, merging: bool) -> float | None:
    """Of letting a tenth of the tokens go, in milliseconds."""
    if not times.reduction or tokens < 2:
        return None
    left = tokens - max(1, round(GONE * tokens))
    return 1000 * times.price(Kept(tokens, tokens if merging else left, left), sized=False)
