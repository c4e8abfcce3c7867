"""The tap: the one place that touches a model's forward and backward.

A forward hook on a projection passes its output through an identity whose backward calls
``bias_grad_stats`` once. The projection's own bias is frozen, so autograd does not reduce
``grad_output`` a second time; what trains is a leaf tensor over the same memory, one per bias
(a slice of a fused QKV parameter has its own). Forward is unchanged to the bit.

Where the examples lie in an output is found once, in the first backward that must know it
(``layouts.py``). What a step knows (batch, scale, uses) is read when a backward runs, also in a
compiled model: there the backward is one operator that the compiler does not look into.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from beft_ext.layouts import Layout, Place, TapError as TapError, fingerprint, locate, replaced
from beft_ext.models import Bias, BiasMap, outer_modules, output_width, state
from beft_ext.models.wrappers import whole
from beft_ext.ops import bias_grad_stats
from beft_ext.ops.reference import example_grads

_Use = tuple["_Listener", int]  # the module, and which of its uses within a step
# In place of the number of a use within its step.
RECOMPUTED, STALE = -1, -2


@dataclass
class Site:
    """One biased projection: its biases, their trainable leaves, its statistics.

    The statistics cover the whole parameter, ``(P,)``; a bias reads its slice of them.
    """

    parameter: nn.Parameter
    biases: list[Bias]
    leaves: list[Tensor]
    grad_sum: Tensor
    grad_sum_sq: Tensor
    aliases: list[Tensor] = field(default_factory=list)  # whose nodes tell if leaves get a grad
    uses: int = 0  # forwards within one step
    pending: Tensor | None = field(default=None)  # (B, P) of a site used several times in a step


def _refuse_copy(_self: object, _protocol: Any) -> NoReturn:
    raise TapError("a tapped model can neither be copied nor saved whole: remove the tap first")


class _Step:
    """What a backward must know of the step that it belongs to."""

    number: int = 0
    announced: bool = False
    begun: bool = False  # a backward has begun: a later forward is of no announced step
    batch: int = 0
    scale: float = 1.0
    offsets: Tensor | None = None
    called: tuple[nn.Module, tuple[Any, ...], dict[str, Any]] | None = None
    visit: Callable[[_Listener, Tensor], Tensor] | None = None  # of a run that locates


def _alias(tensor: Tensor) -> Tensor:
    """The same memory, but no view to autograd: Longformer scales its query in place, and an
    optimizer its leaves."""
    found: Tensor = torch.ops.aten._unsafe_view(tensor, tensor.shape)
    return found


class _Identity(torch.autograd.Function):
    # With a setup_context of its own torch would parse forward's signature at each call.
    @staticmethod
    def forward(
        ctx: Any, output: Tensor, listener: _Listener, number: int, use: int, *leaves: Tensor
    ) -> Tensor:
        ctx.listener, ctx.number, ctx.use = listener, number, use
        return _alias(output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        listener = ctx.listener
        if torch.compiler.is_compiling():
            grad = torch.ops.beft_ext.tap_backward(grad_output, listener.handle, ctx.use)
        elif any(n and torch._C._will_engine_execute_node(n) for n, _ in ctx.next_functions[1:]):
            grad = listener.reduce(grad_output, ctx.use, ctx.number)
        else:  # a gradient of something else passes through
            return grad_output, None, None, None, *(None for _ in listener.site.leaves)
        site = listener.site
        pairs = zip(site.biases, site.leaves, strict=True)
        grads = (bias.view(grad).to(leaf.dtype) for bias, leaf in pairs)
        return grad_output, None, None, None, *grads


class _Listener:
    """The forward hook of one module, and where its examples lie."""

    known: ClassVar[weakref.WeakValueDictionary[int, _Listener]] = weakref.WeakValueDictionary()
    count: ClassVar[int] = 0

    def __init__(self, tap: Tap, path: str, site: Site) -> None:
        self.tap, self.path, self.site, self.step = tap, path, site, tap._step
        self.uses = 0
        self.reduced: set[int] = set()  # uses of this step whose backward ran
        self.layouts: dict[tuple[bool, int], Place | None] = {}
        _Listener.count += 1
        self.handle = _Listener.count
        self.known[self.handle] = self

    def __call__(self, module: nn.Module, _args: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            kind = type(module).__name__
            raise TapError(f"a {kind} gives out a {type(output).__name__}, not a tensor")
        if self.step.visit is not None:
            return self.step.visit(self, output)
        use = self._use()
        compiling = torch.compiler.is_compiling()
        leaves = self.site.leaves if compiling else self.site.aliases
        number = -1 if compiling else self.step.number
        tapped: Tensor = _Identity.apply(output, self, number, use, *leaves)
        return tapped

    def _use(self) -> int:
        """The number of this use within the step; counts it."""
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return RECOMPUTED  # activation checkpointing, within a backward
        if not self.step.announced or self.step.begun:
            return STALE
        use = self.uses
        self.uses += 1
        self.site.uses += 1
        return use

    def reduce(self, grad_output: Tensor, use: int, number: int | None = None) -> Tensor:
        """The bias gradient ``(P,)``; the statistics of an announced step are added to."""
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
        dy = self._by_example(grad_output, use)
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

    def _by_example(self, grad_output: Tensor, use: int) -> Tensor:
        """``(B, rows, H)``, or ``(N, H)`` of a packed batch."""
        step = self.step
        if step.batch == 1 and step.offsets is None:
            return grad_output.reshape(1, -1, grad_output.shape[-1])
        layout = self._layout(use)
        if isinstance(layout, Layout):
            return layout.by_example(grad_output, step.batch)
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
                self.tap._locate_from_call()
        raise TapError(
            f"which rows of '{self.path}' belong to which example cannot be told: its output does "
            "not change with one example alone (texts of a packed batch that see each other do so; "
            "config.use_cache=False keeps them apart). Leave its terms out, or use batches of one"
        )

    __reduce_ex__ = _refuse_copy


def _only(layouts: Iterable[Place | None]) -> Place | None:
    different = set(layouts)
    return different.pop() if len(different) == 1 else None


@torch.library.custom_op(
    "beft_ext::tap_backward", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def _tap_backward(grad_output: Tensor, handle: int, use: int) -> Tensor:
    listener = _Listener.known.get(handle)
    if listener is None:
        raise TapError("a backward of a model whose tap is gone: run the forward again")
    return listener.reduce(grad_output, use)


@_tap_backward.register_fake
def _(grad_output: Tensor, handle: int, use: int) -> Tensor:
    dtype = torch.float64 if grad_output.dtype == torch.float64 else torch.float32
    return grad_output.new_empty(grad_output.shape[-1], dtype=dtype)


def require_untapped(model: nn.Module) -> None:
    """Raise TapError where ``model`` carries a tap."""
    if state.get(model, Tap) is not None:
        raise TapError("this model is tapped already: remove the first tap before another")


class Tap(AbstractContextManager["Tap"], state.Record):
    """Listens at biases of a model, and keeps the gradient statistics of their examples.

    A tap is removed by ``remove``, or is used as a context manager. A compiled model may be given,
    or compiled afterwards.

    Args:
        model: a transformers model, in one process.
        biases: those to listen at, such as ``find_biases(model)``.
    Attributes:
        sites: one for each biased projection, with its biases, trainable leaves and sums.
    Raises:
        TapError: the model is tapped already, or spread over processes or devices. A forward
            raises it where a tapped module does not give out a tensor. A backward raises it where
            no ``step`` announced it, or where the examples cannot be told apart.
    Example:
        >>> import beft_ext
        >>> with beft_ext.Tap(model, beft_ext.find_biases(model)) as tap:
        ...     tap.step(batch=4, scale=4)
        ...     model(**loader[0]).loss.backward()
        ...     found = {bias.name: sums for bias, sums in tap.statistics().items()}
        >>> grad_sum, grad_sum_sq = found["0.value"]
        >>> grad_sum.shape, bool((grad_sum_sq > 0).all())
        (torch.Size([32]), True)
    Source: docs/definitions.md, section 2.
    """

    def __init__(self, model: nn.Module, biases: BiasMap | Iterable[Bias]) -> None:
        model = whole(model, TapError, copies=False)
        require_untapped(model)
        self._model, self._step = model, _Step()
        self._hooks: list[Any] = []
        self._listeners: list[_Listener] = []
        self.sites: list[Site] = []
        by_parameter: dict[int, Site] = {}
        for bias in biases:
            parameter = model.get_parameter(bias.parameter)
            site = by_parameter.get(id(parameter))
            if site is None:
                site = by_parameter[id(parameter)] = _site(parameter)
                self.sites.append(site)
            site.biases.append(bias)
            leaf = bias.view(parameter.detach()).requires_grad_()
            with torch.enable_grad():
                site.aliases.append(_alias(leaf))
            site.leaves.append(leaf)
        self._required = [(s.parameter, s.parameter.requires_grad) for s in self.sites]
        self._listen(
            {
                path: by_parameter[id(module.bias)]
                for path, module in model.named_modules()
                if output_width(module) and id(getattr(module, "bias", None)) in by_parameter
            }
        )
        for site in self.sites:
            site.parameter.requires_grad_(False)
        state.put(model, self)

    def _listen(self, modules: Mapping[str, Site]) -> None:
        for path, site in modules.items():
            listener = _Listener(self, path, site)
            self._listeners.append(listener)
            self._hooks.append(self._model.get_submodule(path).register_forward_hook(listener))
        for path in ({""} | outer_modules(modules)) - set(modules):
            module = self._model.get_submodule(path)
            hook = module.register_forward_pre_hook(self._remember, with_kwargs=True)
            self._hooks.append(hook)

    def _remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what the outermost module was called with: examples may have to be located."""
        step = self._step
        if step.announced and step.called is None:
            step.called = (module, args, kwargs)

    def step(self, batch: int, scale: float = 1.0, example_offsets: Tensor | None = None) -> None:
        """Announce the next forward and its one backward.

        Args:
            batch: number of examples, B.
            scale: what the loss was divided by: B for a mean over examples; 1 by default, for a
                sum.
            example_offsets: where the examples of a packed batch begin: example ``i`` has the
                tokens ``offsets[i]:offsets[i + 1]``. None where each row is an example.
        Shape:
            example_offsets ``(B + 1,)``.
        """
        self.finish_step()
        step = self._step
        step.number += 1
        step.announced, step.begun, step.called = True, False, None
        step.batch, step.scale, step.offsets = batch, scale, example_offsets
        for listener in self._listeners:
            listener.uses = listener.site.uses = 0
            listener.reduced.clear()

    def divided_by(self, scale: float) -> None:
        """The ``scale`` of the step, where the forward tells it."""
        self._step.scale = scale

    def rest(self) -> None:
        """Until the next ``step``, backwards give gradients alone."""
        self.finish_step()
        self._step.announced = False

    def finish_step(self) -> None:
        """Square what sites used several times in one step have gathered."""
        for site in self.sites:
            if site.pending is not None:
                site.grad_sum += site.pending.sum(0)
                site.grad_sum_sq += site.pending.square().sum(0)
                site.pending = None

    def locate(
        self,
        forward: Callable[[Mapping[Any, Any]], object],
        inputs: Mapping[Any, Any],
        batch: int,
        example_offsets: Tensor | None = None,
    ) -> None:
        """Find where the examples lie in each output, before a backward must know.

        The model runs on ``inputs``, and again with one example replaced, in evaluation mode.

        Args:
            forward: runs the model on inputs such as ``inputs``.
            inputs: tensors whose first axis holds the examples, or the tokens of a packed batch.
            batch, example_offsets: as for ``step``.
        Raises:
            TapError: ``inputs`` has no tensor, or its rows cannot be divided among the examples.
        """

        def run(visit: Callable[[_Use, Tensor], Tensor], example: int | None) -> None:
            given = inputs
            if example is not None:
                given = replaced(inputs, example, batch, example_offsets)
            uses: Counter[_Listener] = Counter()

            def numbered(listener: _Listener, output: Tensor) -> Tensor:
                uses[listener] += 1
                return visit((listener, uses[listener] - 1), output)

            torch.manual_seed(0)
            self._step.visit = numbered
            try:
                forward(given)
            finally:
                self._step.visit = None

        def changes(example: int | None) -> dict[_Use, Tensor]:
            found = {}

            def visit(use: _Use, output: Tensor) -> Tensor:
                found[use] = fingerprint(output)
                return output

            with torch.no_grad():
                run(visit, example)
            return found

        def influence(example: int, known: Mapping[_Use, Place | None]) -> dict[_Use, Tensor]:
            added: dict[_Use, Tensor] = {}
            total: list[Tensor] = []

            def visit(use: _Use, output: Tensor) -> Tensor:
                place = known.get(use)
                if place is None:
                    added[use] = torch.zeros_like(output, requires_grad=True)
                    return output + added[use]
                if output.requires_grad:
                    total.append(fingerprint(place.rows(output, batch, example)).sum())
                return output

            with torch.enable_grad():
                run(visit, None)
                if not total or not added:
                    return {}
                tensors = list(added.values())
                grads = torch.autograd.grad(sum(total), tensors, allow_unused=True)
            pairs = zip(added, tensors, grads, strict=True)
            return {u: (t if g is None else g).abs().amax(-1).detach() for u, t, g in pairs}

        with quiet(self._model):
            found = locate(changes, influence, batch, example_offsets)
        for (listener, use), place in found.items():
            listener.layouts[example_offsets is not None, use] = place

    def _locate_from_call(self) -> None:
        """From the call of the outermost module that the step's forward began with."""
        step = self._step
        if step.called is None:
            raise TapError("where the examples lie cannot be told: no module above was called")
        module, args, kwargs = step.called

        def forward(given: Mapping[Any, Any]) -> None:
            # A forward may write to what it is given (FSMT), or add to it (caches).
            own = {
                k: v.clone() if isinstance(v, Tensor) else copy.deepcopy(v)
                for k, v in given.items()
            }
            places = [own.pop(i) for i in range(len(args))]
            module(*places, **own)

        inputs: dict[Any, Any] = dict(enumerate(args)) | kwargs
        self.locate(forward, inputs, step.batch, step.offsets)

    def leaves(self) -> list[tuple[Bias, Tensor]]:
        """Every bias with the tensor that an optimizer trains, ``(groups, width / groups)``."""
        return [p for s in self.sites for p in zip(s.biases, s.leaves, strict=True)]

    def statistics(self) -> dict[Bias, tuple[Tensor, Tensor]]:
        """``sum_i scale*g_i`` and ``sum_i (scale*g_i)^2`` of each bias since the tap was set."""
        self.finish_step()
        return {
            b: (b.read(s.grad_sum), b.read(s.grad_sum_sq)) for s in self.sites for b in s.biases
        }

    def remove(self) -> None:
        """Take every hook away; ``requires_grad`` is as before. Trained values stay."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for parameter, required in self._required:
            parameter.requires_grad_(required)
        state.take(self._model, Tap)

    def __exit__(self, *_: object) -> None:
        self.remove()

    __reduce_ex__ = _refuse_copy


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no compiler, and the random state as it was."""
    modes = [(m, m.training) for m in model.modules()]
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=cuda_devices(model)))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def cuda_devices(model: nn.Module) -> list[torch.device]:
    """The GPUs that hold the model, whose random states its dropout draws on."""
    return list({p.device for p in model.parameters() if p.is_cuda})


def _site(parameter: nn.Parameter) -> Site:
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    zeros = torch.zeros(parameter.numel(), dtype=dtype, device=parameter.device)
    return Site(parameter, [], [], zeros, zeros.clone())
