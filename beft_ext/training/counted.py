"""The logits of the positions that count, and no others.

Of a batch of texts few positions predict a token that counts: the answer's, not the prompt's. A
model's output layer is as wide as its vocabulary, so it takes the hidden states of these positions
alone. What a model does to its logits afterwards (a scale, a cap) it does position by position.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from beft_ext.models import output_layer
from beft_ext.models.modes import quiet
from beft_ext.models.wrappers import inside, sharded
from beft_ext.tap import unheard

IGNORED_LABEL = -100  # a label that counts for nothing
AT_ONCE = 2**24  # logits that are widened at a time
# Of a batch: they change what a loss is a mean of, or which labels it compares with.
OWN_COUNT = ("num_items_in_batch", "shift_labels")


def logits_at(
    model: nn.Module, inputs: Mapping[str, Any], at: Tensor, **more: Any
) -> tuple[Tensor, Any]:
    """The logits ``(N, V)`` of some positions of a batch, and the model's whole output.

    Args:
        model: a language model.
        inputs, more: its arguments, ``input_ids`` ``(B, T)`` among them.
        at: ``(N,)``, of a position its row times T and its place in the row.
    """
    rows, tokens = inputs["input_ids"].shape
    head = None if _compiled(model) else output_layer(model)
    if head is None:
        return _kept(model, dict(inputs) | more, at)
    gathered: list[bool] = []

    def gather(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = args[0] if args else None
        if not isinstance(hidden, Tensor) or hidden.ndim != 3 or not _fits(hidden, rows, tokens):
            return None
        gathered.append(True)
        # What stands before the texts (a learnt prompt) is none of the batch's positions.
        return hidden[:, -tokens:].flatten(0, 1)[at.to(hidden.device)][None], *args[1:]

    handle = head.register_forward_pre_hook(gather)
    try:
        output = model(**inputs, **more)
    finally:
        handle.remove()
    logits: Tensor = output.logits
    return (logits[0] if gathered else logits[:, -tokens:].flatten(0, 1)[at]), output


def _fits(hidden: Tensor, rows: int, tokens: int) -> bool:
    return hidden.shape[0] == rows and hidden.shape[1] >= tokens


def _compiled(model: nn.Module) -> bool:
    """Whether a hook that is set now would be overlooked, or outlive itself in compiled code."""
    layers = (model, inside(model), output_layer(inside(model)))
    return any(
        "_orig_mod" in m._modules or m._compiled_call_impl is not None
        for m in layers
        if m is not None
    )


def _kept(model: nn.Module, inputs: dict[str, Any], at: Tensor) -> tuple[Tensor, Any]:
    """Through the model's own ``logits_to_keep``, which is of places in all rows alike."""
    tokens = inputs["input_ids"].shape[1]
    if "logits_to_keep" in inspect.signature(inside(model).forward).parameters:
        kept, place = (at % tokens).unique(return_inverse=True)
        inputs["logits_to_keep"] = kept
        at = at // tokens * len(kept) + place
    output = model(**inputs)
    return output.logits.flatten(0, 1)[at], output


class _LogProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        top = logits.amax(-1, keepdim=True).to(wide)
        parts = zip(*(t.split(_rows_at_once(logits)) for t in (logits, top)), strict=True)
        sums = torch.cat([(part.to(wide) - most).exp_().sum(-1, True) for part, most in parts])
        ctx.save_for_backward(logits, tokens, top, sums)
        found: Tensor = logits.gather(1, tokens).to(wide) - top - sums.log()
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, tokens, top, sums = ctx.saved_tensors
        scale, found = grad.sum(1, True) / sums, torch.empty_like(logits)
        several = (found, logits, tokens, top, scale, grad)
        for into, part, own, most, times, given in zip(
            *(t.split(_rows_at_once(logits)) for t in several), strict=True
        ):
            grads = (part.to(top.dtype) - most).exp_().mul_(-times)
            row = torch.arange(len(grads), device=grads.device)
            for column in range(own.shape[1]):  # one after another: the same sum on every run
                grads[row, own[:, column]] += given[:, column]
            into.copy_(grads)
        return found, None


def _rows_at_once(logits: Tensor) -> int:
    return max(1, AT_ONCE // max(1, logits.shape[-1]))


def log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities of some tokens of each position, in fp32 at least.

    Neither forward nor backward holds the logits of all positions in fp32 where the model's are
    narrower, nor the log-probabilities of all tokens.

    Shape: logits ``(N, V)``; tokens and the result ``(N, C)``.
    """
    found: Tensor = _LogProbabilities.apply(logits, tokens)
    return found


def counted_losses(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Losses of the labels of a batch of texts, and 1 for each that counts, both ``(B, T)``.

    None where most of the labels count, or where the model's own loss is not the mean of these
    losses, which is tried once with one row: the model then has to be asked as a whole.
    """
    counts = _counts(batch)
    if counts is None or not 0 < int(counts.sum()) <= counts.numel() // 2:
        return None
    ahead = _ahead(model, batch, counts)
    return None if ahead is None else _losses(model, batch, ahead)


def _counts(batch: Mapping[str, Any]) -> Tensor | None:
    """``(B, T)``: which labels of texts count; None of a batch that is none of texts."""
    labels, ids = batch.get("labels"), batch.get("input_ids")
    if (
        not isinstance(labels, Tensor)
        or not isinstance(ids, Tensor)
        or labels.ndim != 2
        or labels.shape != ids.shape
        or labels.is_floating_point()
        or any(batch.get(key) is not None for key in OWN_COUNT)
        or _capturing(labels)
    ):
        return None
    return labels.ne(IGNORED_LABEL)


def _told(labels: Tensor, ahead: int) -> Tensor:
    """``(B, T)``: which labels are predicted, by the position ``ahead`` places before."""
    found = labels.ne(IGNORED_LABEL)
    found[:, :ahead] = False
    return found


def losses_of(logits: Tensor, labels: Tensor, ahead: int) -> tuple[Tensor, Tensor]:
    """``(B, T)``: each label's loss by the logits ``ahead`` places before it, and 1 where it has
    one."""
    which = _told(labels, ahead)
    found = -log_probabilities(logits[which.roll(-ahead, 1)], labels[which][:, None])[:, 0]
    return found.new_zeros(labels.shape).masked_scatter(which, found), which.to(found)


def _losses(model: nn.Module, batch: Mapping[str, Any], ahead: int) -> tuple[Tensor, Tensor]:
    labels = batch["labels"]
    which = _told(labels, ahead)
    at = which.flatten().nonzero().flatten() - ahead
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    logits, _ = logits_at(model, inputs, at)
    found = -log_probabilities(logits, labels[which][:, None])[:, 0]
    return found.new_zeros(labels.shape).masked_scatter(which, found), which.to(found)


def _capturing(labels: Tensor) -> bool:
    """Within a CUDA graph nothing may depend on how many labels count."""
    return labels.is_cuda and torch.cuda.is_current_stream_capturing()


# By how many places labels lie after the positions that predict them; None: not told so.
_TRIED: WeakKeyDictionary[nn.Module, int | None] = WeakKeyDictionary()


def untried(model: nn.Module) -> bool:
    """Whether it is not known yet how the model's own loss comes from its logits."""
    return inside(model) not in _TRIED


def try_on(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """Find that out by a batch; of a sharded model once, by the same batch on all ranks."""
    counts, own = _counts(batch), inside(model)
    _TRIED[own] = None
    if counts is not None and bool(counts.any()):
        _TRIED[own] = _found(own, batch, counts)


def _ahead(model: nn.Module, batch: Mapping[str, Any], counts: Tensor) -> int | None:
    own = inside(model)
    if own not in _TRIED:
        if sharded(own):  # other ranks, with other batches, may not come to try
            return None
        _TRIED[own] = _found(own, batch, counts)
    return _TRIED[own]


def _found(model: nn.Module, batch: Mapping[str, Any], counts: Tensor) -> int | None:
    """By the row with the most labels."""
    rows, row = len(counts), int(counts.sum(1).argmax())
    one = {
        k: v[row : row + 1] if isinstance(v, Tensor) and v.ndim and len(v) == rows else v
        for k, v in batch.items()
    }
    # Two losses by chance alike would hardly be so for other labels too.
    turned = one["labels"].where(one["labels"].eq(IGNORED_LABEL), one["input_ids"].flip(1))
    both = {_tried(model, one), _tried(model, one | {"labels": turned})}
    return both.pop() if len(both) == 1 else None


def _tried(model: nn.Module, one: Mapping[str, Any]) -> int | None:
    """0 or 1, by which of them the model's own loss of one row is told; else None, also where
    other logits come from the gathered positions."""
    if _compiled(model) or output_layer(model) is None:
        return None
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    with quiet(model), unheard(model), torch.no_grad():
        output = model(**one)
        loss, logits = getattr(output, "loss", None), getattr(output, "logits", None)
        if not isinstance(loss, Tensor) or loss.ndim or not isinstance(logits, Tensor):
            return None
        if logits.shape[:2] != one["labels"].shape:
            return None
        for ahead in (1, 0):
            losses, counts = losses_of(logits, one["labels"], ahead)
            mean = losses.sum() / counts.sum()
            if float((mean - loss).abs()) <= rounding(loss, logits):
                again = _losses(model, one, ahead)[0].sum() / counts.sum()
                coarse = 2 * torch.finfo(logits.dtype).eps * logits.abs().max()
                close = (again - mean).abs() <= coarse + rounding(loss, logits)
                return ahead if bool(close) else None
    return None


def rounding(loss: Tensor, logits: Tensor) -> float:
    """How far the same loss may be off: a mean's rounding grows with the logarithm of its terms
    (16 for 65,536), a log-probability is as coarse as its logit, and torch adds up a vocabulary
    in few sums, whose errors grow with the root of its size."""
    single, own = torch.finfo(torch.float32).eps, torch.finfo(loss.dtype).eps
    coarse = logits.abs().max() + logits.shape[-1] ** 0.5 / 4
    return 16 * float(own * loss.abs() + single * coarse)
