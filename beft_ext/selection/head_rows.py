"""The gradients of single examples for a task head, heard beside the biases'."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from beft_ext.models import head_parameters


class HeadRows:
    """A linear layer of the task head, and its gradient for each example, ``(B, out * (in + 1))``.

    batch: number of examples that the next forward has.
    """

    def __init__(self, module: nn.Linear) -> None:
        self.rows: list[Tensor] = []
        self.batch = 0
        self.biased = module.bias is not None
        self.width = module.out_features * (module.in_features + int(self.biased))
        self.handle = module.register_forward_hook(self._forward)

    @classmethod
    def all_of(cls, model: nn.Module) -> list[HeadRows]:
        """Of each layer of the head; none where the head has layers of another kind."""
        own = {id(p) for p in head_parameters(model)}
        layers = [
            m for m in model.modules() if any(id(p) in own for p in m.parameters(recurse=False))
        ]
        if not all(type(m) is nn.Linear for m in layers):
            return []
        return [cls(m) for m in layers if isinstance(m, nn.Linear)]

    def _forward(self, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad and self.batch and len(output) % self.batch == 0:
            given = args[0].detach()
            output.register_hook(lambda grad: self._keep(given, grad))

    def _keep(self, given: Tensor, grad: Tensor) -> None:
        """The outer products of inputs and output gradients, summed over an example's rows."""
        x, d = (t.double().cpu().reshape(self.batch, -1, t.shape[-1]) for t in (given, grad))
        if self.biased:
            x = nn.functional.pad(x, (0, 1), value=1.0)
        self.rows.append((d.mT @ x).flatten(1))

    def all_rows(self) -> Tensor:
        """``(N, out * (in + 1))``."""
        return torch.cat(self.rows) if self.rows else torch.zeros(0, self.width).double()
