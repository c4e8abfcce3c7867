"""The batches of a run, read so that they can be read again, and digests of tensors.

The loader draws its random numbers from a stream of its own, apart from the model's dropout. The
stream starts anew at each epoch. Where the loader shuffles with a generator of its own, that
generator's state is kept. So an epoch that was broken off can be entered again in the middle. The
digest of the batches that were read says whether they are the same.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.data import DataLoader, IterableDataset, Sampler

from beft_ext.models.wrappers import is_shard

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Batch = Mapping[str, Tensor]
States = tuple[Any, ...]  # of torch's, Python's and numpy's global generators


class Passes:
    """One pass after another over a loader.

    Args:
        most: batches of a pass; None for all.
    Attributes:
        digest: of all batches that the present epoch has given so far.
        generators: states of the loader's own generators when the present epoch began.
    """

    def __init__(self, loader: Iterable[Batch], seed: int, most: int | None = None) -> None:
        self.loader, self.seed, self.most, self.digest = loader, seed, most, ""
        self.generators: list[Tensor] = []
        self._stream: States = ()

    def epoch(self, number: int) -> Iterator[Batch]:
        """The batches of epoch ``number``, from 0."""
        set_epoch(self.loader, number)
        self.generators = [g.get_state() for g in generators(self.loader)]
        self.digest, self._stream = "", _seeded(self.seed * 1_000_003 + number)
        with self._apart():
            iterator = iter(self.loader)
        for _ in count() if self.most is None else range(self.most):
            with self._apart():
                batch = next(iterator, None)
            if batch is None:
                return
            self.digest = digest_of(batch, self.digest)
            yield batch

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Random numbers from the loader's stream; the global state is as it was afterwards."""
        outside = _states()
        _set_states(self._stream)
        try:
            yield
        finally:
            self._stream = _states()
            _set_states(outside)


def length_of(loader: object) -> int | None:
    """Batches of a pass; None where nothing says it, as of a DataLoader over an IterableDataset."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def set_epoch(loader: object, number: int) -> None:
    """The next pass is number ``number``, for a loader or a data set that draws by it."""
    for drawing in (loader, getattr(loader, "dataset", None)):
        if hasattr(drawing, "set_epoch"):
            drawing.set_epoch(number)
            return


def generators(loader: object) -> list[torch.Generator]:
    """The generators that a loader, its samplers and an iterable data set hold."""
    found: dict[int, torch.Generator] = {}
    seen: set[int] = set()
    waiting = [loader]
    while waiting:
        thing = waiting.pop()
        seen.add(id(thing))
        for part in getattr(thing, "__dict__", {}).values():
            if isinstance(part, torch.Generator):
                found[id(part)] = part
            elif isinstance(part, (DataLoader, Sampler, IterableDataset)) and id(part) not in seen:
                waiting.append(part)
    return list(found.values())


def digest_of(tensors: Mapping[str, Tensor], before: str = "") -> str:
    """SHA-256 of names, dtypes, shapes and bytes, and of ``before``, in hexadecimal."""
    counted = hashlib.sha256(before.encode())
    for name in sorted(tensors):
        _count(counted, name, tensors[name])
    return counted.hexdigest()


def _count(counted: hashlib._Hash, name: str, tensor: Tensor) -> None:
    counted.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
    if is_shard(tensor):  # all processes are here, and get the digest of the whole
        tensor = cast("DTensor", tensor).full_tensor()
    if is_traceable_wrapper_subclass(tensor):  # quantised: the bytes are those of its parts
        for part in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
            _count(counted, f"{name}.{part}", getattr(tensor, part))
        return
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    counted.update(flat.view(torch.uint8).numpy())


def _states() -> States:
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def _set_states(states: States) -> None:
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])


def _seeded(seed: int) -> States:
    """The states that follow from ``seed``; nothing global is touched."""
    numbers = np.random.RandomState(seed % 2**32).get_state()
    return torch.Generator().manual_seed(seed).get_state(), random.Random(seed).getstate(), numbers
