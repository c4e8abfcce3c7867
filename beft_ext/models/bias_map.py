"""What a bias is, and the map of all of a model's biases by layer and term."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from beft_ext.errors import BeftError

TERMS = (
    "query",
    "key",
    "value",
    "attention_output",
    "mlp_up",
    "mlp_gate",
    "mlp_down",
    "attention_norm",
    "mlp_norm",
    # Of a decoder that looks at an encoder:
    "cross_query",
    "cross_key",
    "cross_value",
    "cross_attention_output",
    "cross_attention_norm",
)


class BiasError(BeftError, ValueError):
    """A model whose biases cannot be found, or that has none as asked."""


@dataclass(frozen=True)
class Bias:
    """One vector of a model: one term in one layer.

    It is ``parameter.view(groups, -1)[:, start:stop]``. A whole parameter or a contiguous slice
    (GPT-2) has one group. A fused projection whose heads are interleaved (GPT-NeoX) has one
    group for each head.

    Attributes:
        term: the kind of bias, such as ``"value"``.
        layer: number of the layer, from 0; an encoder's layers come before the decoder's.
        module: path of the projection or norm in the model.
        parameter: name of the parameter that holds the bias.
        start, stop: the bias's columns within each group.
        groups: number of groups, 1 by default.
        number: of the term's biases in the layer, from 0, in the order of the modules.
        width: number of elements, H.
        name: ``<layer>.<term>``, as in ``biases.safetensors``; ``<layer>.<term>.<number>`` for
            the second and further ones (MobileBERT has several MLPs in a layer).
    Example:
        >>> import beft_ext
        >>> bias = beft_ext.find_biases(model)[2]
        >>> bias.name, bias.width, bias.parameter
        ('0.value', 32, 'bert.encoder.layer.0.attention.self.value.bias')
    """

    term: str
    layer: int
    module: str
    parameter: str
    start: int
    stop: int
    groups: int = 1
    number: int = 0

    @property
    def width(self) -> int:
        """Number of elements, H."""
        return self.groups * (self.stop - self.start)

    @property
    def name(self) -> str:
        """``<layer>.<term>``, and the number where it is not 0."""
        return f"{self.layer}.{self.term}" + (f".{self.number}" if self.number else "")

    def view(self, parameter: Tensor) -> Tensor:
        """The bias within a parameter, as a view.

        Args:
            parameter: the parameter that holds the bias, or a tensor laid out like it.
        Shape:
            parameter ``(P,)``; the view ``(groups, H / groups)``.
        """
        return parameter.view(self.groups, -1)[:, self.start : self.stop]

    def read(self, parameter: Tensor) -> Tensor:
        """The bias within a parameter, as a contiguous copy.

        Args:
            parameter: as for ``view``.
        Shape:
            parameter ``(P,)``; the copy ``(H,)``.
        """
        return self.view(parameter.detach()).clone().reshape(-1)


@dataclass(frozen=True)
class Projection:
    """Where a term's bias is or could be: one projection or norm (or its slice) of one layer.

    ``bias`` names the parameter, ``<module>.bias`` where ``has_bias`` is false. ``linear``: a
    bias may be added; a norm without one (RMSNorm) stays without.
    """

    bias: Bias
    has_bias: bool
    linear: bool


class BiasMap(Sequence[Bias]):
    """Every bias of a model, ordered by layer and term.

    It is a sequence of ``Bias``. Printed, it is a table with a line for each term.

    Args:
        biases: in any order.
    Attributes:
        terms: the terms that were found, in a fixed order.
        layers: number of layers that have a bias, L.
    Example:
        >>> import beft_ext
        >>> biases = beft_ext.find_biases(model)
        >>> len(biases), biases.layers
        (16, 2)
        >>> biases.terms[:3]
        ('query', 'key', 'value')
    """

    def __init__(self, biases: Iterable[Bias]) -> None:
        self._biases = sorted(biases, key=lambda b: (b.layer, TERMS.index(b.term), b.number))

    def __iter__(self) -> Iterator[Bias]:
        return iter(self._biases)

    def __len__(self) -> int:
        return len(self._biases)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self._biases[index]

    @property
    def terms(self) -> tuple[str, ...]:
        """The terms that were found."""
        present = {b.term for b in self._biases}
        return tuple(t for t in TERMS if t in present)

    @property
    def layers(self) -> int:
        """Number of layers with a bias, L."""
        return len({b.layer for b in self._biases})

    def __repr__(self) -> str:
        terms = ", ".join(self.terms) or "no term"
        return f"<BiasMap: {len(self)} biases in {self.layers} layers\n {terms}>"

    def __str__(self) -> str:
        column = max(18, *(1 + len(term) for term in (*self.terms, "")))
        head = f"{'term':<{column}}{'layers':>7}{'width':>8}{'elements':>11}  first parameter"
        lines = [head]
        for term in self.terms:
            own = [b for b in self._biases if b.term == term]
            total = sum(b.width for b in own)
            place = self.place(own[0])
            layers = len({b.layer for b in own})
            lines.append(f"{term:<{column}}{layers:>7}{own[0].width:>8}{total:>11}  {place}")
        return "\n".join(lines)

    def place(self, bias: Bias) -> str:
        """The parameter that holds ``bias``, and which part of it where it is not the whole."""
        if bias.groups > 1:
            return f"{bias.parameter} ({bias.groups} groups, [{bias.start}:{bias.stop}] of each)"
        if bias.start or any(b.start and b.parameter == bias.parameter for b in self._biases):
            return f"{bias.parameter} [{bias.start}:{bias.stop}]"
        return bias.parameter
