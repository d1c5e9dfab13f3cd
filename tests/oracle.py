"""The method as the paper and the published system have it, token by token in NumPy: slow, and easy to check.

Every multiplication of a matrix product is counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
LEAST_SIZE = 1e-30


@dataclass
class Oracle:
    """A ViT of timm with a class token, by its tensors. mean: whether patches are averaged for the head, not the class
    token read. least_size: what sizes are raised to."""

    weights: Mapping[str, Array]
    heads: int
    patch: int
    mean: bool
    least_size: float = LEAST_SIZE
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

    def attention(self, block: str, tokens: list[Array], sizes: list[float]) -> tuple[list[Array], list[float]]:
        """What attention adds to each token, and the importance of each: how much the class token attends to it."""
        normed = [self.norm(f"{block}.norm1", token) for token in tokens]
        parts = [np.split(self.linear(f"{block}.attn.qkv", token), 3) for token in normed]
        width = len(tokens[0]) // self.heads
        added, importance = [np.zeros(len(tokens[0])) for _ in tokens], [0.0] * len(tokens)
        for head in range(self.heads):
            own = slice(head * width, (head + 1) * width)
            keys = np.array([key[own] for _, key, _ in parts])
            values = np.array([value[own] for _, _, value in parts])
            for number, (query, _, _) in enumerate(parts):
                scores = self.product(query[own], keys.T) / math.sqrt(width) + np.log(sizes)
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                added[number][own] = self.product(weights, values)
                if number == 0:
                    importance = [
                        total + weight / self.heads for total, weight in zip(importance, weights, strict=True)
                    ]
        return [self.linear(f"{block}.attn.proj", vector) for vector in added], importance

    def reduced(
        self, tokens: list[Array], sizes: list[float], importance: list[float], prune: int, merge: int
    ) -> tuple[list[Array], list[float]]:
        """The tokens that are left, and their sizes."""
        order = [0, *sorted(range(1, len(tokens)), key=lambda index: -importance[index])][: min(prune, len(tokens))]
        merge = min(merge, len(order))
        going, staying = order[merge:], order[:merge]
        groups: dict[int, list[Array]] = {index: [tokens[index]] for index in staying}
        left = {index: sizes[index] for index in staying}
        for source in going if merge > 1 else ():
            cosines = {
                to: float(tokens[source] @ tokens[to])
                / float(np.linalg.norm(tokens[source]) * np.linalg.norm(tokens[to]))
                for to in staying[1:]  # never the class token
            }
            nearest = max(cosines, key=lambda to: cosines[to])
            groups[nearest].append(tokens[source])
            left[nearest] += sizes[source] * cosines[nearest]
        merged = [sum(groups[index]) / len(groups[index]) for index in staying]
        return merged, [max(self.least_size, left[index]) for index in staying]

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
            added, importance = self.attention(block, tokens, sizes)
            tokens = [token + more for token, more in zip(tokens, added, strict=True)]
            tokens, sizes = self.reduced(tokens, sizes, importance, prune, merge)
            tokens = [token + self.mlp(block, token) for token in tokens]
        if not self.mean:
            return self.linear("head", self.norm("norm", tokens[0]))
        weighted = sum(size * token for size, token in zip(sizes[1:], tokens[1:], strict=True)) / sum(sizes[1:])
        return self.linear("head", self.norm("fc_norm", weighted))
