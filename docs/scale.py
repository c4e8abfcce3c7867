"""Writes the section "A model of scale" of docs/large-models.md: what a selection takes, computed.

    python docs/scale.py

The formulas are the functions below; tests/test_scale.py holds those of bytes against the tensors
that a selection really makes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from beft_ext.files import whole_file
from beft_ext.models import Bias
from beft_ext.selection.evidence import BANDS, fitting

PAGE = Path(__file__).with_name("large-models.md")
BEGIN, END = "<!-- computed by docs/scale.py -->\n", "<!-- end of what docs/scale.py computed -->\n"

SINGLE, DOUBLE, WHOLE = 4, 8, 8  # bytes of a float, a double, an int64
MEMORY = 2.0**31  # that the rows of the gains may take in a process
GB, TB = 1e9, 1e12


@dataclass(frozen=True)
class Shape:
    """A decoder.

    Attributes:
        widths: of one layer's candidate biases, by term; dead terms are left out.
        matrices: elements of one layer's weights.
        size: bytes of an element of the weights.
    """

    name: str
    layers: int
    hidden: int
    vocabulary: int
    widths: dict[str, int]
    matrices: int
    size: int = 2

    @property
    def elements(self) -> int:
        """Of all candidate biases, P."""
        return self.layers * sum(self.widths.values())

    @property
    def weights(self) -> int:
        """Elements that a token is multiplied with: the layers' and the output layer's."""
        return self.layers * self.matrices + self.vocabulary * self.hidden

    @property
    def biases(self) -> list[Bias]:
        """The candidates."""
        return [
            Bias(term, layer, f"{layer}.{term}", f"{layer}.{term}.bias", 0, width)
            for layer in range(self.layers)
            for term, width in self.widths.items()
        ]


def opt(name: str, layers: int, hidden: int, vocabulary: int = 50272) -> Shape:
    """Every projection and norm has a bias; the key's is dead."""
    wide = 4 * hidden
    widths = dict.fromkeys(("query", "value", "attention_output", "mlp_down"), hidden)
    widths |= {"mlp_up": wide, "attention_norm": hidden, "mlp_norm": hidden}
    return Shape(name, layers, hidden, vocabulary, widths, 4 * hidden**2 + 2 * hidden * wide)


def llama(
    name: str, layers: int, hidden: int, narrow: int, wide: int, vocabulary: int = 32000
) -> Shape:
    """No projection has a bias: each would be added. narrow: of key and value."""
    widths = {"query": hidden, "key": narrow, "value": narrow, "attention_output": hidden}
    widths |= {"mlp_up": wide, "mlp_gate": wide, "mlp_down": hidden}
    matrices = 2 * hidden**2 + 2 * hidden * narrow + 3 * hidden * wide
    return Shape(name, layers, hidden, vocabulary, widths, matrices)


def rows_bytes(shape: Shape, examples: int, ranks: int = 1, memory: float = MEMORY) -> int:
    """The slab: each example's gradients, of one rank. Where they do not fit they are whole numbers
    of few bits, and folded where these do not either."""
    share = -(-examples // ranks)
    bits, columns = fitting(shape.biases, share, memory)
    if bits is None:
        return SINGLE * share * shape.elements
    widths = shape.widths.values()
    kept = [w if columns is None else min(w, columns) for w in widths]
    found = share * (bits * sum(kept) // 8 + SINGLE * len(kept))  # a scale of each row
    if bits == 4:
        found += SINGLE * sum(widths)  # a sign of each element
    if columns is not None:
        # A fold has a sign of each element, and an order of these and of what fills its last piece.
        folded = [w for w in widths if w > columns]
        found += SINGLE * sum(folded) + WHOLE * sum(w + -w % columns for w in folded)
    return shape.layers * found


def statistics_bytes(shape: Shape) -> int:
    """Sums of gradients and of their squares."""
    return 2 * SINGLE * shape.elements


def gram_bytes(shape: Shape, examples: int, ranks: int = 1) -> int:
    """On the host, of one rank: ``K`` by term and band of layers, in the making (this rank's rows)
    and whole, and the eigenvectors of each term."""
    share, terms = -(-examples // ranks), len(shape.widths)
    bands = min(BANDS, shape.layers)
    return DOUBLE * examples * (terms * bands * (share + examples) + terms * examples)


def run_bytes(shape: Shape) -> int:
    """Of the training run: statistics, gradients, and the optimizer's state (two moments, the value
    at the start and, in half precision, the value in fp32)."""
    state = 3 if shape.size == SINGLE else 4
    return statistics_bytes(shape) + (shape.size + SINGLE * state) * shape.elements


def token_operations(shape: Shape, tokens: int) -> int:
    """Of a token in a text of so many: forward, and backward through frozen weights, which asks
    for the gradient of the input alone; 2 for a multiplication and an addition."""
    attention = 4 * tokens * shape.hidden * shape.layers
    return 4 * shape.weights + 3 * attention


def step_bytes(shape: Shape, tokens: int) -> int:
    """Moved at least in a step over so many tokens: weights in forward and backward, the gradients
    that the statistics read, and the optimizer's five reads and three writes."""
    weights = 2 * shape.size * shape.weights
    return weights + shape.size * tokens * shape.elements + 8 * SINGLE * shape.elements


def gathered_bytes(shape: Shape, examples: int, ranks: int, memory: float = MEMORY) -> int:
    """For the Gram matrices, once, to one rank: the rows of all others."""
    _, columns = fitting(shape.biases, -(-examples // ranks), memory)
    widths = (w if columns is None else min(w, columns) for w in shape.widths.values())
    return SINGLE * examples * shape.layers * sum(widths) * (ranks - 1) // ranks


def exchanged_bytes(shape: Shape, ranks: int, sharded: bool) -> int:
    """In a step, to and from one rank: the sum of the gradients; the shards of the weights that
    others hold, once for forward and once for backward."""
    gradients = 2 * SINGLE * shape.elements
    weights = 2 * shape.size * shape.weights if sharded else 0
    return (gradients + weights) * (ranks - 1) // ranks


@dataclass(frozen=True)
class Machine:
    """Rates of one GPU and its links by their makers, which no program reaches in full."""

    name: str = "H100 SXM"
    memory: float = 80 * GB
    operations: float = 989 * TB  # bf16, dense
    bandwidth: float = 3.35 * TB
    inside: float = 450 * GB  # a second between the GPUs of one machine, one way
    between: float = 50 * GB  # a second between machines, for each GPU
    host: float = 64 * GB  # a second from the host's memory
    together: int = 8  # GPUs of one machine


@dataclass(frozen=True)
class Plan:
    """A selection on some GPUs: gains of ``examples``, and a run of one pass over them.

    Attributes:
        batch: rows of a step of all ranks together, one a rank at least.
    """

    shape: Shape
    gpus: int
    examples: int = 1000
    tokens: int = 512
    batch: int = 16
    machine: Machine = Machine()

    @property
    def held(self) -> str:
        """Where the weights are. Half of a GPU's memory is left for what a step keeps."""
        if self.shape.size * self.shape.weights <= self.machine.memory / 2:
            return "on each GPU"
        return "offloaded to the host" if self.gpus == 1 else "sharded"

    @property
    def steps(self) -> int:
        """Forwards and backwards, those of the gains and those of the run."""
        return 2 * -(-self.examples // max(self.batch, self.gpus))

    def seconds(self) -> dict[str, float]:
        """Time at least, by what would bound it alone."""
        machine, shape, ranks = self.machine, self.shape, self.gpus
        texts = 2 * self.examples * self.tokens
        rank_tokens = max(self.batch, ranks) * self.tokens // ranks
        link = machine.inside if ranks <= machine.together else machine.between
        moved = self.steps * 2 * shape.size * shape.weights
        sharded = self.held == "sharded"
        found = {
            "arithmetic": texts * token_operations(shape, self.tokens) / ranks / machine.operations,
            "GPU memory": self.steps * step_bytes(shape, rank_tokens) / machine.bandwidth,
        }
        if ranks > 1:
            exchanged = self.steps * exchanged_bytes(shape, ranks, sharded)
            exchanged += gathered_bytes(shape, self.examples, ranks)
            found["exchange of weights" if sharded else "exchange"] = exchanged / link
        if self.held == "offloaded to the host":
            found["link to the host"] = moved / machine.host
        return found


MODELS = (
    opt("OPT-6.7B", 32, 4096),
    llama("LLaMA-70B", 80, 8192, 1024, 28672),
)
GPUS = (1, 8, 64)


def table() -> str:
    """A line for each model and number of GPUs."""
    lines = [
        "| model | GPUs | weights | weights a GPU | rows of the gains | statistics, state | "
        "Gram matrices, host | operations | moved a step | exchanged a step | rows exchanged, once "
        "| bound by | at least |",
        "|" + " --- |" * 13,
    ]
    for shape in MODELS:
        for gpus in GPUS:
            plan = Plan(shape, gpus)
            whole = shape.size * shape.weights
            here = {"on each GPU": whole, "sharded": whole // gpus}.get(
                plan.held, shape.size * shape.matrices
            )
            tokens = max(plan.batch, gpus) * plan.tokens // gpus
            seconds = plan.seconds()
            bound = max(seconds, key=lambda name: seconds[name])
            operations = 2 * plan.examples * plan.tokens * token_operations(shape, plan.tokens)
            exchanged = exchanged_bytes(shape, gpus, plan.held == "sharded")
            cells = (
                shape.name, gpus, plan.held, size(here),
                size(rows_bytes(shape, plan.examples, gpus)), size(run_bytes(shape)),
                size(gram_bytes(shape, plan.examples, gpus)), f"{operations / 1e15:,.0f} P",
                size(step_bytes(shape, tokens)), size(exchanged),
                size(gathered_bytes(shape, plan.examples, gpus)), bound,
                f"{seconds[bound]:,.1f} s",
            )  # fmt: skip
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def size(count: float) -> str:
    """Bytes for a reader."""
    if count >= 0.1 * GB:
        return f"{count / GB:,.1f} GB"
    return f"{count / 1e6:,.1f} MB" if count else "none"


def section() -> str:
    """What stands between the marks of the page."""
    plan, machine, shape = Plan(MODELS[0], 1), Machine(), MODELS[0]
    examples = plan.examples
    rows, grams, run = rows_bytes(shape, examples), gram_bytes(shape, examples), run_bytes(shape)
    whole = SINGLE * examples * shape.elements
    return f"""
Of one rank of `R`, with `N` examples, `n = N / R`, `P` elements in all candidate biases (the layers
times the widths of a layer's terms), `T` terms in {BANDS} bands of layers, `s` bytes an element of
the weights:

| part | bytes |
| --- | --- |
| gains: rows of examples, on the GPU | `4 n P`, or `memory` ({size(MEMORY)}) where that is less: \
16, 8 or 4 bits, then folded |
| gains: Gram matrices, on the host | `8 N (3 T (n + N) + T N)` |
| sums and sums of squares | `8 P` |
| the run: gradients, optimizer | `s P + 12 P`; `s P + 16 P` in half precision |

A step over `B` texts of `t` tokens, through `W` elements of weights, takes `4 W + 12 t H L`
operations a token: a frozen weight needs no gradient, so backward costs what forward does. It moves
at least `2 s W + s B t P + 32 P` bytes: weights twice, the output gradients that the statistics
read, the optimizer. What is kept from forward to backward is in [memory.md](memory.md). Data
parallel, a rank exchanges `8 P (R - 1) / R` bytes a step, and once, for the Gram matrices,
`4 N P (R - 1) / R` or less; sharded, `2 s W (R - 1) / R` a step more.

{shape.name} in bf16 on one GPU, {examples:,} examples: weights {size(shape.size * shape.weights)};
rows {size(rows)} (whole they would be {size(whole)}); sums, gradients and state
{size(run)}; Gram matrices {size(grams)} on the host.

**Computed, not measured.** A selection of {examples:,} examples of {plan.tokens} tokens (the gains,
and a run of one pass; {plan.batch} rows a step, one for each GPU at least), by the formulas above
and the makers' rates of the {machine.name}: {machine.operations / TB:,.0f} T operations a second in
bf16, {machine.bandwidth / TB:.2f} TB/s of memory, {machine.inside / GB:.0f} GB/s between GPUs of a
machine, {machine.between / GB:.0f} GB/s between machines, {machine.host / GB:.0f} GB/s from the
host. "Offloaded" weights come a layer at a time. "At least" is the time of what bounds it, at rates
that no program reaches. All exchanges but those of sharded weights go through gloo and the host
today, which are slower. Sharded over machines, more GPUs take longer: each step brings all of the
weights to each of them.

{table()}

"""


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    with whole_file(PAGE) as temporary:
        temporary.write_text(before + BEGIN + section() + END + after, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
