"""How the weights of a model are held: their type, their devices, and what is kept for backward."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from beft_ext.errors import BeftError
from beft_ext.models import head_parameters
from beft_ext.models.offload import is_offloaded
from beft_ext.parallel import here

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

DTYPES = ("auto", "float32", "bfloat16", "float16")
MAPS = ("auto", "sequential")
SIZE = re.compile(r"[0-9]+(\.[0-9]+)?[KMGT]i?B")
# Of a folder that is written: an offloaded model has no more than that in memory at once.
SHARD, SMALL_SHARD = "50GB", "1GB"


class PlacementError(BeftError, ValueError):
    """A model that cannot be held as asked."""


@dataclass(frozen=True)
class Placement:
    """As on the command line.

    Attributes:
        dtype: one of ``DTYPES``; auto: as the folder has the weights.
        device_map: 'auto' fills the GPUs evenly, then the host, then leaves the rest on the disk;
            'sequential' fills one GPU after another; or a device's name. None: the first GPU, or
            the host where there is none.
        max_memory: of a device map, 'cpu=8GiB,0=20GiB'; None for what is free.
        checkpointing: compute activations again in the backward, in place of keeping them.
    """

    dtype: str = "auto"
    device_map: str | None = None
    max_memory: str | None = None
    checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.max_memory is not None and self.device_map not in MAPS:
            raise PlacementError("--max-memory is for --device-map auto or sequential: give both")
        if self.device_map is not None and self.device_map not in MAPS:
            try:
                torch.device(self.device_map)
            except RuntimeError as error:
                raise PlacementError(
                    f"--device-map is {', '.join(MAPS)} or a device such as cpu or cuda:1, not "
                    f"'{self.device_map}'"
                ) from error
        self.memory  # noqa: B018, the text is checked

    @property
    def memory(self) -> dict[int | str, str] | None:
        """Bytes by device. Raises PlacementError."""
        if self.max_memory is None:
            return None
        found: dict[int | str, str] = {}
        for part in self.max_memory.split(","):
            name, _, size = part.partition("=")
            if SIZE.fullmatch(size) is None or not (name == "cpu" or name.isdecimal()):
                raise PlacementError(
                    f"--max-memory: '{part}' is not DEVICE=SIZE, such as cpu=8GiB or 0=20GiB"
                )
            found[int(name) if name.isdecimal() else name] = size
        return found

    def options(self, auto: str, config: PreTrainedConfig) -> dict[str, Any]:
        """What ``from_pretrained`` is told. Raises PlacementError.

        Args:
            auto: name of a transformers class.
            config: of the model.
        """
        options: dict[str, Any] = {"dtype": self.dtype}
        if self.device_map is None:
            return options
        if here().size > 1:
            raise PlacementError("--device-map is for one process: start it without torchrun")
        mapped = self.device_map in MAPS
        return options | {"device_map": self._map(auto, config) if mapped else self.device_map}

    def settle(self, model: nn.Module) -> nn.Module:
        """A loaded model, on its device. Raises PlacementError."""
        if self.checkpointing:
            try:
                model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
            except (ValueError, AttributeError) as error:
                raise PlacementError(
                    f"{type(model).__name__} knows no gradient checkpointing: leave it out, or "
                    "raise --gradient-accumulation"
                ) from error
        if self.device_map is None and torch.cuda.is_available():
            return model.cuda()
        return model

    def _map(self, auto: str, config: PreTrainedConfig) -> dict[str, int | str]:
        """A device for each part. What may train, or be new, stays where the model computes."""
        import transformers

        try:
            from accelerate import infer_auto_device_map
            from accelerate.utils import get_balanced_memory, get_max_memory
        except ImportError as error:
            raise PlacementError(
                "--device-map auto needs the package accelerate, which is not installed"
            ) from error
        kind = getattr(transformers, auto)
        make = partial(kind.from_config, trust_remote_code=False) if auto[:4] == "Auto" else kind
        with torch.device("meta"):
            model = make(config)
        model.tie_weights()
        dtype = config.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        common = {"no_split_module_classes": list(model._no_split_modules or ()), "dtype": dtype}
        balanced = self.device_map == "auto"
        memory = (
            get_balanced_memory(model, self.memory, **common)
            if balanced
            else get_max_memory(self.memory)
        )
        found: dict[str, int | str] = infer_auto_device_map(
            model, memory, clean_result=False, **common
        )
        main = next((d for d in found.values() if d not in ("cpu", "disk")), "cpu")
        head = {id(p) for p in head_parameters(model)}
        names = [n for n, p in model.named_parameters() if id(p) in head or "pooler" in n]
        return {
            part: main if any(f"{n}.".startswith(f"{part}.") for n in names) else device
            for part, device in found.items()
        }


USUAL = Placement()


def shard_size(model: nn.Module) -> str:
    """Of the files that a model is written to."""
    return SMALL_SHARD if is_offloaded(model) else SHARD
