"""The method as the paper and the published system have it, token by token in NumPy: slow, and easy to check.

Every multiplication of a matrix product is counted.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
LEAST_SIZE = 1e-30
COSINE_SIZES = ("published", "valued", "random", "received", "received_halves")


class Seen(NamedTuple):
    """The attention that tokens receive from the class token and from all, how long their values are, their keys."""

    first: Array
    all: Array
    lengths: list[float]
    keys: list[Array]


class Left(NamedTuple):
    """A token that is left, by the index that it entered with."""

    index: int
    token: Array
    size: float
    key: Array
    importance: float


def _cosine(one: Left, other: Left, keys: bool) -> float:
    a, b = (one.key, other.key) if keys else (one.token, other.token)
    return float(a @ b) / float(np.linalg.norm(a) * np.linalg.norm(b))


@dataclass
class Oracle:
    """A ViT of timm with a class token, by its tensors. mean: whether patches are averaged for the head, not the class
    token read. rules: of each block. draws: random importance, one for each block that goes by it. closest: how near to
    each other, as a share, two values came of which the larger decided."""

    weights: Mapping[str, Array]
    heads: int
    patch: int
    mean: bool
    rules: Sequence[str]
    draws: list[Array] = field(default_factory=list)
    least_size: float = LEAST_SIZE
    closest: float = math.inf
    multiplications: int = field(default=0)

    def product(self, vector: Array, matrix: Array) -> Array:
        """`vector` times `matrix`, row by row."""
        self.multiplications += matrix.size
        return np.array([sum(a * b for a, b in zip(vector, column, strict=True)) for column in matrix.T])

    def linear(self, name: str, vector: Array) -> Array:
        return self.product(vector, self.weights[f"{name}.weight"].T) + self.weights[f"{name}.bias"]

    def norm(self, name: str, vector: Array) -> Array:
        centered = vector - vector.mean()
        scaled = centered / math.sqrt((centered**2).mean() + 1e-6)
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def tokens_of(self, image: Array) -> list[Array]:
        """The class token and the patches of `image` `[3, H, W]`, with their positions."""
        kernel = self.weights["patch_embed.proj.weight"]
        kernel = kernel.reshape(len(kernel), -1)
        rows, columns = (side // self.patch for side in image.shape[1:])
        tokens = [self.weights["cls_token"][0, 0]]
        self.multiplications += kernel.size  # the paper counts the class token as a patch
        for row in range(rows):
            for column in range(columns):
                top, left = row * self.patch, column * self.patch
                pixels = image[:, top : top + self.patch, left : left + self.patch].ravel()
                tokens.append(self.product(pixels, kernel.T) + self.weights["patch_embed.proj.bias"])
        return [token + place for token, place in zip(tokens, self.weights["pos_embed"][0], strict=True)]

    def attention(self, block: str, tokens: list[Array], sizes: list[float]) -> tuple[list[Array], Seen]:
        """What attention adds to each token, and what a rule may go by."""
        normed = [self.norm(f"{block}.norm1", token) for token in tokens]
        parts = [np.split(self.linear(f"{block}.attn.qkv", token), 3) for token in normed]
        width = len(tokens[0]) // self.heads
        added, maps = [np.zeros(len(tokens[0])) for _ in tokens], []
        for head in range(self.heads):
            own = slice(head * width, (head + 1) * width)
            keys = np.array([key[own] for _, key, _ in parts])
            values = np.array([value[own] for _, _, value in parts])
            for number, (query, _, _) in enumerate(parts):
                scores = self.product(query[own], keys.T) / math.sqrt(width) + np.log(sizes)
                weights = np.exp(scores - scores.max())
                maps.append(weights / weights.sum())
                added[number][own] = self.product(maps[-1], values)
        lengths = [float(np.linalg.norm(value)) for _, _, value in parts]
        keys = [key.reshape(self.heads, width).mean(axis=0) for _, key, _ in parts]
        seen = Seen(np.mean(maps[:: len(tokens)], axis=0), np.mean(maps, axis=0), lengths, keys)
        return [self.linear(f"{block}.attn.proj", vector) for vector in added], seen

    def ranked(self, values: Mapping[int, float]) -> list[int]:
        """The keys of `values` in falling order; `closest` is how near to each other two of them come."""
        order = sorted(values, key=lambda index: -values[index])
        for one, other in itertools.pairwise(order):
            self.closest = min(self.closest, abs(values[one] - values[other]) / (abs(values[one]) + 1e-9))
        return order

    def reduced(
        self, number: int, tokens: list[Array], sizes: list[float], seen: Seen, prune: int, merge: int
    ) -> tuple[list[Array], list[float]]:
        """The tokens that are left after block `number`, and their sizes."""
        prune = min(prune, len(tokens))
        merge, rule, patches = min(merge, prune), self.rules[number], range(1, len(tokens))
        if merge == len(tokens):
            return tokens, sizes
        if rule == "sliced":
            return tokens[:merge], sizes[:merge]
        if rule == "pitome":
            left = [Left(index, tokens[index], sizes[index], seen.keys[index], 0.0) for index in range(len(tokens))]
            return self.by_energy(left, merge, 0.9 - 0.9 * number / len(self.rules))
        importance = {index: float(seen.first[index]) for index in patches}
        if rule == "random":
            # None is drawn in the last block where nobody reads what goes.
            drawn = self.draws.pop(0) if self.draws else np.arange(len(tokens))
            importance = {index: float(drawn[index]) for index in patches}
        if rule.startswith("received"):
            importance = {index: float(seen.all[index]) for index in patches}
        if rule == "valued" or rule.startswith("received"):
            importance = {index: value * seen.lengths[index] for index, value in importance.items()}
        halves = rule in ("similar", "similar_less_important", "minor_into_major", "received_halves", "tome")
        by_rank = prune < len(tokens) or not halves
        order = [0, *(self.ranked(importance) if by_rank else patches)][:prune]
        left = [Left(at, tokens[at], sizes[at], seen.keys[at], importance.get(at, 0.0)) for at in order]
        if merge <= 1:
            return [left[0].token], [left[0].size]
        if halves:
            while len(left) > merge:
                left = self.halved(left, min(len(left) - merge, (len(left) - 1) // 2), rule)
            return [one.token for one in left], [one.size for one in left]
        return self.merged(
            left[:merge], [(one, *self.nearest(one, left[1:merge], False)) for one in left[merge:]], rule
        )

    def merged(
        self, staying: list[Left], joining: list[tuple[Left, int, float]], rule: str
    ) -> tuple[list[Array], list[float]]:
        """The tokens and sizes of `staying`, each averaged with those that join it, at a cosine."""
        tokens, sizes = [], []
        for one in staying:
            group = [(other, cosine) for other, to, cosine in joining if to == one.index]
            weights = [1.0 if rule in COSINE_SIZES else other.size for other, _ in group]
            own = 1.0 if rule in COSINE_SIZES else one.size
            total = own * one.token
            for weight, (other, _) in zip(weights, group, strict=True):
                total = total + weight * other.token
            tokens.append(total / (own + sum(weights)))
            grown = sum(other.size * (cosine if rule in COSINE_SIZES else 1.0) for other, cosine in group)
            sizes.append(max(self.least_size, one.size + grown) if rule in COSINE_SIZES else one.size + grown)
        return tokens, sizes

    def nearest(self, one: Left, others: list[Left], keys: bool) -> tuple[int, float]:
        """The index of the most similar of the others, and their cosine."""
        cosines = {other.index: _cosine(one, other, keys) for other in others}
        best = self.ranked(cosines)[0]
        return best, cosines[best]

    def halved(self, left: list[Left], count: int, rule: str) -> list[Left]:
        """The patches in two halves: `count` of one merge into the other."""
        first, patches = left[0], left[1:]
        if rule in ("minor_into_major", "received_halves"):
            by_index = {one.index: one for one in patches}
            patches = [by_index[index] for index in self.ranked({one.index: one.importance for one in patches})]
            cut = len(patches) - len(patches) // 2
            targets, sources = patches[:cut], patches[cut:]
        else:
            targets, sources = patches[::2], patches[1::2]
        mean = sum(one.importance for one in patches) / len(patches)
        aversion = {"similar_less_important": 0.2, "received_halves": 0.1}.get(rule, 0.0)
        pairs = {one.index: (one, *self.nearest(one, targets, rule == "tome")) for one in sources}
        worth = {
            index: cosine - (aversion and aversion * one.importance / mean) for index, (one, _, cosine) in pairs.items()
        }
        ranked = self.ranked(worth)
        joining, staying = [pairs[index] for index in ranked[:count]], [pairs[index][0] for index in ranked[count:]]
        left = [first, *targets, *staying]
        tokens, sizes = self.merged(left, joining, rule)
        more = [sum(one.importance for one, to, _ in joining if to == other.index) for other in left]
        return [
            Left(one.index, token, size, one.key, one.importance + added)
            for one, token, size, added in zip(left, tokens, sizes, more, strict=True)
        ]

    def by_energy(self, left: list[Left], merge: int, margin: float) -> tuple[list[Array], list[float]]:
        """The tokens of the highest energy are sources and targets in turn, or pruned where half do not suffice."""
        patches, count = left[1:], len(left) - merge
        energy = {}
        for one in patches:
            cosines = [_cosine(one, other, True) for other in patches]
            energy[one.index] = sum(c if c >= margin else math.exp(c - margin) - 1 for c in cosines) / len(patches)
        by_index = {one.index: one for one in patches}
        order = [by_index[index] for index in self.ranked(energy)]
        if count > len(patches) // 2:
            kept = [left[0], *order[count:]]
            return [one.token for one in kept], [one.size for one in kept]
        sources, targets = order[: 2 * count : 2], order[1 : 2 * count : 2]
        joining = [(one, *self.nearest(one, targets, True)) for one in sources]
        return self.merged([left[0], *targets, *order[2 * count :]], joining, "pitome")

    def mlp(self, block: str, token: Array) -> Array:
        hidden = self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", token))
        active = np.array([value * (1 + math.erf(value / math.sqrt(2))) / 2 for value in hidden])
        return self.linear(f"{block}.mlp.fc2", active)

    def logits(self, image: Array, schedule: list[tuple[int, int]]) -> Array:
        """Of `image` `[3, H, W]` at counts after pruning and after merging for each block."""
        tokens = self.tokens_of(image)
        sizes = [1.0] * len(tokens)
        for number, (prune, merge) in enumerate(schedule):
            block = f"blocks.{number}"
            added, seen = self.attention(block, tokens, sizes)
            tokens = [token + more for token, more in zip(tokens, added, strict=True)]
            tokens, sizes = self.reduced(number, tokens, sizes, seen, prune, merge)
            tokens = [token + self.mlp(block, token) for token in tokens]
        if not self.mean:
            return self.linear("head", self.norm("norm", tokens[0]))
        weighted = sum(size * token for size, token in zip(sizes[1:], tokens[1:], strict=True)) / sum(sizes[1:])
        return self.linear("head", self.norm("fc_norm", weighted))
