"""What measured losses say about schedules that were not measured: a Gaussian process over their features.

Measurements are of few images and noisy, each with a variance that is known. Together they tell the effects of
single choices far better than any two of them would (Matérn kernel of 5/2; Rasmussen and Williams 2006).
"""

from __future__ import annotations

import math

import numpy as np
from scipy.linalg import cho_solve, cholesky, solve_triangular

NUGGET = 1e-5  # of the amplitude, on the diagonal
TRIALS = 24  # of scales
FITTED_ON = 300  # measurements that the scales are chosen on
LIMITS = (-3.0, 2.5)  # of the scales' logarithms


class Surrogate:
    """Fitted to features `[M, F]`, values `[M]` and their variances `[M]`; `groups` of features share a scale."""

    def __init__(self, groups: np.ndarray) -> None:
        self.groups = groups
        self.scales = np.zeros(int(groups.max()) + 2)  # logarithms: of each group, and of the amplitude

    def choose_scales(self, features: np.ndarray, values: np.ndarray, variances: np.ndarray, seed: int) -> None:
        """Scales at which the measurements are likelier than at others drawn near them."""
        rng = np.random.default_rng(seed)
        few = rng.permutation(len(values))[:FITTED_ON]
        best, most = self.scales, -math.inf
        for trial in range(TRIALS):
            drawn = rng.normal(0, 0.7, len(self.scales)) if trial else np.zeros(len(self.scales))
            scales = np.clip(self.scales + drawn, *LIMITS)
            likelihood = self._likelihood(features[few], values[few], variances[few], scales)
            if likelihood > most:
                best, most = scales, likelihood
        self.scales = best

    def fit(self, features: np.ndarray, values: np.ndarray, variances: np.ndarray) -> None:
        """Condition on measurements, at the present scales."""
        self.features, self.centre = features, float(np.median(values))
        self.spread = float(max(values.var(), 1e-8))
        self.factor = self._factor(features, variances, self.scales, self.spread)
        self.weights = cho_solve((self.factor, True), values - self.centre)

    def predict(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the values at `features` `[P, F]`, both `[P]`."""
        cross = self._kernel(features, self.features, self.scales, self.spread)
        explained = solve_triangular(self.factor, cross.T, lower=True)
        amplitude = self.spread * math.exp(self.scales[-1])
        variance = np.maximum(amplitude - (explained**2).sum(0), 1e-12)
        return cross @ self.weights + self.centre, np.sqrt(variance)

    def _likelihood(self, features: np.ndarray, values: np.ndarray, variances: np.ndarray, scales: np.ndarray) -> float:
        try:
            factor = self._factor(features, variances, scales, float(max(values.var(), 1e-8)))
        except np.linalg.LinAlgError:
            return -math.inf
        apart = solve_triangular(factor, values - np.median(values), lower=True)
        return float(-0.5 * apart @ apart - np.log(np.diag(factor)).sum() - 0.1 * (scales**2).sum())

    def _factor(self, features: np.ndarray, variances: np.ndarray, scales: np.ndarray, spread: float) -> np.ndarray:
        kernel = self._kernel(features, features, scales, spread)
        return cholesky(kernel + np.diag(variances + NUGGET * spread * math.exp(scales[-1])), lower=True)

    def _kernel(self, one: np.ndarray, other: np.ndarray, scales: np.ndarray, spread: float) -> np.ndarray:
        weights = np.exp(scales[:-1])[self.groups]
        one, other = one * weights, other * weights
        squares = (one**2).sum(1)[:, None] + (other**2).sum(1)[None] - 2 * one @ other.T
        apart = math.sqrt(5) * np.sqrt(np.maximum(squares, 1e-12))
        return spread * math.exp(scales[-1]) * (1 + apart + apart**2 / 3) * np.exp(-apart)
