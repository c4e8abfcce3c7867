"""What happens at one tapped projection, in forward and in backward.

When the gradient of the projection's output arrives, ``bias_grad_stats`` reduces it once. The
projection's own bias is frozen, so autograd does not reduce it a second time; what trains is a leaf
tensor over the same memory, one per bias (a slice of a fused QKV parameter has its own). Forward is
unchanged to the bit.

The first output of a step's forward passes through an identity, whose node in autograd's graph has
all leaves behind it: made first, it runs last. At every later output that requires a gradient a
hook listens, which costs a fraction of a node, and leaves the bias's gradient with the first. An
output that requires none (nothing trains below it) gets an identity of its own; so does every
output in a compiled model, in a recomputed forward, and beside any step.

What a step knows (batch, scale, uses) is read when a backward runs, also in a compiled model:
there the backward is one operator that the compiler does not look into.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from beft_ext.layouts import Layout, Place, TapError
from beft_ext.models import Bias
from beft_ext.ops import bias_grad_stats
from beft_ext.ops.reference import example_grads
from beft_ext.slab import SiteSlab

Use = tuple["Listener", int]  # the module, and which of its uses within a step
# In place of the number of a use within its step.
RECOMPUTED, STALE = -1, -2


@dataclass
class Site:
    """One biased projection: its biases, their trainable leaves, its statistics.

    The statistics cover the whole parameter, ``(P,)``; a bias reads its slice of them.
    """

    place: int  # among the tap's sites
    parameter: nn.Parameter
    grad_sum: Tensor
    grad_sum_sq: Tensor
    biases: list[Bias] = field(default_factory=list)
    leaves: list[Tensor] = field(default_factory=list)
    aliases: list[Tensor] = field(default_factory=list)  # whose nodes tell if leaves get a grad
    nodes: list[Any] = field(default_factory=list)  # these
    uses: int = 0  # forwards within one step
    pending: Tensor | None = field(default=None)  # (B, P) of a site used several times in a step
    slab: SiteSlab | None = None  # keeps the examples' gradients, in place of the statistics

    def add(self, bias: Bias, leaf: Tensor) -> None:
        """One more of the parameter's biases, with what trains in its place."""
        whole = leaf.numel() == self.parameter.numel()
        with torch.enable_grad():
            behind = alias(leaf, self.parameter.shape if whole else leaf.shape)
        self.biases.append(bias)
        self.leaves.append(leaf)
        self.aliases.append(behind)
        self.nodes.append(behind.grad_fn)

    def trained(self) -> bool:
        """Whether the backward that runs is to reach a leaf."""
        return any(map(torch._C._will_engine_execute_node, self.nodes))

    def of_leaves(self, grad: Tensor, given: Sequence[Tensor]) -> list[Tensor]:
        """The parts of a gradient ``(P,)``, each as ``given``: the aliases or the leaves."""
        grad = grad.to(self.parameter.dtype)
        pairs = zip(self.biases, given, strict=True)
        return [grad if like.ndim == 1 else bias.view(grad) for bias, like in pairs]

    def finish_step(self, first: int | None) -> None:
        """What can be done once all uses are summed; ``first``: the step's first row of a slab."""
        if self.pending is None:
            return
        if self.slab is not None and first is not None:
            self.slab.put(first, self.pending)
        else:
            self.grad_sum += self.pending.sum(0)
            self.grad_sum_sq += self.pending.square().sum(0)
        self.pending = None


def refuse_copy(_self: object, _protocol: Any) -> NoReturn:
    raise TapError("a tapped model can neither be copied nor saved whole: remove the tap first")


class Gathered:
    """The bias gradients of a forward's outputs, until the node that all leaves are behind runs.

    sites: whose leaves are behind that node, in this order.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites = sites
        self.grads: dict[int, Tensor] = {}  # by the site's place
        self.taken = False

    def put(self, site: Site, grad: Tensor) -> None:
        """Of one use of a site; uses add up. Raises TapError where that node has run already."""
        if self.taken:
            raise TapError(
                "a gradient came after that of the first output that the tap heard of: run forward "
                "and backward on one device, in one piece"
            )
        before = self.grads.get(site.place)
        self.grads[site.place] = grad if before is None else before + grad

    def take(self) -> Iterator[Tensor | None]:
        """For each leaf of each site what has come; then nothing is left."""
        grads, self.grads = self.grads, {}
        self.taken = bool(grads)  # or a gradient of something else passed through
        for site in self.sites:
            grad = grads.get(site.place)
            if grad is None:
                yield from (None for _ in site.leaves)
            else:
                yield from site.of_leaves(grad, site.aliases)


class Step:
    """What a backward must know of the step that it belongs to."""

    number: int = 0
    announced: bool = False
    begun: bool = False  # a backward has begun: a later forward is of no announced step
    batch: int = 0
    scale: float = 1.0
    offsets: Tensor | None = None
    row: int | None = None  # of the slab, for the first example; None where statistics are kept
    called: tuple[nn.Module, tuple[Any, ...], dict[str, Any]] | None = None
    visit: Callable[[Listener, Tensor], Tensor] | None = None  # of a run that locates
    gathered: Gathered | None = None  # from the first output of an announced step's forward on

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites = sites


def alias(tensor: Tensor, shape: torch.Size) -> Tensor:
    """The same memory, but no view to autograd: Longformer scales its query in place, and an
    optimizer its leaves."""
    found: Tensor = torch.ops.aten._unsafe_view(tensor, shape)
    return found


class Identity(torch.autograd.Function):
    # With a setup_context of its own torch would parse forward's signature at each call.
    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        listener: Listener,
        number: int,
        use: int,
        gathered: Gathered | None,
        *leaves: Tensor,
    ) -> Tensor:
        ctx.listener, ctx.number, ctx.use, ctx.gathered = listener, number, use, gathered
        return alias(output, output.shape)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        listener, gathered = ctx.listener, ctx.gathered
        site, passed = listener.site, (grad_output, None, None, None, None)
        if torch.compiler.is_compiling():
            grad = torch.ops.beft_ext.tap_backward(grad_output, listener.handle, ctx.use)
            return *passed, *site.of_leaves(grad, site.leaves)
        if site.trained():
            grad = listener.reduce(grad_output, ctx.use, ctx.number)
            if gathered is None:
                return *passed, *site.of_leaves(grad, site.aliases)
            gathered.put(site, grad)
        if gathered is None:  # a gradient of something else passes through
            return *passed, *(None for _ in site.leaves)
        return *passed, *gathered.take()


class Listener:
    """The forward hook of one module, and where its examples lie."""

    known: ClassVar[weakref.WeakValueDictionary[int, Listener]] = weakref.WeakValueDictionary()
    count: ClassVar[int] = 0

    def __init__(
        self, path: str, site: Site, step: Step, locate_examples: Callable[[], None]
    ) -> None:
        self.path, self.site, self.step = path, site, step
        self.locate_examples = locate_examples
        self.uses = 0
        self.reduced: set[int] = set()  # uses of this step whose backward ran
        self.layouts: dict[tuple[bool, int], Place | None] = {}
        Listener.count += 1
        self.handle = Listener.count
        self.known[self.handle] = self

    def __call__(self, module: nn.Module, _args: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            kind = type(module).__name__
            raise TapError(f"a {kind} gives out a {type(output).__name__}, not a tensor")
        step, site = self.step, self.site
        if step.visit is not None:
            return step.visit(self, output)
        compiling = torch.compiler.is_compiling()
        use = self._use(compiling)
        tapped: Tensor
        if compiling:
            tapped = Identity.apply(output, self, -1, use, None, *site.leaves)
            return tapped
        if use < 0 or not torch.is_grad_enabled():
            tapped = Identity.apply(output, self, step.number, use, None, *site.aliases)
            return tapped
        if step.gathered is None:
            step.gathered = Gathered(step.sites)
            every = (a for s in step.sites for a in s.aliases)
            tapped = Identity.apply(output, self, step.number, use, step.gathered, *every)
            return tapped
        node = _source(output) if output.requires_grad else None
        if node is None:
            tapped = Identity.apply(output, self, step.number, use, None, *site.aliases)
            return tapped
        node.register_prehook(partial(self._arrived, output.shape, use, step.number, step.gathered))
        return output

    def _arrived(
        self,
        shape: torch.Size,
        use: int,
        number: int,
        gathered: Gathered,
        grads: tuple[Tensor | None, ...],
    ) -> None:
        """The hook of an output, when its gradient is there; zero where it is None."""
        grad = grads[0]
        if grad is not None and self.site.trained():
            gathered.put(self.site, self.reduce(grad, use, number, shape))

    def _use(self, compiling: bool) -> int:
        """The number of this use within the step; counts it."""
        if not compiling and torch._C._current_graph_task_id() != -1:
            return RECOMPUTED  # activation checkpointing, within a backward
        if not self.step.announced or self.step.begun:
            return STALE
        use = self.uses
        self.uses += 1
        self.site.uses += 1
        return use

    def reduce(
        self,
        grad_output: Tensor,
        use: int,
        number: int | None = None,
        shape: torch.Size | None = None,
    ) -> Tensor:
        """The bias gradient ``(P,)``; the statistics of an announced step are added to.

        shape: of the output, where the gradient's is another with the same elements in order.
        """
        site, step = self.site, self.step
        dtype, width = site.grad_sum.dtype, grad_output.shape[-1]
        if width != len(site.grad_sum):
            raise TapError(f"'{self.path}' gives out {width} columns, not {len(site.grad_sum)}")
        if (grad_output.dtype == torch.float64) != (dtype == torch.float64):
            grad_output = grad_output.to(dtype)
        if not step.announced:
            return grad_output.reshape(-1, width).sum(0, dtype=dtype)
        if use == STALE or use in self.reduced or (number or 0) not in (0, -1, step.number):
            raise TapError(
                "a backward that no step announced: call Tap.step before each forward, and run "
                "one backward for it"
            )
        step.begun = True
        if use != RECOMPUTED:
            self.reduced.add(use)
        dy = self._by_example(grad_output, shape or grad_output.shape, use)
        if site.slab is not None and step.row is not None and site.uses < 2:
            return site.slab.take(step.row, dy, step.offsets, step.scale)
        if site.uses < 2:
            return bias_grad_stats(
                dy, site.grad_sum, site.grad_sum_sq,
                example_offsets=step.offsets, scale=step.scale,
            )  # fmt: skip
        # Squares may be taken only of the sum over all uses: keep (B, P) until the step ends.
        grads = example_grads(dy, step.offsets)
        scaled = grads * step.scale
        site.pending = scaled if site.pending is None else site.pending + scaled
        return grads.sum(0)

    def _by_example(self, grad_output: Tensor, shape: torch.Size, use: int) -> Tensor:
        """``(B, rows, H)``, or ``(N, H)`` of a packed batch, of an output of this shape."""
        step, width = self.step, grad_output.shape[-1]
        if step.batch == 1 and step.offsets is None:
            return grad_output.reshape(1, -1, width)
        layout = self._layout(use)
        if isinstance(layout, Layout):
            # One example after another, as nearly always: one view in place of four.
            first = layout.axis == 0 and layout.outer and len(shape) > 1
            if first and shape[0] % step.batch == 0 and shape.numel():
                return grad_output.reshape(step.batch, -1, width)
            return layout.by_example(grad_output.reshape(shape), step.batch)
        assert step.offsets is not None
        rows = grad_output.reshape(-1, grad_output.shape[-1])
        if len(rows) != int(step.offsets[-1]):
            raise TapError(
                f"'{self.path}' gives out {len(rows)} rows, but the packed batch has "
                f"{int(step.offsets[-1])} tokens"
            )
        return rows

    def _layout(self, use: int) -> Place:
        packed = self.step.offsets is not None
        if (known := self.layouts.get((packed, use))) is not None:
            return known
        for _ in range(2):
            mine = {u: at for (p, u), at in self.layouts.items() if p == packed}
            # A use that was not there when the examples were located lies as all others do.
            found = mine[use] if use in mine else _only(mine.values())
            if found is not None:
                return found
            if not mine:
                self.locate_examples()
        raise TapError(
            f"which rows of '{self.path}' belong to which example cannot be told: its output does "
            "not change with one example alone (texts of a packed batch that see each other do so; "
            "config.use_cache=False keeps them apart). Leave its terms out, or use batches of one"
        )

    __reduce_ex__ = refuse_copy


def _source(output: Tensor) -> Any:
    """The node whose one output's gradient is that of ``output``, however it is changed in place
    later on; None where there is none.

    Linear layers give out a view of another shape; what is written to it is written to its base,
    whose node stays in the graph while the view's does not.
    """
    if output._is_view():
        base = output._base
        if base is None or not base.requires_grad or base.numel() != output.numel():
            return None
        alike = base.shape[-1:] == output.shape[-1:] and base.is_contiguous()
        if not alike or not output.is_contiguous():
            return None
        output = base
    return output.grad_fn if output.output_nr == 0 else None


def _only(layouts: Iterable[Place | None]) -> Place | None:
    different = set(layouts)
    return different.pop() if len(different) == 1 else None


@torch.library.custom_op(
    "beft_ext::tap_backward", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def _tap_backward(grad_output: Tensor, handle: int, use: int) -> Tensor:
    listener = Listener.known.get(handle)
    if listener is None:
        raise TapError("a backward of a model whose tap is gone: run the forward again")
    return listener.reduce(grad_output, use)


@_tap_backward.register_fake
def _(grad_output: Tensor, handle: int, use: int) -> Tensor:
    dtype = torch.float64 if grad_output.dtype == torch.float64 else torch.float32
    return grad_output.new_empty(grad_output.shape[-1], dtype=dtype)
