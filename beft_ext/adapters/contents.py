"""The adapter's files, laid out as Hugging Face PEFT's BEFT tuner (0.21) has them.

``adapter_model.safetensors`` holds, under ``base_model.model.``, one ``<module>.beft_bias``
``(1, P)`` for each biased module, the difference to the base bias over the whole width (zero
outside a trained slice of a fused projection), and the head's tensors under their own names.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from beft_ext.errors import BeftError
from beft_ext.files import DIGEST, UNSEALED, JsonObject, whole_files, write_json, write_tensors
from beft_ext.models import class_names_of, outer_modules
from beft_ext.models.wrappers import class_of

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
FILES = (WEIGHTS, CONFIG, CARD)
PEFT_PREFIX, BIAS_ENDING = "base_model.model.", ".beft_bias"
METADATA = {"format": "pt"}  # all that PEFT writes there, and all but our digest that we do

TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}


class AdapterError(BeftError, ValueError):
    """An adapter that cannot be saved, loaded or merged as asked; the model is as it was."""


@dataclass(frozen=True)
class Contents:
    """What an adapter changes: differences ``(P,)`` by module path, head values by name.

    terms: what was trained, as ``prepare`` takes it; empty where the adapter does not say.
    """

    biases: dict[str, Tensor]
    head: dict[str, Tensor]
    terms: tuple[str, ...] = ()


def head_modules(model: nn.Module, parameters: Iterable[str]) -> list[str]:
    """The outermost modules that hold the named parameters and no other."""
    wanted = set(parameters)
    above = outer_modules(wanted)
    found: list[str] = []
    for name, module in model.named_modules():
        if name not in above or name.startswith(tuple(f"{outer}." for outer in found)):
            continue
        if {f"{name}.{n}" for n, _ in module.named_parameters()} <= wanted:
            found.append(name)
    covered = tuple(f"{name}." for name in found)
    if left := [n for n in sorted(wanted) if not n.startswith(covered)]:
        raise AdapterError(
            f"head parameter '{left[0]}' shares its module with frozen ones: PEFT's format has "
            "no place for it"
        )
    return found


def head_state(model: nn.Module, modules: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of the head's modules, buffers included, sharing the model's memory."""
    found: dict[str, Tensor] = {}
    for name in modules:  # not of the whole model: where that is sharded it is a call of all ranks
        found |= model.get_submodule(name).state_dict(prefix=f"{name}.")
    return found


def unsupported(model: nn.Module, modules: Iterable[str]) -> str | None:
    """Why PEFT cannot load biases of these modules, or None where it can."""
    for name in modules:
        module = model.get_submodule(name)
        if not isinstance(module, nn.Linear):
            return (
                f"PEFT's BEFT tuner takes nn.Linear only, and '{name}' is {type(module).__name__}"
            )
    return None


def write(folder: Path, model: nn.Module, contents: Contents, facts: JsonObject, card: str) -> None:
    """Write the three files as one; see ``whole_files``.

    Args:
        facts: what the config keeps beside PEFT's own. The digests of weights and config join it.
    """
    tensors = {
        f"{PEFT_PREFIX}{m}{BIAS_ENDING}": t.reshape(1, -1) for m, t in contents.biases.items()
    }
    tensors |= {PEFT_PREFIX + n: t for n, t in contents.head.items()}
    if bad := [n for n, t in tensors.items() if not bool(t.isfinite().all())]:
        raise AdapterError(f"'{bad[0]}' is not finite: nothing was saved")
    with whole_files(folder, last=CONFIG) as temporary:
        weights = write_tensors(temporary / WEIGHTS, tensors, METADATA)
        (temporary / CARD).write_text(card, encoding="utf-8")
        facts = facts | {"weights": weights, DIGEST: UNSEALED}
        write_json(temporary / CONFIG, peft_config(model, contents, facts))


def peft_config(model: nn.Module, contents: Contents, facts: JsonObject) -> JsonObject:
    """``adapter_config.json``. PEFT complains of a key that it does not know, but not of what
    stands under ``auto_mapping``: our own facts do."""
    kind = class_of(model)
    return {
        "auto_mapping": {
            "base_model_class": kind.__name__,
            "parent_library": kind.__module__,
            "beft_ext": facts,
        },
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None),
        "inference_mode": True,
        "init_weights": True,
        "modules_to_save": head_modules(model, _parameters(model, contents.head)) or None,
        "peft_type": "BEFT",
        "peft_version": "0.21.0",
        "revision": None,
        "target_modules": sorted(contents.biases),
        "task_type": task_type(model),
    }


def task_type(model: nn.Module) -> str | None:
    """PEFT's name of what the model's class is for; None for a class of no known ending."""
    name = class_of(model).__name__
    return next((task for ending, task in TASK_TYPES.items() if name.endswith(ending)), None)


def class_facts(model: nn.Module) -> JsonObject:
    """``classes``: names of the head's outputs, where they say more than their numbers."""
    names = class_names_of(getattr(model, "config", None))
    return {"classes": list(names)} if names else {}


def model_facts(model: nn.Module) -> JsonObject:
    """What must be the same in the model of an adapter and the one that it is loaded in."""
    config = getattr(model, "config", None)
    keys = ("model_type", "num_hidden_layers", "hidden_size")
    return {k: v for k in keys if isinstance(v := getattr(config, k, None), int | str)}


def _parameters(model: nn.Module, names: Iterable[str]) -> list[str]:
    own = {n for n, _ in model.named_parameters()}
    return [n for n in names if n in own]
