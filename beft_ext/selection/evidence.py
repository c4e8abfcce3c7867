"""One pass over labelled examples: what the gains of all terms are told from.

The model stands still: evaluation mode, initial biases, the head as training will start it. Each
example gives a row of gradients; of the rows only Gram matrices are kept, one for each term and
band of layers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from beft_ext.gains import GainError, Regression, together
from beft_ext.models import Bias
from beft_ext.models.offload import device_of
from beft_ext.parallel import Ranks
from beft_ext.selection.equations import Equations, joined, number_of
from beft_ext.selection.examples import Examples, apart, number_of_examples
from beft_ext.selection.head_rows import HeadRows
from beft_ext.slab import TABLES
from beft_ext.tap import Tap
from beft_ext.training.lockstep import Lockstep
from beft_ext.training.loss import Batch, first_rows, offsets_of, on_device, rows_of
from beft_ext.training.observed import Observed
from beft_ext.training.parts import parts_of

Observe = Callable[[nn.Module, Batch], Observed]

BANDS = 3  # of layers, each with Gram matrices of its own
LEAST_COLUMNS = 64  # of a folded bias: fewer tell nothing


@dataclass(frozen=True)
class Evidence:
    """What a pass over examples left: N rows, one of each example, or two that are one group.

    Attributes:
        regression: what is to be explained.
        owners: the number of each row's example, rising.
        grams: ``K`` ``(N, N)``, float64, by term and band of layers (first, last).
        elements: number of a term's elements in a band.
        head: ``K`` of the task head, where it is made of linear layers.
    """

    regression: Regression
    owners: Tensor
    grams: dict[str, dict[tuple[int, int], Tensor]]
    elements: dict[str, dict[tuple[int, int], int]]
    head: Tensor | None

    @property
    def examples(self) -> int:
        """Number of examples."""
        return len(self.owners.unique())

    def of_term(self, term: str) -> Tensor:
        """``K`` of all layers of a term."""
        return torch.stack(list(self.grams[term].values())).sum(0)


def bands(layers: Sequence[int]) -> list[tuple[int, int]]:
    """A few ranges (first, last) that the layers fall into, of equal size as far as can be."""
    ordered = sorted(set(layers))
    count = min(BANDS, len(ordered))
    cuts = [len(ordered) * k // count for k in range(count + 1)]
    return [(ordered[a], ordered[b - 1]) for a, b in itertools.pairwise(cuts)]


@dataclass
class Collector:
    """Reads batches until it has enough examples; ``evidence`` may be asked in between.

    Args:
        model: prepared for the pass: tapped, frozen, in evaluation mode.
        tap: at the candidate biases.
        names: the candidate that each bias counts for.
        observe: the losses of a batch's examples.
        examples: at most, N.
        memory: bytes that the rows may take; where they need more, biases are folded.
        seed: of the folding, and of the directions that are drawn of many classes.
        ranks: each reads batches of its own. Examples are numbered in the order of the steps and,
            within a step, of the ranks, as if one process had read the batches of a step as one.
        groups: key of the batches, not the model's, whose values say which examples belong
            together; None where there is none.
        each: rows that an example is expected to take.
        parts: that a batch is read in.
    Attributes:
        total: examples that all ranks have read.
        rows: of this rank's slab, that are filled.
        owners: the number of the example that each is of.
    """

    model: nn.Module
    tap: Tap
    names: Mapping[Bias, str]
    observe: Observe
    examples: int
    memory: float
    seed: int
    ranks: Ranks
    groups: str | None = None
    each: int = 1
    parts: int = 1
    rows: int = 0
    total: int = 0
    owners: list[int] = field(default_factory=list)
    asked: list[Equations] = field(default_factory=list)
    keys: list[tuple[object, object]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.biases = [bias for bias, _ in self.tap.leaves()]
        share = -(-self.examples // self.ranks.size) * self.each
        bits, self.columns = fitting(self.biases, share, self.memory)
        self.tap.keep_rows(share, self.columns, self.seed, bits)
        self.heads = HeadRows.all_of(self.model)
        self.lockstep = Lockstep(self.model, self.ranks, examples=self._locate)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While batches are read: the task head is heard."""
        try:
            yield
        finally:
            for head in self.heads:
                head.handle.remove()

    def read(self, batches: Iterator[Batch], count: int) -> bool:
        """Read until there are ``count`` examples; False where the batches ran out before."""
        while self.total < count:
            batch = next(batches, None)
            sizes = self.ranks.gather(None if batch is None else number_of_examples(batch))
            if all(size is None for size in sizes):
                return False
            left = self.examples - self.total
            taken: list[int] = []
            for size in sizes:
                taken.append(min(size or 0, left - sum(taken)))
            first = self.total + sum(taken[: self.ranks.rank])
            self._read(batch or {}, taken[self.ranks.rank], first)
            self.total += sum(taken)
        return True

    def _read(self, batch: Batch, size: int, first: int) -> None:
        """Read ``size`` examples of a batch; the first of them is number ``first`` of all."""
        batch, own = apart(batch if size else {}, self.groups)
        if own is not None and len(own) < size:
            raise GainError(f"'{self.groups}' has {len(own)} values for {size} examples")
        inputs = on_device(batch, device_of(self.model))
        offsets = offsets_of(inputs)
        if offsets is not None and size < len(offsets) - 1:
            raise GainError(
                f"a packed batch has {len(offsets) - 1} texts, but {size} of {self.examples} "
                "examples are left to read: allow more examples, or pack fewer"
            )
        if offsets is None and size:
            inputs = first_rows(inputs, size)
        self.tap.rest()
        self.lockstep.settle(inputs, examples=self.tap.unlocated(size, offsets))
        if size == 0:
            return self._along()
        groups: Sequence[object] = [None] * size if own is None else own
        for part in parts_of(inputs, self.parts):
            count = size if offsets is not None else rows_of(part)
            self._read_part(Examples(part, count, first, offsets), groups)
            first, groups = first + count, groups[count:]

    def _read_part(self, part: Examples, groups: Sequence[object]) -> None:
        if self.tap.unlocated(part.size, part.offsets) is not None:
            self._locate(part.inputs)
        done, number = 0, 1
        while done < number:
            number = self._differentiate(part, done)
            self.keys += zip(part.keys, groups, strict=False)
            done += 1

    def _differentiate(self, part: Examples, which: int) -> int:
        """Keep the rows of one equation of each example; how many of them an example has."""
        size = part.size
        self.tap.step(size, 1.0, part.offsets, row=self.rows)
        for head in self.heads:
            head.batch = size if part.offsets is None else 0
        with torch.enable_grad():
            seen = self.observe(self.model, part.inputs)
            if len(seen.losses) != size:
                raise GainError(f"a batch of {size} examples has {len(seen.losses)} losses")
            part.require_finite("loss", seen.losses)
            asked = Equations.of(seen, part.keys, self.seed, which)
            part.require_finite("output", asked.output)
        self.lockstep.begin_backward()
        asked.output.sum().backward()
        for _, leaf in self.tap.leaves():
            leaf.grad = None
        self.rows += size
        self.asked.append(asked.kept())
        self.owners += range(part.first, part.first + size)
        return number_of(seen)

    def _along(self) -> None:
        """A step in which others have rows."""
        for head in self.heads:
            head.batch = 0
        leaves = [leaf for _, leaf in self.tap.leaves()]
        for _ in range(self.each):
            self.lockstep.along(self._losses, leaves)

    def _losses(self, batch: Batch) -> Tensor:
        with torch.enable_grad():
            return self.observe(self.model, batch).losses.sum()

    def _locate(self, inputs: Batch) -> None:
        def run(given: Batch) -> Observed:
            return self.observe(self.model, given)

        self.tap.locate(run, inputs, number_of_examples(inputs), offsets_of(inputs))

    def evidence(self) -> Evidence:
        """Of what was read so far. Raises GainError where no gain can be told from it."""
        owners, asked, keys = self._of_all()
        targets, prior, counts, right = joined(asked)
        order = owners.argsort(stable=True)  # an example's rows side by side
        kept = order[counts[order] > 0]
        if (count := len(owners[kept].unique())) < 3:
            raise GainError(f"a gain needs at least 3 examples, but only {count} have a label")
        texts, groups = zip(*(keys[i] for i in kept.tolist()), strict=True)
        regression = Regression(targets[kept], prior[kept], together(texts, groups))
        if right is not None and len(right[kept].unique()) == 1:
            raise GainError(
                f"every example has the label {int(right[kept][0])}: there is nothing to tell apart"
            )
        labelled = (
            torch.cat([e.counts for e in self.asked]) > 0 if self.asked else torch.zeros(0) > 0
        )
        numbers = torch.tensor(self.owners)[labelled]
        parts: dict[str, dict[tuple[int, int], Tensor]] = {}
        elements: dict[str, dict[tuple[int, int], int]] = {}
        cuts = {
            name: bands([b.layer for b in self.biases if self.names[b] == name])
            for name in dict.fromkeys(self.names[b] for b in self.biases)
        }
        for bias in self.biases:
            rows, name = self.tap.rows(bias, self.rows), self.names[bias]
            _require_finite(rows.square().sum(1).cpu()[labelled], bias, numbers)
            product = self._against_all(rows)
            band = next(b for b in cuts[name] if b[0] <= bias.layer <= b[1])
            mine, sizes = parts.setdefault(name, {}), elements.setdefault(name, {})
            mine[band] = mine[band] + product if band in mine else product
            sizes[band] = sizes.get(band, 0) + bias.width

        def whole(mine: Tensor) -> Tensor:
            """``K`` from each rank's rows of it."""
            return torch.cat(list(self.ranks.rows(mine[:, kept])))[kept]

        grams = {name: {b: whole(k) for b, k in own.items()} for name, own in parts.items()}
        return Evidence(regression, owners[kept], grams, elements, self._head(whole))

    def _head(self, whole: Callable[[Tensor], Tensor]) -> Tensor | None:
        """``K`` of the task head; None where not all of it was heard."""
        heard = [h for h in self.heads if sum(map(len, h.rows)) == self.rows]
        if not all(self.ranks.gather(bool(heard) and len(heard) == len(self.heads))):
            return None
        return whole(torch.stack([self._against_all(h.all_rows()) for h in heard]).sum(0))

    def _of_all(self) -> tuple[Tensor, list[Equations], list[tuple[object, object]]]:
        """Of all rows, one rank's after another's: the numbers of their examples, what each batch
        asks, and what tells each example apart."""
        told = self.ranks.gather((self.owners, self.asked, self.keys))
        owners, asked, keys = (
            list(itertools.chain.from_iterable(parts)) for parts in zip(*told, strict=True)
        )
        return torch.tensor(owners), asked, keys

    def _against_all(self, rows: Tensor) -> Tensor:
        """Inner products of this rank's rows with those of all ranks, one rank's after another's,
        ``(n, N)`` in float64 on the host; computed in the rows' dtype, which has room for them."""
        return torch.cat([(rows @ other.T).double().cpu() for other in self.ranks.rows(rows)], 1)


def _require_finite(squares: Tensor, bias: Bias, numbers: Tensor) -> None:
    """squares: sums of squares of the gradients of the examples that have these numbers."""
    if not bool(squares.isfinite().all()):
        at = int(numbers[int((~squares.isfinite()).nonzero()[0])])
        raise GainError(
            f"the gradient of example {at} is not finite at '{bias.name}': check that row, or "
            "load the model in a wider dtype"
        )


def fitting(biases: Sequence[Bias], rows: int, memory: float) -> tuple[int | None, int | None]:
    """In how many bits rows must be kept to fit, None for their own dtype, and into how many
    columns biases must be folded besides, None where they need not.

    Raises GainError where not even narrow ones do.
    """
    widths = [b.width for b in biases]
    low, high = 0, max(widths)

    def needed(columns: int, bits: int = 4) -> float:
        """Bytes of whole numbers, the rows' scales included."""
        return rows * sum(math.ceil(bits * min(width, columns) / 8) + 4.0 for width in widths)

    if 4.0 * rows * sum(widths) <= memory:
        return None, None
    for bits in TABLES:
        if needed(high, bits) <= memory:
            return bits, None
    while low < high:  # the widest that fits
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needed(middle) <= memory else (low, middle - 1)
    if low < LEAST_COLUMNS:
        raise GainError(
            f"{rows} rows of gradients of {len(biases)} biases need "
            f"{math.ceil(needed(LEAST_COLUMNS) / 2**20)} MiB even when folded, but "
            f"{memory / 2**20:.0f} MiB are allowed: read fewer examples or allow more memory"
        )
    return 4, low
