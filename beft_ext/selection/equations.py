"""What examples ask of a term: for each, an output, how much it should change, and its prior.

A row of the gain's regression is the gradient of the output. The sum of the squared equations is
the loss to second order around the present outputs, up to a constant. Letters and derivation:
docs/definitions.md, section 7.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from beft_ext.training.observed import Observed

CERTAIN = 1e-4  # a class is taken to be no more certain than this, or its example would rule all
OWN = 0.5  # share of the examples of three classes and more that say what their label asks for


@dataclass(frozen=True)
class Equations:
    """Of a batch of B examples.

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
    def of(cls, seen: Observed, keys: Sequence[object], seed: int) -> Equations:
        """keys: what tells each example apart. seed: of the directions that are drawn."""
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
        directions, targets = _directions(seen.logs.detach().double().cpu(), right, keys, seed)
        directions *= (counts > 0)[:, None]
        # -inf is the log of what is impossible: no direction leads there.
        logs = seen.logs.masked_fill(seen.logs.isneginf(), 0)
        output = (directions.to(logs) * logs).sum(-1)
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


def _directions(
    logs: Tensor, right: Tensor, keys: Sequence[object], seed: int
) -> tuple[Tensor, Tensor]:
    """In the space of the logits, a direction ``(B, C)`` for each example, and its target ``(B,)``.

    An example of C classes has C - 1 equations, which are orthogonal to each other in the metric
    of the loss's second derivative: the first has all of the target, along its label's gradient;
    the others say that nothing is asked for across it. Of two classes the first is all. Of more,
    one stands for all: the first with probability ``OWN``, else a random one of the others, each
    as large as makes up for those that were not drawn.
    """
    p, own = logs.exp(), right.long().clamp(min=0)[:, None]
    told = p.gather(1, own).clamp(CERTAIN, 1 - CERTAIN)
    weight = (told / (1 - told)).sqrt()
    hot = nn.functional.one_hot(own[:, 0], p.shape[1])
    first, targets = weight * (p - hot), 1 / weight[:, 0]
    others = p.shape[1] - 2
    if others < 1:
        return first, targets
    coins, noise = _drawn(keys, p.shape[1], seed)
    # On the sphere of the roots of probabilities the metric is the plain one.
    root = p.sqrt()
    label = nn.functional.normalize(root * root.gather(1, own) - hot, dim=1)
    for axis in (root, label):
        noise = noise - (noise * axis).sum(1, keepdim=True) * axis
    across = root * nn.functional.normalize(noise, dim=1)
    chosen = coins < OWN
    directions = torch.where(
        chosen[:, None], first / math.sqrt(OWN), across * math.sqrt(others / (1 - OWN))
    )
    return directions, torch.where(chosen, targets / math.sqrt(OWN), 0.0)


def _drawn(keys: Sequence[object], classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """A coin ``(B,)`` and normal noise ``(B, C)``; the same for an example wherever it is read."""
    coins, noise = [], []
    for key in keys:
        generator = torch.Generator().manual_seed(zlib.crc32(repr((seed, key)).encode()))
        coins.append(torch.rand(1, generator=generator, dtype=torch.float64))
        noise.append(torch.randn(classes, generator=generator, dtype=torch.float64))
    return torch.cat(coins), torch.stack(noise)
