"""``select``: one short run of all candidate terms, and every score from it."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from beft_ext import scores
from beft_ext.files import save_tensors, sweep, whole_file
from beft_ext.loss import Loss, divisor, examples_of, model_loss
from beft_ext.models import Bias, BiasMap, find_biases, head_parameters
from beft_ext.optim import BiasAdamW, rate_factor
from beft_ext.tap import Tap, require_untapped

# In the probe a living term's gradient stands at least six digits above float64's rounding.
DEAD = 1e-10


class SelectionError(RuntimeError):
    """A selection that cannot start or go on; the model is as it was before."""


@dataclass(frozen=True)
class Selection:
    """What one run found. ``scores[method][term]``; ``per_layer[method][term]`` in layer order.

    Numbers that do not exist are NaN here and null in ``selection.json``; ``undefined`` says
    why, ``dead`` names the terms whose gradient is exactly zero, left out of the ranking.
    """

    method: str
    scores: dict[str, dict[str, float]]
    per_layer: dict[str, dict[str, list[float]]]
    ranking: dict[str, list[str]]
    undefined: dict[str, str]
    dead: list[str]
    obtuse: list[str]
    losses: list[float]
    initial: dict[str, Tensor] = field(repr=False)
    current: dict[str, Tensor] = field(repr=False)

    @property
    def best(self) -> str:
        """The first term of the ranking by the chosen method."""
        if not self.ranking[self.method]:
            raise SelectionError(
                f"no term has a defined '{self.method}' score: choose another method, such as "
                "'magnitude'"
            )
        return self.ranking[self.method][0]

    def __str__(self) -> str:
        columns = [m for m in scores.METHODS if m in self.scores]
        order = self.ranking[self.method]
        rest = [t for t in self.scores[self.method] if t not in order]
        lines = [f"{'':>4} {'term':<18}" + "".join(f"{m:>16}" for m in columns)]
        for place, term in enumerate(order + rest, 1):
            rank = f"{place}." if term in order else "-"
            note = "  dead" if term in self.dead else ""
            note += "  undefined" if term in self.undefined else ""
            cells = "".join(f"{self.scores[m][term]:>16.4e}" for m in columns)
            lines.append(f"{rank:>4} {term:<18}{cells}{note}")
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Draw the term x layer heatmap of the chosen method. Needs matplotlib."""
        from beft_ext.plots import heatmap

        with whole_file(path) as temporary:
            heatmap(self.per_layer[self.method], self.method, temporary)

    def save(self, folder: str | Path) -> None:
        """Write ``selection.json``, ``biases.safetensors`` and ``heatmap.png`` into ``folder``."""
        folder = Path(folder)
        tensors = {f"initial/{name}": t for name, t in self.initial.items()}
        tensors |= {f"current/{name}": t for name, t in self.current.items()}
        record = {
            "method": self.method,
            "best": self.ranking[self.method][0] if self.ranking[self.method] else None,
            "ranking": self.ranking,
            "scores": self.scores,
            "per_layer": self.per_layer,
            "undefined": self.undefined,
            "dead": self.dead,
            "above_90_degrees": self.obtuse,
            "losses": self.losses,
        }
        sweep(folder)
        save_tensors(folder / "biases.safetensors", tensors)
        self.plot(folder / "heatmap.png")
        with whole_file(folder / "selection.json") as temporary:
            text = json.dumps(_nulls(record), indent=2, allow_nan=False)
            temporary.write_text(text + "\n", encoding="utf-8")


def select(
    model: nn.Module,
    loader: Iterable[Mapping[str, Tensor]],
    method: str = "beft",
    *,
    loss: Loss = model_loss,
    terms: Sequence[str] | None = None,
    biases: BiasMap | None = None,
    epochs: int = 1,
    steps: int | None = None,
    lr: float = 1e-3,
    warmup: float = 0.0,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    seed: int = 0,
    progress: bool = False,
) -> Selection:
    """Train all candidate terms together for a short run and score each one.

    model: a transformers model whose output has ``loss``, a mean over the batch's examples or,
        with labels ``(B, T)``, over the tokens that count (see ``beft_ext.loss.divisor``).
    loader: batches as keyword arguments of the model, first axis examples.
    method: 'beft', 'magnitude', 'fisher', 'example_fisher' or 'snr'; all are computed.
    loss: of the model and a batch, in place of the output's own.
    terms, biases: candidates; by default every term that ``find_biases`` finds.
    epochs, steps: length of the run; ``steps`` wins. lr: constant after the share ``warmup`` of
        the run. clip: global gradient norm. The authors train with a constant rate of 1e-4 to
        1e-3 by task, without warm-up, clipped to 1, in batches of 16, for 16 to 60 epochs.
    The task head (whatever is outside ``model.base_model``) trains beside the biases.
    The model comes back as it was: weights, ``requires_grad``, training mode, hooks, also after
    Ctrl-C. The same seed gives the same selection to the bit on one machine.
    Raises SelectionError for a non-finite loss or gradient (it names the step), an empty
    loader, an unknown method or term; BiasError where the model has no such biases.
    Source: Huang et al. 2025 (arXiv 2509.15974); DESIGN sections 3 and 4.
    """
    if method not in scores.METHODS:
        raise SelectionError(
            f"unknown method '{method}': choose one of {', '.join(scores.METHODS)}"
        )
    require_untapped(model)
    found = find_biases(model) if biases is None else biases
    candidates = list(found)
    if terms is not None:
        absent = [t for t in terms if t not in found.terms]
        if absent:
            raise SelectionError(
                f"the model has no bias in term '{absent[0]}': it has {', '.join(found.terms)}"
            )
        candidates = [b for b in found if b.term in terms]
    schedule = _schedule(loader, epochs, steps)
    with Unchanged(model), torch.random.fork_rng(devices=_devices(model)):
        torch.manual_seed(seed)
        first = next(iter(loader), None)
        if first is None:
            raise SelectionError("the loader is empty: select needs at least one batch")
        dead = _dead_terms(model, loss, candidates, first)
        with Tap(model, candidates) as tap:
            run = Run(
                model,
                tap,
                loss=loss,
                steps=schedule,
                lr=lr,
                warmup=warmup,
                weight_decay=weight_decay,
                clip=clip,
            )
            losses = run.train(loader, progress)
            return _judge(run, method, dead, losses)


class Unchanged:
    """Gives the model back as it was, whatever happens in between."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        model = self.model
        self.required = [(p, p.requires_grad, p.grad) for p in model.parameters()]
        self.modes = [(m, m.training) for m in model.modules()]
        trained = [p for p in model.parameters() if p.ndim == 1]
        trained += head_parameters(model)
        self.values = [(t, t.detach().clone()) for t in (*trained, *model.buffers())]

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            for tensor, value in self.values:
                tensor.copy_(value)
        for parameter, required, grad in self.required:
            parameter.requires_grad_(required)
            parameter.grad = grad
        for module, mode in self.modes:
            module.training = mode


class Run:
    """The training run: AdamW over the tapped leaves and the task head."""

    def __init__(
        self,
        model: nn.Module,
        tap: Tap,
        *,
        loss: Loss = model_loss,
        steps: int,
        lr: float = 1e-3,
        warmup: float = 0.0,
        weight_decay: float = 0.0,
        clip: float = 1.0,
    ) -> None:
        self.model, self.tap, self.clip, self.steps = model, tap, clip, steps
        self.loss = loss
        self.pairs = tap.leaves()
        head = head_parameters(model)
        model.requires_grad_(False)
        for parameter in head:
            parameter.grad = None
            parameter.requires_grad_(True)
        named = [(bias.name, leaf) for bias, leaf in self.pairs]
        named += [(f"head.{i}", p) for i, p in enumerate(head)]
        self.optimizer = BiasAdamW(named, lr=lr, weight_decay=weight_decay, max_norm=clip)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda i: rate_factor(i, steps, warmup, decay=False)
        )
        self.initial = {b: leaf.detach().clone().flatten() for b, leaf in self.pairs}
        self.batch_sq = {b: 0.0 for b, _ in self.pairs}
        self.examples = self.done = 0

    def train(self, loader: Iterable[Mapping[str, Tensor]], progress: bool) -> list[float]:
        from tqdm import tqdm

        losses: list[float] = []
        self.model.train()
        with tqdm(total=self.steps, disable=not progress, desc="select") as bar:
            while self.done < self.steps:
                before = self.done
                for batch in loader:
                    losses.append(self._step(batch))
                    bar.update()
                    if progress and self.done % 10 == 0:
                        bar.set_postfix(loss=f"{losses[-1]:.3f}", leading=self._leading())
                    if self.done == self.steps:
                        break
                if self.done == before:
                    raise SelectionError("the loader ran dry: pass one that can be read again")
        return losses

    def _step(self, batch: Mapping[str, Tensor]) -> float:
        device = self.pairs[0][1].device
        inputs = {k: v.to(device) for k, v in batch.items()}
        size = examples_of(inputs)
        self.tap.step(size, scale=float(divisor(self.model, inputs)))
        self.optimizer.zero_grad()
        loss = self.loss(self.model, inputs)
        number = float(loss.detach())
        self._stop_unless(math.isfinite(number), "loss")
        loss.backward()
        self.optimizer.step()
        norm = float(self.optimizer.grad_norm)
        self._stop_unless(math.isfinite(norm), "gradient")
        clipped = min(1.0, self.clip / (norm + 1e-6)) if self.clip > 0 else 1.0
        live = self.optimizer.scores()
        for bias, leaf in self.pairs:
            if leaf.grad is not None:
                grad_norm = live[bias.name].grad_norm * clipped
                self.batch_sq[bias] += grad_norm**2 / bias.width
        self.schedule.step()
        self.examples += size
        self.done += 1
        return number

    def _stop_unless(self, fine: bool, what: str) -> None:
        if not fine:
            raise SelectionError(
                f"the {what} is not finite at step {self.done + 1}: nothing was kept; lower the "
                "learning rate or check the data"
            )

    def _leading(self) -> str:
        terms: dict[str, list[float]] = {}
        live = self.optimizer.scores()
        for bias, _ in self.pairs:
            if not math.isnan(live[bias.name].beft):
                terms.setdefault(bias.term, []).append(live[bias.name].beft)
        return max(terms, key=lambda t: sum(terms[t]) / len(terms[t]), default="none")

    def current(self) -> dict[Bias, Tensor]:
        """Each bias ``(H,)`` as it stands, in fp32 where the model is half precision."""
        state = self.optimizer.state
        return {
            b: state[leaf].get("master", leaf).detach().clone().flatten() for b, leaf in self.pairs
        }


def _judge(run: Run, method: str, dead: list[str], losses: list[float]) -> Selection:
    statistics = run.tap.statistics()
    per_layer: dict[str, dict[str, list[float]]] = {m: {} for m in scores.METHODS}
    undefined: dict[str, str] = {}
    obtuse: list[str] = []
    current = run.current()
    for bias in sorted(current, key=lambda b: b.layer):
        b0, b, (total, squares) = run.initial[bias], current[bias], statistics[bias]
        values = {
            "beft": scores.beft_score(b0, b),
            "magnitude": scores.magnitude(b0, b),
            "fisher": run.batch_sq[bias] / run.done,
            "example_fisher": scores.fisher(squares, run.examples),
            "snr": scores.signal_to_noise(total, squares, run.examples),
        }
        for name, value in values.items():
            per_layer[name].setdefault(bias.term, []).append(value)
        if math.isnan(values["beft"]):
            where = "initial" if not bool(b0.any()) else "trained"
            undefined[bias.term] = f"the {where} bias is zero in layer {bias.layer}"
        elif values["beft"] > 1:
            obtuse.append(bias.name)
    means = {m: {t: sum(v) / len(v) for t, v in terms.items()} for m, terms in per_layer.items()}
    return Selection(
        method=method,
        scores=means,
        per_layer=per_layer,
        ranking={m: _rank(values, dead) for m, values in means.items()},
        undefined=undefined,
        dead=dead,
        obtuse=obtuse,
        losses=losses,
        initial={b.name: t.cpu() for b, t in run.initial.items()},
        current={b.name: t.cpu() for b, t in current.items()},
    )


def _rank(values: dict[str, float], dead: list[str]) -> list[str]:
    alive = [t for t, v in values.items() if t not in dead and not math.isnan(v)]
    return sorted(alive, key=lambda t: -values[t])


def _dead_terms(
    model: nn.Module, loss: Loss, biases: list[Bias], batch: Mapping[str, Tensor]
) -> list[str]:
    """Terms whose gradient is zero but for rounding, found in float64 on four examples."""
    probe = copy.deepcopy(model).double().eval().requires_grad_(False)
    names = dict.fromkeys(b.parameter for b in biases)
    parameters = {name: probe.get_parameter(name).requires_grad_(True) for name in names}
    device = next(iter(parameters.values())).device
    few = {k: v[:4].to(device) for k, v in batch.items()}
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in few.items()}
    loss(probe, inputs).backward()
    largest: dict[str, float] = {}
    for bias in biases:
        grad = parameters[bias.parameter].grad
        size = 0.0 if grad is None else float(bias.view(grad).abs().max())
        largest[bias.term] = max(largest.get(bias.term, 0.0), size)
    threshold = DEAD * max(largest.values(), default=0.0)
    return [term for term, size in largest.items() if size <= threshold]


def _schedule(loader: Iterable[Any], epochs: int, steps: int | None) -> int:
    if steps is None:
        if not hasattr(loader, "__len__"):
            raise SelectionError("a loader without a length needs steps=...")
        steps = epochs * len(loader)  # type: ignore[arg-type]
    if steps < 1:
        raise SelectionError("nothing to train on: the loader is empty or epochs and steps are 0")
    return steps


def _devices(model: nn.Module) -> list[torch.device]:
    return list({p.device for p in model.parameters() if p.is_cuda})


def _nulls(value: Any) -> Any:
    """JSON has no NaN: null in its place."""
    clean: Callable[[Any], Any] = _nulls
    if isinstance(value, dict):
        return {k: clean(v) for k, v in value.items()}
    if isinstance(value, list):
        return [clean(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
