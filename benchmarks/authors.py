"""The authors' pipeline, written anew from its description: every bias term trained at once.

Texts are padded to 128 tokens. A first run in evaluation mode, in batches of 8, gives the Fisher
information: per batch, the clipped gradient's mean square. A second run, in batches of 16, trains
with AdamW; then numpy scores each bias against those of the model loaded again.
Source: Huang et al. 2025 (arXiv 2509.15974) and the code published with it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from workloads import padded_to

from beft_ext.models import BiasMap
from beft_ext.tasks.heads import LONGEST_TEXT

Scores = dict[str, dict[str, float]]  # by method and term
FISHER_BATCH, TRAINING_BATCH = 8, 16


def select(
    model: nn.Module,
    biases: BiasMap,
    fisher: Iterable[Mapping[str, Tensor]],
    training: Iterable[Mapping[str, Tensor]],
    lr: float,
) -> Scores:
    """Scores of each term by 'beft', 'magnitude' and 'fisher'. Leaves ``model`` trained.

    fisher, training: the same examples, in batches of 8 and of 16.
    """
    base = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("bias" in name or name.startswith("classifier"))
    names = {b.parameter: b.term for b in biases}
    squares = fisher_run(model, list(names), fisher)
    training_run(model, training, lr)
    found: Scores = {"beft": {}, "magnitude": {}, "fisher": {}}
    for name, term in names.items():
        before, after = (m.get_parameter(name).detach().cpu().numpy() for m in (base, model))
        values = {
            "beft": 1 - projection(after, before),
            "magnitude": float(np.mean(np.abs(after - before))),
            "fisher": squares[name],
        }
        for method, value in values.items():
            found[method][term] = found[method].get(term, 0.0) + value
    layers = 1 + max(b.layer for b in biases)
    return {m: {t: total / layers for t, total in terms.items()} for m, terms in found.items()}


def fisher_run(
    model: nn.Module, names: Sequence[str], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, float]:
    """Mean over batches of the mean square of the clipped gradient."""
    model.eval()
    total, steps = dict.fromkeys(names, 0.0), 0
    for batch in batches:
        model.zero_grad()
        _loss(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for name in names:
            grad = model.get_parameter(name).grad
            total[name] += 0.0 if grad is None else float(np.mean(grad.cpu().numpy() ** 2))
        steps += 1
    return {name: value / steps for name, value in total.items()}


def training_run(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], lr: float) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    model.train()
    model.zero_grad()
    for batch in batches:
        loss = _loss(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.zero_grad()
        loss.item()


def projection(after: np.ndarray, before: np.ndarray) -> float:
    """Of the shorter vector on the longer, as a share of the longer."""
    longer = max(np.linalg.norm(after), np.linalg.norm(before))
    return float(np.dot(after, before) / longer**2)


def _loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    device = next(model.parameters()).device
    inputs = {k: v.to(device) for k, v in padded_to(LONGEST_TEXT, batch).items()}
    labels = inputs.pop("labels")
    logits: Tensor = model(**inputs).logits
    return nn.functional.cross_entropy(logits, labels)
