"""Models larger than their device: what Accelerate moves there module by module.

A module that is offloaded has a hook. Before its forward the hook puts its tensors on the device,
read from a map by name (tensors on the host, or files); afterwards they are on the meta device
again, other objects each time. What trains must stay one object with a value: ``take`` takes it
out of the offload, ``put_back`` gives back what has still the value that the map holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.hooks import RemovableHandle

_HOOK, _KEEPER = "_hf_hook", "_beft_kept"
_WRAPPED = (_HOOK, "_old_forward", "forward")  # what Accelerate leaves on a module


class _Place(NamedTuple):
    """Where an offloaded tensor is: in its owner's map, by its name within the owner."""

    owner: nn.Module
    hook: Any
    name: str

    def read(self, like: Tensor) -> Tensor:
        """The value, in the dtype of ``like``, on the device where it is used."""
        value: Tensor = self.hook.weights_map[self.name]
        return value.detach().to(self.hook.execution_device).to(like.dtype)


def has_place(model: nn.Module, name: str) -> bool:
    """Whether a hook holds the value of a tensor that is on the meta device."""
    return _place(model, name) is not None


def is_offloaded(model: nn.Module) -> bool:
    """Whether any parameter lies on the meta device between its uses."""
    return any(p.is_meta and has_place(model, n) for n, p in model.named_parameters())


def device_of(model: nn.Module) -> torch.device:
    """Where the model's inputs go: the device on which its embeddings work."""
    embeddings = _embeddings(model)
    path = next((n for n, m in model.named_modules() if m is embeddings), "")
    for name, parameter in model.get_submodule(path).named_parameters(prefix=path):
        return _device(model, name, parameter)
    name, parameter = next(model.named_parameters())
    return _device(model, name, parameter)


def devices_of(model: nn.Module) -> list[torch.device]:
    """Every device that the model computes on."""
    return list({_device(model, n, p): None for n, p in model.named_parameters()})


def place_of(model: nn.Module, name: str) -> torch.device:
    """The device on which a tensor is used."""
    return _device(model, name, _tensor(model, name))


def value_of(model: nn.Module, name: str) -> Tensor:
    """The value of a parameter or buffer; of one that lies on its device, the same memory."""
    tensor = _tensor(model, name)
    place = _place(model, name) if tensor.is_meta else None
    return tensor.detach() if place is None else place.read(tensor)


class Values(Mapping[str, Tensor]):
    """Values of tensors by name; an offloaded one is read when it is asked for.

    Args:
        model: which holds them.
        names: of parameters and buffers.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.model, self.names = model, list(names)

    def __getitem__(self, name: str) -> Tensor:
        return value_of(self.model, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def take(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Let tensors stay on their devices with the values that they have.

    Args:
        names: of parameters and buffers; with each go those that are tied to it.
    Returns:
        Names of those that were offloaded before.
    """
    taken: list[str] = []
    for name in dict.fromkeys(names):
        tensor = _tensor(model, name)
        place = _place(model, name) if tensor.is_meta else None
        if place is None:
            continue
        value = place.read(tensor).clone()
        if isinstance(tensor, nn.Parameter):
            value = nn.Parameter(value, requires_grad=tensor.requires_grad)
        for tied in _tied(model, name):
            if (place := _place(model, tied)) is not None:
                _keeper(place).keep(place.name)
                _set(model, tied, value)
                taken.append(tied)
    return taken


def keep(model: nn.Module, name: str) -> None:
    """Let a parameter that the hooks do not know stay as it is."""
    if (place := _place(model, name, known=False)) is not None:
        _keeper(place).keep(place.name)


def put_back(model: nn.Module, names: Iterable[str]) -> None:
    """Offload again what has the value of before it was taken; what has another one stays."""
    for name in names:
        place, tensor = _place(model, name), _tensor(model, name)
        if place is None or tensor.is_meta or not torch.equal(place.read(tensor), tensor):
            continue
        _keeper(place).release(place.name)
        empty = tensor.detach().to("meta")
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        _set(model, name, empty)


@contextmanager
def bare(module: nn.Module) -> Iterator[None]:
    """For a while the module without hooks of Accelerate and with its values, to be copied."""
    named = [*module.named_parameters(remove_duplicate=False)]
    named += module.named_buffers(remove_duplicate=False)
    away = {n: t for n, t in named if t.is_meta and has_place(module, n)}
    values = {n: value_of(module, n) for n in away}
    hooked = [(m.__dict__, [k for k in _WRAPPED if k in m.__dict__]) for m in module.modules()]
    before = [(own, {k: own.pop(k) for k in names}) for own, names in hooked if _HOOK in names]
    try:
        for name, value in values.items():
            _set(module, name, value)
        yield
    finally:
        for name, tensor in away.items():
            _set(module, name, tensor)
        for own, hooks in before:
            own.update(hooks)


def rereading(model: nn.Module) -> list[RemovableHandle]:
    """Handles of hooks by which a backward reads offloaded weights again, as forward did.

    Without them autograd keeps every weight that a forward has read, so that all of the model
    would lie on the device at once.
    """
    handles = []
    for module in model.modules():
        if _offloading(module) is not None:
            again = _Again()
            handles.append(module.register_forward_pre_hook(again.begin))
            handles.append(module.register_forward_hook(again.end, always_call=True))
    return handles


def describe(model: nn.Module) -> None:
    """Leave on the model where its modules are, as Accelerate's dispatch_model does and its
    cpu_offload and disk_offload do not: without it ``save_pretrained`` reads no offloaded value."""
    if is_offloaded(model) and not hasattr(model, "hf_device_map"):
        model.hf_device_map = {"": "disk"}  # type: ignore[assignment]


class _Keeper:
    """Hides tensors from an offloading hook, which would put others in their place.

    It stands in for the hook's own methods, which an object may have of its own.
    """

    def __init__(self, hook: Any) -> None:
        self.hook, self.names = hook, set[str]()
        self.devices: dict[str, Any] = {}  # to which a hook that is removed would move its own
        hook.pre_forward, hook.post_forward = self.pre_forward, self.post_forward

    def keep(self, name: str) -> None:
        self.names.add(name)
        devices = getattr(self.hook, "original_devices", {})
        if name in devices:
            self.devices[name] = devices.pop(name)

    def release(self, name: str) -> None:
        self.names.discard(name)
        if name in self.devices:
            self.hook.original_devices[name] = self.devices.pop(name)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with self._hidden(module):
            return type(self.hook).pre_forward(self.hook, module, *args, **kwargs)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        with self._hidden(module):
            return type(self.hook).post_forward(self.hook, module, output)

    @contextmanager
    def _hidden(self, module: nn.Module) -> Iterator[None]:
        hidden = []
        for name in self.names:
            table, leaf = _table(module, name), name.rpartition(".")[2]
            hidden.append((table, leaf, table.get(leaf)))
            table[leaf] = None
        try:
            yield
        finally:
            for table, leaf, tensor in hidden:
                table[leaf] = tensor


class _Reading(NamedTuple):
    """What a backward needs in place of a weight: where it is, and which view of it."""

    place: _Place
    like: Tensor  # on the meta device
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Again:
    """Around one module's forward: autograd keeps where its offloaded weights are, not these."""

    def __init__(self) -> None:
        self.open: list[Any] = []

    def begin(self, module: nn.Module, _args: object) -> None:
        hook, around = (
            _offloading(module),
            torch._C._autograd._top_saved_tensors_default_hooks(True),
        )
        kept = None
        # Another's hooks (activation checkpointing) see to what is saved within them.
        if hook is not None and (around is None or isinstance(around[0], _Pack)):
            kept = torch.autograd.graph.saved_tensors_hooks(_Pack(module, hook), _unpack)
            kept.__enter__()
        self.open.append(kept)

    def end(self, *_: object) -> None:
        if self.open and (kept := self.open.pop()) is not None:
            kept.__exit__()


class _Pack:
    def __init__(self, module: nn.Module, hook: Any) -> None:
        self.module, self.hook = module, hook

    def __call__(self, tensor: Tensor) -> Tensor | _Reading:
        if is_traceable_wrapper_subclass(tensor):
            return tensor
        memory = tensor.untyped_storage().data_ptr()
        kept = _kept(self.hook)
        for name, own in self.module.named_parameters(recurse=bool(self.hook.place_submodules)):
            if name in kept or own.is_meta or is_traceable_wrapper_subclass(own):
                continue
            if own.untyped_storage().data_ptr() == memory and own.dtype == tensor.dtype:
                place, like = _Place(self.module, self.hook, name), own.detach().to("meta")
                view = tensor.size(), tensor.stride(), tensor.storage_offset()
                return _Reading(place, like, *view)
        return tensor


def _unpack(packed: Tensor | _Reading) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    value = packed.place.read(packed.like)
    return value.as_strided(packed.size, packed.stride, packed.offset)


def _offloading(module: nn.Module) -> Any:
    """The hook that offloads tensors of this module, or None."""
    hook = getattr(module, _HOOK, None)
    several = getattr(hook, "hooks", (hook,))
    return next((h for h in several if getattr(h, "offload", False)), None)


def _place(model: nn.Module, name: str, known: bool = True) -> _Place | None:
    """known: whether the map must hold the tensor."""
    steps = name.split(".")
    for cut in reversed(range(len(steps))):
        owner = model.get_submodule(".".join(steps[:cut]))
        hook, inner = _offloading(owner), ".".join(steps[cut:])
        reaches = cut == len(steps) - 1 or getattr(hook, "place_submodules", False)
        if hook is not None and reaches and (not known or _holds(hook.weights_map, inner)):
            return _Place(owner, hook, inner)
    return None


def _holds(weights: Mapping[str, Tensor], name: str) -> bool:
    """A map with a prefix lists its names with it, and takes them without."""
    wanted, whole = getattr(weights, "prefix", "") + name, getattr(weights, "dataset", weights)
    # Another mapping than a dict would read the tensor to say whether it has it.
    return wanted in whole if isinstance(whole, dict) else wanted in list(whole)


def _keeper(place: _Place) -> _Keeper:
    found: _Keeper | None = getattr(place.hook, _KEEPER, None)
    if found is None:
        found = _Keeper(place.hook)
        setattr(place.hook, _KEEPER, found)
    return found


def _kept(hook: Any) -> set[str]:
    found: _Keeper | None = getattr(hook, _KEEPER, None)
    return set() if found is None else found.names


def _tied(model: nn.Module, name: str) -> list[str]:
    """All names of one tensor. Each use of an offloaded one has an object of its own."""
    sources: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    source = sources.get(name, name)
    return list(dict.fromkeys([name, source, *(t for t, s in sources.items() if s == source)]))


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(path), leaf)
    return found


def _table(model: nn.Module, name: str) -> dict[str, Any]:
    """The parameters or the buffers of a module, whichever hold the named tensor."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    return module._buffers if leaf in module._buffers else module._parameters


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    table = _table(model, name)
    leaf = name.rpartition(".")[2]
    if isinstance(table[leaf], nn.Parameter) and not isinstance(value, nn.Parameter):
        value = nn.Parameter(value, requires_grad=False)
    table[leaf] = value


def _device(model: nn.Module, name: str, tensor: Tensor) -> torch.device:
    place = _place(model, name) if tensor.is_meta else None
    return tensor.device if place is None else torch.device(place.hook.execution_device)


def _embeddings(model: nn.Module) -> nn.Module | None:
    ask: Callable[[], nn.Module | None] = getattr(model, "get_input_embeddings", lambda: None)
    try:
        return ask()
    except NotImplementedError:  # an architecture that has none to give
        return None
