"""Gradients in any memory layout, for the tests of both operators that read one."""

import torch


def permuted(batch, tokens, width, order, step, dtype, device, seed):
    """Random ``(B, T, H)``, stored in another ``order`` of the axes, every ``step``-th column."""
    shape = [batch, tokens, width * step]
    generator = torch.Generator().manual_seed(seed)
    stored = torch.randn([shape[i] for i in order], generator=generator).to(device, dtype)
    return stored.permute([order.index(i) for i in range(3)])[..., ::step]
