"""What examples ask of a term: for each, an output, how much it should change, and its prior.

A row of the gain's regression is the gradient of the output. The sum of the squared equations is
the loss to second order around the present outputs, up to a constant. An example of more than two
classes has two of them. Letters and derivation: docs/definitions.md, section 7.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from beft_ext.training.observed import Observed

CERTAIN = 1e-4  # a class is taken to be no more certain than this, or its example would rule all


@dataclass(frozen=True)
class Equations:
    """One of each example of a batch, B.

    Attributes:
        output: in autograd's graph; its gradient is the example's row.
        targets: ``t``, by how much the output is too large, float64 on the host.
        prior: ``z``, how a class prior changes the output; no column where there is none.
        counts: 0 for an example without a label.
        right: the right classes or options, where there are such.

    Shape: ``(B,)``, ``(B,)``, ``(B, C - 1)``, ``(B,)``, ``(B,)``.
    """

    output: Tensor
    targets: Tensor
    prior: Tensor
    counts: Tensor
    right: Tensor | None

    @classmethod
    def of(cls, seen: Observed, keys: Sequence[object], seed: int, which: int = 0) -> Equations:
        """which: number of the equation, below ``number_of(seen)``. keys: what tells each example
        apart. seed: of the directions that are drawn."""
        counts = seen.counts.detach().double().cpu()
        if seen.residuals is not None and seen.outputs is not None:
            off = seen.residuals.detach().double().cpu()
            return cls(seen.outputs, -off, torch.ones_like(off)[:, None], counts, None)
        if seen.logs is None or seen.right is None:
            roots = counts.clamp(min=1).rsqrt()
            losses = seen.losses.detach().double().cpu() * roots
            prior = losses.new_zeros(len(losses), 0)
            return cls(seen.losses * roots.to(seen.losses), losses, prior, counts, None)
        right = seen.right.cpu()
        logs = seen.logs.detach().double().cpu()
        if which == 0:
            directions, targets = _along(logs, right)
        else:
            directions = _across(logs, right, keys, seed)
            targets = directions.new_zeros(len(directions))
        directions *= (counts > 0)[:, None]
        # -inf is the log of what is impossible: no direction leads there.
        possible = seen.logs.masked_fill(seen.logs.isneginf(), 0)
        output = (directions.to(possible) * possible).sum(-1)
        return cls(output, targets, directions[:, 1:], counts, right)

    def kept(self) -> Equations:
        """Without autograd's graph; the output, which is a row by then, is forgotten."""
        return Equations(self.output.new_zeros(0).cpu(), self.targets, self.prior, self.counts,
                         self.right)  # fmt: skip


def joined(parts: Sequence[Equations]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Targets, prior, counts and right classes of all batches. Where these have options of unlike
    number, there is no prior."""
    alike = len({e.prior.shape[1] for e in parts}) == 1
    priors = [e.prior if alike else e.prior[:, :0] for e in parts]
    rights = [e.right for e in parts if e.right is not None]
    right = torch.cat(rights) if len(rights) == len(parts) and alike else None
    targets, counts = (torch.cat([getattr(e, n) for e in parts]) for n in ("targets", "counts"))
    return targets, torch.cat(priors), counts, right


def number_of(seen: Observed) -> int:
    """How many equations an example has."""
    return 1 if seen.logs is None or seen.logs.shape[-1] < 3 else 2


def _along(logs: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Directions in the space of the logits, along the labels' gradients ``(B, C)``, and the
    targets ``(B,)``, of unit length in the metric of the loss's second derivative."""
    p, hot = logs.exp(), _hot(logs, right)
    told = (p * hot).sum(1).clamp(CERTAIN, 1 - CERTAIN)
    weight = (told / (1 - told)).sqrt()
    return weight[:, None] * (p - hot), 1 / weight


def _across(logs: Tensor, right: Tensor, keys: Sequence[object], seed: int) -> Tensor:
    """Random directions across them, ``(B, C)``, each as long as makes up for the others.

    An example of C classes has C - 1 equations, orthogonal to each other in that metric: all but
    the first say that nothing is asked for there. One, drawn at random, stands for these.
    """
    root, hot = (logs / 2).exp(), _hot(logs, right)
    noise = _noise(keys, logs.shape[1], seed)
    # On the sphere of the roots of probabilities the metric is the plain one.
    own = nn.functional.normalize(root * (root * hot).sum(1, keepdim=True) - hot, dim=1)
    for axis in (root, own):
        noise = noise - (noise * axis).sum(1, keepdim=True) * axis
    return root * nn.functional.normalize(noise, dim=1) * (logs.shape[1] - 2) ** 0.5


def _hot(logs: Tensor, right: Tensor) -> Tensor:
    return nn.functional.one_hot(right.long().clamp(min=0), logs.shape[1]).to(logs)


def _noise(keys: Sequence[object], classes: int, seed: int) -> Tensor:
    """Normal, ``(B, C)``; the same for an example wherever it is read."""
    found = []
    for key in keys:
        generator = torch.Generator().manual_seed(zlib.crc32(repr((seed, key)).encode()))
        found.append(torch.randn(classes, generator=generator, dtype=torch.float64))
    return torch.stack(found)
