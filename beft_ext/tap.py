"""The tap: listens at every bias of a model, while an ordinary loop trains it.

What happens at one projection is in ``listener.py``. Here is what a step announces, the leaves
that train, the statistics, and the search for where the examples lie in an output: made once, in
the first backward that must know it (``layouts.py``).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from beft_ext.errors import BeftError
from beft_ext.layouts import Place, TapError as TapError, fingerprint, locate, replaced
from beft_ext.listener import Listener, Site, Step, Use, refuse_copy
from beft_ext.models import Bias, BiasMap, offload, outer_modules, output_width, require_fit, state
from beft_ext.models.modes import quiet
from beft_ext.models.wrappers import require_unsharded, sharded, whole
from beft_ext.slab import SiteSlab


def require_untapped(model: nn.Module, error: type[BeftError] = TapError) -> None:
    """Raise ``error`` where ``model`` carries a tap."""
    if state.get(model, Tap) is not None:
        raise error("this model is tapped already: call remove() of that tap first")


def unheard(model: nn.Module) -> AbstractContextManager[None]:
    """While the model runs for something that no step announced; with or without a tap."""
    tap = state.get(model, Tap)
    return nullcontext() if tap is None else tap.deaf()


class Tap(AbstractContextManager["Tap"], state.Record):
    """Listens at biases of a model, and keeps the gradient statistics of their examples.

    A tap is removed by ``remove``, or is used as a context manager. A compiled model may be given,
    or compiled afterwards.

    Args:
        model: a transformers model, in one process or under ``fully_shard``; there ``locate`` goes
            before the first backward over several examples, on every rank with the same inputs.
        biases: those to listen at, such as ``find_biases(model)``.
    Attributes:
        sites: one for each biased projection, with its biases, trainable leaves and sums.
    Raises:
        TapError: the model is tapped already, or spread over processes; a bias is of
            another model. A forward raises it where a tapped module does not give out a tensor. A
            backward raises it where no ``step`` announced it, or where the examples cannot be
            told apart.
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
        biases = list(biases)
        require_fit(model, biases, TapError)
        require_unsharded({b.parameter: model.get_parameter(b.parameter) for b in biases}, TapError)
        self.sites: list[Site] = []
        self._model, self._step = model, Step(self.sites)
        self._located: set[bool] = set()  # in packed batches, and in others
        self._taken = offload.take(model, (b.parameter for b in biases))
        self._hooks: list[Any] = [*offload.rereading(model)]
        self._listeners: list[Listener] = []
        by_parameter: dict[int, Site] = {}
        for bias in biases:
            parameter = model.get_parameter(bias.parameter)
            site = by_parameter.get(id(parameter))
            if site is None:
                site = by_parameter[id(parameter)] = _site(len(self.sites), parameter)
                self.sites.append(site)
            site.add(bias, bias.view(parameter.detach()).requires_grad_())
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
            listener = Listener(path, site, self._step, self._locate_from_call)
            self._listeners.append(listener)
            self._hooks.append(self._model.get_submodule(path).register_forward_hook(listener))
        for path in ({""} | outer_modules(modules)) - set(modules):
            module = self._model.get_submodule(path)
            hook = module.register_forward_pre_hook(self._remember, with_kwargs=True)
            self._hooks.append(hook)

    def _remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what the outermost module was called with: examples may have to be located. Where
        it is called again, that is a forward of its own, whose graph the first's may be no part of.
        """
        step = self._step
        if not step.announced or step.visit is not None:
            return
        if step.called is None:
            step.called = (module, args, kwargs)
        elif module is step.called[0]:
            step.gathered = None

    def keep_rows(
        self,
        examples: int,
        columns: int | None = None,
        seed: int = 0,
        bits: int | None = None,
    ) -> None:
        """Make a slab for the gradients of so many single examples.

        Args:
            examples: rows of the slab, N.
            columns: fold each wider bias into so many columns; by default none.
            seed: of the folding.
            bits: 16, 8 or 4, of the whole numbers that rows are kept as; by default rows are in
                their own dtype.
        """
        for site in self.sites:
            site.slab = SiteSlab(site.biases, site.grad_sum, examples, columns, seed, bits)

    def rows(self, bias: Bias, count: int) -> Tensor:
        """Gradients that ``keep_rows`` kept, ``(count, H)``, or their folds.

        Args:
            bias: one of those that the tap listens at.
            count: number of examples, from the first row on.
        Returns:
            One row an example, a view where the bias is a whole parameter.
        """
        self.finish_step()
        slab = next(site.slab for site in self.sites if bias in site.biases)
        assert slab is not None
        return slab.rows(bias, count)

    def step(
        self,
        batch: int,
        scale: float = 1.0,
        example_offsets: Tensor | None = None,
        row: int | None = None,
    ) -> None:
        """Announce the next forward and its one backward.

        Args:
            batch: number of examples, B.
            scale: what the loss was divided by: B for a mean over examples; 1 by default, for a
                sum.
            example_offsets: where the examples of a packed batch begin: example ``i`` has the
                tokens ``offsets[i]:offsets[i + 1]``. None where each row is an example.
            row: of the slab (``keep_rows``), where the first example's gradient goes. The
                statistics are left as they are. None keeps the statistics.
        Shape:
            example_offsets ``(B + 1,)``.
        """
        self.finish_step()
        step = self._step
        step.number += 1
        step.announced, step.begun, step.called, step.gathered = True, False, None, None
        step.batch, step.scale, step.offsets, step.row = batch, scale, example_offsets, row
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

    @contextmanager
    def deaf(self) -> Iterator[None]:
        """Forwards that are no step's, and that no backward follows."""
        before, self._step.visit = self._step.visit, lambda _, output: output
        try:
            yield
        finally:
            self._step.visit = before

    def finish_step(self) -> None:
        """Square what sites used several times in one step have gathered."""
        for site in self.sites:
            site.finish_step(self._step.row)

    def unlocated(self, batch: int, example_offsets: Tensor | None = None) -> bool | None:
        """Whether the examples of a kind of batch are still to be located.

        Args:
            batch, example_offsets: as for ``step``.
        Returns:
            Whether the batch is packed; None where its examples' places are known.
        """
        packed = example_offsets is not None
        return packed if batch > 1 and packed not in self._located else None

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

        def run(visit: Callable[[Use, Tensor], Tensor], example: int | None) -> None:
            given = inputs
            if example is not None:
                given = replaced(inputs, example, batch, example_offsets)
            uses: Counter[Listener] = Counter()

            def numbered(listener: Listener, output: Tensor) -> Tensor:
                uses[listener] += 1
                return visit((listener, uses[listener] - 1), output)

            torch.manual_seed(0)
            self._step.visit = numbered
            try:
                forward(given)
            finally:
                self._step.visit = None

        def changes(example: int | None) -> dict[Use, Tensor]:
            found = {}

            def visit(use: Use, output: Tensor) -> Tensor:
                found[use] = fingerprint(output)
                return output

            with torch.no_grad():
                run(visit, example)
            return found

        def influence(example: int, known: Mapping[Use, Place | None]) -> dict[Use, Tensor]:
            added: dict[Use, Tensor] = {}
            total: list[Tensor] = []

            def visit(use: Use, output: Tensor) -> Tensor:
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
        packed = example_offsets is not None
        self._located.add(packed)
        for (listener, use), place in found.items():
            listener.layouts[packed, use] = place

    def _locate_from_call(self) -> None:
        """From the call of the outermost module that the step's forward began with."""
        step = self._step
        if step.called is None:
            raise TapError("where the examples lie cannot be told: no module above was called")
        if sharded(self._model):  # within its backward no other forward can run
            raise TapError("a sharded model's examples are to be located before: call Tap.locate")
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
        offload.put_back(self._model, self._taken)
        state.take(self._model, Tap)

    def __exit__(self, *_: object) -> None:
        self.remove()

    __reduce_ex__ = refuse_copy


def _site(place: int, parameter: nn.Parameter) -> Site:
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    zeros = torch.zeros(parameter.numel(), dtype=dtype, device=parameter.device)
    return Site(place, parameter, zeros, zeros.clone())
