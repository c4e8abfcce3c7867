"""What other ways of choosing say of the same gradients that the gains are told from.

Each gives a number for every term, the larger the better. All are told from the Gram matrix
``K = G G^T`` of the examples' gradients and the targets ``t``; the gradient of the mean loss is
``G^T t / N`` (docs/definitions.md, section 7).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from beft_ext.gains import Regression
from beft_ext.selection import Gains

Rival = Callable[[Gains], dict[str, float]]


def gradient_norm(gains: Gains) -> dict[str, float]:
    """Length of the mean loss's gradient for an element's root mean square."""
    lengths = _by_term(
        gains, lambda k, r: math.sqrt(max(0.0, float(r.targets @ k @ r.targets))) / len(k)
    )
    return {t: length / gains.elements[t] ** 0.5 for t, length in lengths.items()}


def alignment(gains: Gains) -> dict[str, float]:
    """Correlation of likeness in gradient with likeness in what is to be explained.

    Source: Cortes, Mohri & Rostamizadeh 2012 (arXiv 1203.0550), centred kernel alignment.
    """

    def of(k: Tensor, r: Regression) -> float:
        centred = _centred(k)
        y = r.residuals - r.residuals.mean()
        length = float(centred.norm()) * float(y @ y)
        return float(y @ centred @ y) / length if length else 0.0

    return _by_term(gains, of)


def logme(gains: Gains) -> dict[str, float]:
    """Log evidence, for each example, of a Bayesian linear regression on the gradients.

    Source: You et al. 2021 (arXiv 2102.11005); the same fixed point, told by K's eigenvalues.
    """

    def of(k: Tensor, r: Regression) -> float:
        values, vectors = torch.linalg.eigh(k.double())
        values = values.clamp(min=0) / max(float(values.mean()), 1e-300)
        y = vectors.T @ (r.residuals / r.residuals.std())
        n, precision, noise = len(y), 1.0, 1.0
        for _ in range(100):
            ratio = precision / noise
            shrunk = values / (values + ratio)
            effective = float(shrunk.sum())
            weights = float((shrunk.square() * y.square() / values.clamp(min=1e-12)).sum())
            left = float(((1 - shrunk) * y).square().sum())
            precision = effective / max(weights, 1e-12)
            noise = max(n - effective, 1e-12) / max(left, 1e-12)
        spread = 1 / noise + values / precision
        return float(-0.5 * (spread.log() + y.square() / spread).mean())

    return _by_term(gains, of)


RIVALS: dict[str, Rival] = {
    "gradient norm": gradient_norm,
    "alignment": alignment,
    "LogME": logme,
}


def _by_term(gains: Gains, of: Callable[[Tensor, Regression], float]) -> dict[str, float]:
    evidence = gains.evidence
    assert evidence is not None
    # Of an example of many classes, the row along its label's gradient: the other is the gain's.
    own = evidence.owners.diff(prepend=evidence.owners[:1] - 1).nonzero().flatten()
    regression = evidence.regression.part(own)
    return {t: of(evidence.of_term(t)[own][:, own], regression) for t in gains.ranking}


def _centred(k: Tensor) -> Tensor:
    return k - k.mean(0) - k.mean(1, keepdim=True) + k.mean()
