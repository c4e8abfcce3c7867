"""An adapter's files read. Nothing is trusted: all is checked against the model before a tensor
reaches it."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import torch
from torch import nn

from beft_ext.adapters.contents import (
    BIAS_ENDING,
    CONFIG,
    METADATA,
    PEFT_PREFIX,
    WEIGHTS,
    AdapterError,
    Contents,
    model_facts,
)
from beft_ext.files import LARGEST_HEADER, JsonObject, digest, locked
from beft_ext.models import is_linear, is_quantised, output_width

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
LARGEST_CONFIG = 2**20


def read(folder: Path, model: nn.Module) -> Contents:
    """The adapter in ``folder``, checked against ``model``; tensors are on the CPU.

    Raises AdapterError for anything that is missing, damaged, unsafe or of another model.
    """
    from safetensors import safe_open

    path = _weights(folder)
    with locked(folder):  # no other process may change the files between two looks at them
        config = _config(folder)
        _check_model(model, config)
        try:
            with safe_open(path, framework="pt") as file:
                entries = {k: file.get_slice(k) for k in file.keys()}  # noqa: SIM118
                kinds = {k: (e.get_dtype(), tuple(e.get_shape())) for k, e in entries.items()}
                _check_entries(model, config, kinds)
                # Copies: the file is mapped, and may be overwritten while the adapter is in use.
                tensors = {k.removeprefix(PEFT_PREFIX): file.get_tensor(k).clone() for k in entries}
        except AdapterError:
            raise
        except Exception as error:  # safetensors' own, and what torch raises on a bad buffer
            raise _not_whole(path, error) from error
        _check_digests(folder, config)
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise AdapterError(f"'{name}' in {path} holds NaN or infinite values")
    biases = {n.removesuffix(BIAS_ENDING): t for n, t in tensors.items() if n.endswith(BIAS_ENDING)}
    return Contents(
        biases={n: t.reshape(-1) for n, t in biases.items()},
        head={n: t for n, t in tensors.items() if not n.endswith(BIAS_ENDING)},
        terms=_strings(_facts(config).get("terms")),
    )


def head_classes(folder: str | Path) -> int | None:
    """Number of classes of the adapter's head, or None if it has none. Raises AdapterError."""
    from safetensors import safe_open

    folder = Path(folder)
    path = _weights(folder)
    try:
        with safe_open(path, framework="pt") as file:
            shapes = [
                file.get_slice(k).get_shape()
                for k in file.keys()  # noqa: SIM118
                if k.endswith(".weight")
            ]
    except Exception as error:
        raise _not_whole(path, error) from error
    if any(0 in s for s in shapes):  # no bytes stand behind its other sizes
        raise AdapterError(f"{path} holds a weight without elements")
    layers = [(int(s[0]), int(s[1])) for s in shapes if len(s) == 2]
    # The last of a head's layers is the one whose outputs no other layer takes in.
    inputs = {taken for _, taken in layers}
    outputs = [given for given, _ in layers if given not in inputs]
    return min(outputs or [given for given, _ in layers], default=None)


def model_class(folder: str | Path) -> str | None:
    """Name of the transformers model class that the adapter was made for, where it says so."""
    import transformers

    name = _mapping(_config(Path(folder))).get("base_model_class")
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    known = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    return name if known else None


def adapter_facts(folder: str | Path) -> JsonObject:
    """What our own adapters keep in the config beside PEFT's fields; empty for PEFT's."""
    return _facts(_config(Path(folder)))


def class_names(folder: str | Path) -> list[str]:
    """Names of the classes of the adapter's head; empty where it does not say them."""
    return list(_strings(_facts(_config(Path(folder))).get("classes")))


def _weights(folder: Path) -> Path:
    if not folder.is_dir():
        raise AdapterError(f"no adapter folder at {folder}")
    path = folder / WEIGHTS
    if not path.exists():
        if (folder / "adapter_model.bin").exists():
            raise AdapterError(
                f"{folder} holds a pickle (adapter_model.bin), which can run code and is not "
                "read: save the adapter again as safetensors"
            )
        raise AdapterError(f"{folder} has no {WEIGHTS}")
    _check_inside(folder, path)
    size = path.stat().st_size
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if size < 8 or header > min(size - 8, LARGEST_HEADER):
        raise _not_whole(path, f"{size} bytes, of which {header} are header")
    return path


def _not_whole(path: Path, reason: object) -> AdapterError:
    return AdapterError(f"{path} is not a whole safetensors file: {reason}")


def _check_digests(folder: Path, config: JsonObject) -> None:
    """Weights without a digest are PEFT's, or were saved before there were digests.

    PEFT may save weights of its own and keep our part of the config. So the digests in that part
    count only where the weights carry one.
    """
    from safetensors import safe_open

    weights = folder / WEIGHTS
    found = digest(weights, AdapterError)
    if found is None:
        with safe_open(weights, framework="pt") as file:
            metadata = file.metadata() or {}
        if odd := sorted(metadata.keys() - METADATA.keys()):
            raise AdapterError(f"{weights} is damaged: its metadata has '{odd[0][:80]}'")
    elif digest(folder / CONFIG, AdapterError) is None or _facts(config).get("weights") != found:
        raise AdapterError(
            f"{CONFIG} and {WEIGHTS} in {folder} do not belong together: one is damaged or of "
            "another adapter; save the adapter again"
        )


def _config(folder: Path) -> JsonObject:
    path = folder / CONFIG
    if not folder.is_dir():
        raise AdapterError(f"no adapter folder at {folder}")
    if not path.exists():
        raise AdapterError(
            f"{folder} has no {CONFIG}: it is no adapter, or was cut off while being saved; save "
            "it again"
        )
    _check_inside(folder, path)
    if path.stat().st_size > LARGEST_CONFIG:
        raise AdapterError(f"{path} is larger than {LARGEST_CONFIG} bytes")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "BEFT":
        raise AdapterError(f"{path} does not describe a BEFT adapter (peft_type must be 'BEFT')")
    for key in ("target_modules", "modules_to_save"):
        value = config.get(key)
        names = isinstance(value, list) and all(isinstance(v, str) for v in value)
        if not (value is None or names or (key == "target_modules" and isinstance(value, str))):
            raise AdapterError(f"{key} in {path} must be a list of module names")
    return config


def _check_inside(folder: Path, path: Path) -> None:
    """A link may lead to the hub cache's blobs of the same repository, nowhere else."""
    home, target = folder.resolve(), path.resolve()
    blobs = home.parent.parent / "blobs"
    if target.parent not in (home, blobs):
        raise AdapterError(f"{path} leads out of its folder, to {target}")
    if not target.is_file():
        raise AdapterError(f"{path} is no plain file")


def _check_model(model: nn.Module, config: JsonObject) -> None:
    """Our own adapters say what they were made for; PEFT's do not."""
    facts = _facts(config)
    for key, value in model_facts(model).items():
        if key in facts and facts[key] != value:
            raise AdapterError(
                f"the adapter was made for a model with {key} {facts[key]!r}, but "
                f"{type(model).__name__} has {value!r}"
            )


def _facts(config: JsonObject) -> JsonObject:
    """What our own adapters keep in the config; empty for PEFT's."""
    facts = _mapping(config).get("beft_ext")
    return facts if isinstance(facts, dict) else {}


def _strings(value: object) -> tuple[str, ...]:
    return tuple(str(v) for v in value) if isinstance(value, list) else ()


def _mapping(config: JsonObject) -> JsonObject:
    mapping = config.get("auto_mapping")
    return mapping if isinstance(mapping, dict) else {}


def _check_entries(
    model: nn.Module, config: JsonObject, kinds: dict[str, tuple[str, tuple[int, ...]]]
) -> None:
    modules, state = dict(model.named_modules()), model.state_dict()
    saved = config.get("modules_to_save") or []
    # PEFT wraps by the end of a name, whole components or not.
    kept = [m for m in modules if m and any(m.endswith(s) for s in saved if s)]
    inside = tuple(f"{m}." for m in kept)
    counters = {n for n, b in model.named_buffers() if b.dtype == torch.int64}  # a batch norm's
    name = type(model).__name__
    seen: set[str] = set()
    for key, (dtype, shape) in kinds.items():
        own = key.removeprefix(PEFT_PREFIX)
        seen.add(own)
        if own == key:
            raise AdapterError(f"'{key[:80]}' is not a tensor of a PEFT adapter")
        if own.endswith(BIAS_ENDING):
            expected = _bias_shape(modules, own.removesuffix(BIAS_ENDING), name)
        elif own in state and own.startswith(inside):
            expected = tuple(state[own].shape)
        else:
            raise AdapterError(f"'{own[:80]}' is neither a bias nor in a head of {name}")
        if own in state and own not in counters and is_quantised(state[own]):
            raise AdapterError(
                f"'{own}' of {name} is quantised, and the adapter has a value for it: quantise "
                "model.base_model alone"
            )
        if shape != expected:
            raise AdapterError(f"'{own}' has shape {shape}, but {name} needs {expected}")
        if dtype not in (("I64",) if own in counters else FLOAT_DTYPES):
            raise AdapterError(f"'{own}' is {dtype}: only {', '.join(FLOAT_DTYPES)} are read")
    # In a kept module PEFT trains a copy as a whole: a target inside it has no bias of its own.
    targets = [m for m in _targets(modules, config) if not f"{m}.".startswith(inside)]
    needed = [f"{m}{BIAS_ENDING}" for m in targets] + [n for n in state if n.startswith(inside)]
    if missing := [n for n in needed if n not in seen]:
        raise AdapterError(
            f"the adapter lacks '{missing[0]}', which its config asks for in {name}: it is "
            "damaged, or made for another number of layers"
        )
    if not any(n.endswith(BIAS_ENDING) for n in seen):
        raise AdapterError("the adapter holds no bias")


def _bias_shape(modules: dict[str, nn.Module], name: str, model: str) -> tuple[int, ...]:
    if name not in modules:
        raise AdapterError(
            f"the adapter has a bias for '{name[:80]}', which {model} has not: it was made for "
            "another architecture or number of layers"
        )
    module = modules[name]
    width = output_width(module)
    bare = getattr(module, "bias", None) is None
    if width is None or (bare and not is_linear(module)):
        raise AdapterError(f"'{name}' is {type(module).__name__}, which takes no bias")
    return (1, width)


def _targets(modules: Collection[str], config: JsonObject) -> list[str]:
    """Modules that the config asks a bias for, by their whole name or by its end."""
    wanted = config.get("target_modules")
    if not isinstance(wanted, list):
        return []  # an expression is not evaluated: one made to run for ever would
    names = {t for t in wanted if t}
    ends = ((m, [m, *(m.split(".", k)[k] for k in range(1, m.count(".") + 1))]) for m in modules)
    return [m for m, endings in ends if m and not names.isdisjoint(endings)]
