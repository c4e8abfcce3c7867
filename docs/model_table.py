"""Which model types are known? Builds a tiny random model of each type of transformers, proves
each bias, and writes docs/models.md.

All of it is float64. By perturbation: with the bias of one layer moved, the first attention in
which anything changes must see exactly one of its operands change: the query, the key or the
value, found among the matrix products around its softmax. The slices of a fused parameter share
no element and leave none out, so each is the whole of what it is called. By gradient: a tap
listens at every bias while a batch of three rows of unequal length, padded, goes forward and
backward in training mode; its statistics must be the sum over the rows of the gradient, and of
its square, that plain autograd gives for each row alone. Some row must reach every bias.

    python docs/model_table.py            # writes docs/models.md
    python docs/model_table.py bert t5    # tells of these alone
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import VARIANTS, class_name, inputs, tiny, types
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from beft_ext.files import whole_file
from beft_ext.models import (
    Bias,
    BiasError,
    BiasMap,
    Projection,
    add_bias,
    find_biases,
    find_projections,
)
from beft_ext.tap import Tap
from beft_ext.training.loss import Divisor, model_loss

OUT = Path(__file__).parent / "models.md"
QKV = ("query", "key", "value")
EXACT = 1e-6  # relative; the arithmetic is float64
STEPS = 2  # a second step must count as the first


@dataclass(frozen=True)
class Verdict:
    """What was found of one type. proved: False where ``why`` says what stands against it.

    padding: "" where a row's padding changes nothing, else how it counts.
    """

    name: str
    model: str
    terms: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    layout: str = ""
    padding: str = ""
    proved: bool = False
    why: str = ""


class Unproved(Exception):
    """What stands against a type, as a sentence."""


def verify(name: str, own: dict[str, Any] | None = None, title: str = "") -> Verdict:
    """Build the type's model and prove each of its biases."""
    title, kind = title or name, class_name(name)
    try:
        model = tiny(name, torch.float64, own)
        batch = inputs(model)
        with torch.no_grad():
            model(**batch)
    except Exception as error:  # transformers' own, of every kind
        return Verdict(title, kind, why=f"no tiny model: {_first(error)}")
    try:
        projections = find_projections(model)
    except BiasError:
        return Verdict(title, kind, why="no query, key and value projections are found")
    verdict = Verdict(title, kind, *_terms(projections), _layout(projections))
    for path in dict.fromkeys(p.bias.module for p in projections if p.linear and not p.has_bias):
        parameter = add_bias(model, path)
        with torch.no_grad():
            parameter.normal_(0, 0.1)
    biases = find_biases(model)
    try:
        attended = [b for b in biases if b.term.removeprefix("cross_") in QKV]
        _perturbed(model, batch, attended)
        _covered(model, attended)
        padding = _moments(model.train(), batch, biases)
    except Exception as error:
        why = str(error) if isinstance(error, Unproved) else _first(error)
        return Verdict(**(vars(verdict) | {"why": why}))
    return Verdict(**(vars(verdict) | {"proved": True, "padding": padding}))


class _Attentions(TorchDispatchMode):
    """Records query, key and value of each softmax attention that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[Tensor, Tensor, Tensor]] = []
        self.found: list[list[Tensor]] = []
        self.weights: Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        kind = func.overloadpacket.__name__
        if kind in ("bmm", "baddbmm", "mm"):
            left, right = args[-2:] if kind == "baddbmm" else args[:2]
            if self.weights is not None and _like(left, self.weights):
                self.found[-1].append(right.clone())
                self.weights = None
            self.products.append((left.clone(), right.clone(), out))
        elif kind == "_softmax":
            near = [p for p in self.products[-4:] if _like(p[2], out)]
            if near and out.ndim >= 3:
                self.found.append([near[-1][0], near[-1][1]])
                self.weights = out
        return out


def _like(a: Tensor, b: Tensor) -> bool:
    """As many elements, but for the one more column of an attention sink."""
    return abs(a.numel() - b.numel()) <= b.numel() // 4


@torch.no_grad()
def _attentions(model: nn.Module, batch: dict[str, Tensor]) -> list[list[Tensor]]:
    torch.manual_seed(0)
    with _Attentions() as seen:
        model(**batch)
    return [found for found in seen.found if len(found) == 3]


def _perturbed(model: nn.Module, batch: dict[str, Tensor], biases: list[Bias]) -> None:
    """Each slice is what it is called. Shared biases move several layers."""
    before = _attentions(model, batch)
    if not before:
        raise Unproved("its attention is not a softmax between two matrix products")
    for bias in biases:
        parameter = model.get_parameter(bias.parameter)
        kept = parameter.detach().clone()
        with torch.no_grad():
            bias.view(parameter).add_(torch.randn_like(bias.view(parameter)))
        after = _attentions(model, batch)
        with torch.no_grad():
            parameter.copy_(kept)
        moved = next(
            (m for a, b in zip(before, after, strict=True) if any(m := _moved(a, b))), None
        )
        wanted = QKV.index(bias.term.removeprefix("cross_"))
        if moved is None:
            raise Unproved(f"the {bias.term} of layer {bias.layer} moves nothing")
        if moved[wanted] < 0.4 or any(m for i, m in enumerate(moved) if i != wanted):
            raise Unproved(f"the {bias.term} of layer {bias.layer} moves {moved}")


def _covered(model: nn.Module, biases: list[Bias]) -> None:
    """Each element of a parameter is in one slice."""
    counts = {b.parameter: torch.zeros_like(model.get_parameter(b.parameter)) for b in biases}
    for bias in biases:
        bias.view(counts[bias.parameter].detach()).add_(1)
    if bad := [name for name, count in counts.items() if not bool((count == 1).all())]:
        raise Unproved(f"the slices of {bad[0]} overlap or leave elements out")


def _moved(before: list[Tensor], after: list[Tensor]) -> list[float]:
    """The share of each operand's elements that changed."""
    pairs = zip(before, after, strict=True)
    return [float(((a - b).abs() > 1e-5).double().mean()) for a, b in pairs]


def _moments(model: nn.Module, batch: dict[str, Tensor], biases: BiasMap) -> str:
    """How padding counts, where the tap's statistics are those of each row alone."""
    padding, rows, counts = _alone(model, batch)
    plain = copy.deepcopy(model)
    expected = _by_autograd(plain, rows, counts, biases)
    total = sum(counts)
    own = [plain.get_parameter(name) for name in dict.fromkeys(b.parameter for b in biases)]
    measured = Divisor(model_loss, own).measured(plain.eval(), batch)
    if measured != total:
        raise Unproved(f"its loss is a mean over {total}, taken for {measured}")
    untouched = model(**batch).loss
    with Tap(model, biases) as tap:
        for _ in range(STEPS):
            tap.step(len(rows), float(total))
            loss = model(**batch).loss
            if not loss.equal(untouched):
                raise Unproved("the tap changes the loss")
            loss.backward()
        found = tap.statistics()
    if unreached := [b for b, grads in expected.items() if not bool(grads.any())]:
        raise Unproved(f"no row reaches the {unreached[0].term} of layer {unreached[0].layer}")
    floor = 1e-9 * max(float(grads.abs().max()) for grads in expected.values())
    for bias, grads in expected.items():
        mean, root = (statistic / STEPS for statistic in found[bias])
        scale = grads.square().sum(0).sqrt()
        for name, value, right in (
            ("mean gradient", mean, grads.sum(0)),
            ("second moment", root.sqrt(), scale),
        ):
            error = (value - right).abs()
            if not bool((error <= EXACT * scale + floor).all()):
                worst = float((error / (scale + floor)).max())
                where = f"the {bias.term} of layer {bias.layer}"
                raise Unproved(f"the {name} of {where} is off by {worst:.1g}")
    return padding


Rows = list[dict[str, Tensor]]


def _alone(model: nn.Module, batch: dict[str, Tensor]) -> tuple[str, Rows, list[int]]:
    """How padding counts, each row as a batch of one, and what its loss is a mean of.

    A row has lost its padding; where the model reads padding, it is kept. The counts are known
    by this: weighted with them, the rows' losses must make the batch's.
    """
    together = float(model(**batch).loss.detach())
    labels = batch["labels"]
    for padding, cut in (("", True), ("read", False)):
        rows = [_row(batch, i, cut) for i in range(len(labels))]
        losses = torch.stack([model(**row).loss.detach() for row in rows])
        for first in (0, 1):  # a causal model predicts from the second token on
            kept = labels[:, first:] != -100 if labels.ndim > 1 else labels[:, None] != -100
            counts = kept.sum(1)
            if abs(float((losses * counts).sum() / counts.sum()) - together) < 1e-9:
                return padding, rows, counts.tolist()
    raise Unproved("the loss of a batch is not the mean of its rows' losses")


def _row(batch: dict[str, Tensor], index: int, cut: bool) -> dict[str, Tensor]:
    """One row, without the padding of its texts where ``cut``."""
    row = {name: tensor[index : index + 1] for name, tensor in batch.items()}
    if not cut:
        return row
    text = row["attention_mask"][0] > 0 if "attention_mask" in row else None
    labelled = row["labels"][0] != -100
    for name, tensor in row.items():
        kept = labelled if name == "labels" else text
        if tensor.ndim == 2 and kept is not None:
            row[name] = tensor[:, kept]
    return row


def _by_autograd(
    model: nn.Module, rows: Rows, counts: list[int], biases: BiasMap
) -> dict[Bias, Tensor]:
    """Gradients ``(B, H)`` of the rows' summed losses, from a batch of one each."""
    names = list(dict.fromkeys(b.parameter for b in biases))
    own = [model.get_parameter(name) for name in names]
    found: dict[Bias, list[Tensor]] = {b: [] for b in biases}
    for row, count in zip(rows, counts, strict=True):
        loss = model(**row).loss * count
        grads = dict(zip(names, torch.autograd.grad(loss, own, allow_unused=True), strict=True))
        for bias in biases:
            grad = grads[bias.parameter]
            if grad is None:
                raise Unproved(f"the {bias.term} of layer {bias.layer} gets no gradient")
            found[bias].append(bias.read(grad))
    return {bias: torch.stack(grads) for bias, grads in found.items()}


def _terms(projections: list[Projection]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The terms, and those to which a bias must be added."""
    added = (p.bias.term for p in projections if p.linear and not p.has_bias)
    return tuple(dict.fromkeys(p.bias.term for p in projections)), tuple(dict.fromkeys(added))


def _layout(projections: list[Projection]) -> str:
    """Which module is fused, and how."""
    holds = Counter(p.bias.module for p in projections)
    fused = [p.bias for p in projections if holds[p.bias.module] > 1]
    if not fused:
        return ""
    kinds = {("per head or group" if b.groups > 1 else "blocks") for b in fused}
    return f"{fused[0].module.rpartition('.')[2]}: {', '.join(sorted(kinds))}"


def _first(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:110].strip()


def verdicts(names: list[str]) -> Iterator[Verdict]:
    """Of each type, and of its other layouts; as many at a time as there are processors."""
    jobs = [
        (name, own, f"{name} ({variant})" if variant else name)
        for name in names
        for variant, own in {"": None, **VARIANTS.get(name, {})}.items()
    ]
    with ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=_alone_here) as pool:
        yield from pool.map(verify, *zip(*jobs, strict=True))


def _alone_here() -> None:
    torch.set_num_threads(1)
    quiet()


def page(found: list[Verdict]) -> str:
    """docs/models.md."""
    proved = [v for v in found if v.proved]
    count = len({v.name.partition(" ")[0] for v in proved})
    lines = [
        "# Model types",
        "",
        f"Written by `docs/model_table.py` with transformers {transformers.__version__}: "
        f"**{count} types verified**.",
        "",
        "Verified means proved, in float64 on a tiny random model of the type. Each slice of",
        "query, key and value moves that alone, and the slices of a parameter hold each element",
        "once. Some row of a batch reaches each bias. For every bias the sum over the rows of the",
        f"gradient and of its square is that of batches of one by plain autograd, to {EXACT:.0e}.",
        "The batch has three texts of unequal length, padded on the tokenizer's side. A row alone",
        "has lost its padding; where *padding* is `read`, it keeps it, for the model computes with",
        "it: left-padded causal models predict the first token of a row from padding.",
        "",
        "*Added* terms have no bias of their own: `prepare` gives them one. Experts of a mixture",
        "have no term: which example trains which expert is decided token by token.",
        "",
        "| type | model | terms | added | fused | padding |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for v in proved:
        cells = (
            v.name,
            v.model,
            ", ".join(v.terms),
            ", ".join(v.added) or "none",
            v.layout,
            v.padding,
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "## Not verified",
        "",
        "A type with other names is described by a hint: `find_biases(model, names={...})`.",
        "",
        "| type | why |",
        "| --- | --- |",
    ]
    lines += [f"| {v.name} | {v.why.replace('|', '/')} |" for v in found if not v.proved]
    return "\n".join(lines) + "\n"


def quiet() -> None:
    """Say nothing but the verdicts."""
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")


def main(names: list[str]) -> None:
    found = []
    for verdict in verdicts(names or types()):
        found.append(verdict)
        print(f"{verdict.name}: {'verified' if verdict.proved else verdict.why}", flush=True)
    if not names:
        with whole_file(OUT) as temporary:
            temporary.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
