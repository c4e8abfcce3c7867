"""From folders and names to models, and the way a task is put to them."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from beft_ext.commands.placement import USUAL, Placement
from beft_ext.errors import BeftError
from beft_ext.models import head_parameters
from beft_ext.tasks import DataError, Example, HeadObjective, Objective, PromptObjective, Task
from beft_ext.tasks.reading import agree, stated_pad

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

OBJECTIVES = ("auto", "head", "prompt")
MOST_CLASSES, MOST_LAYERS = 10_000, 2_000
FOREIGN_CODE = "it wants code of its own to be run, which is not done"
LOADING_REASONS = {  # by what transformers says
    "trust_remote_code": FOREIGN_CODE,
    "contains custom code": FOREIGN_CODE,
    "connect to": "it is no folder, not in the local cache, and the hub cannot be reached",
    "no file named model.safetensors": "it has no model.safetensors, and pickles such as "
    "pytorch_model.bin can run code and are not read: save it as safetensors",
}


class WorkflowError(BeftError, ValueError):
    """Arguments that do not go together, or a model that cannot be had."""


class HeadError(WorkflowError):
    """The folder's head is another task's. outputs: how many it has."""

    def __init__(self, model: str, outputs: int, needed: int) -> None:
        super().__init__(
            f"model '{model}' has a head of {outputs} outputs, and here it needs {needed}: "
            "--new-head puts a new one in its place"
        )
        self.outputs = outputs


def pretrained(model: str, auto: str, **options: object) -> Any:
    """A transformers object by the Auto class called ``auto``.

    Nothing is unpickled, and no code of the folder is run. Raises WorkflowError, one line.
    """
    import transformers

    _check_folder(model)
    if auto.startswith("AutoModel"):
        options["use_safetensors"] = True
    try:
        found = getattr(transformers, auto).from_pretrained(
            model, trust_remote_code=False, **options
        )
    except Exception as error:  # a file's reader, a config's checks, the hub's client
        raise WorkflowError(f"model '{model}' cannot be loaded: {_reason(error)}") from error
    if auto == "AutoTokenizer" and set(found.get_vocab()) <= set(found.all_special_tokens):
        raise WorkflowError(f"model '{model}' has no tokenizer: its vocabulary is empty")
    return found


def _reason(error: Exception) -> str:
    said = str(error).strip() or type(error).__name__
    return next(
        (told for sign, told in LOADING_REASONS.items() if sign in said), said.splitlines()[0]
    )


def _check_folder(model: str) -> None:
    """transformers takes for a name of the hub what is no folder."""
    path = Path(model)
    if (path / "adapter_config.json").is_file():  # transformers would load the base it names
        raise WorkflowError(f"{model} holds an adapter: give --model its base, --adapter this")
    if path.is_dir() and not (path / "config.json").is_file():
        raise WorkflowError(f"{model}: the folder has no config.json")
    if path.is_file():
        raise WorkflowError(f"{model} is a file: give the folder of a model, or a hub id")
    if not path.exists() and (path.is_absolute() or model.startswith(".") or model.count("/") > 1):
        raise WorkflowError(f"{model}: no such folder")


@dataclass(frozen=True)
class Folder:
    """A model before its weights are read.

    Attributes:
        name: hub id or folder.
        config, tokenizer: they agree on the padding token.
        skeleton: the model without its head, on the meta device: shapes and no values.
    """

    name: str
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    skeleton: nn.Module

    @classmethod
    def of(cls, name: str) -> Folder:
        """Raises WorkflowError for files that are damaged, or not of one model."""
        config, tokenizer = pretrained(name, "AutoConfig"), pretrained(name, "AutoTokenizer")
        text = config.get_text_config()
        layers = getattr(text, "num_hidden_layers", 0)
        if isinstance(layers, int) and layers > MOST_LAYERS:
            raise WorkflowError(f"model '{name}': its config asks for {layers} layers")
        if "/" in str(config._attn_implementation):  # a kernel of the hub
            raise WorkflowError(f"model '{name}' cannot be loaded: {FOREIGN_CODE}")
        text.pad_token_id = own = stated_pad(config, tokenizer)
        skeleton = _skeleton(name, config)
        try:
            agree(skeleton, tokenizer)
        except DataError as error:
            raise WorkflowError(f"model '{name}': {error}") from error
        config = skeleton.config
        if config.get_text_config().pad_token_id != own:  # positions may count from it
            skeleton = _skeleton(name, config)
        return cls(name, config, tokenizer, skeleton)

    def load(
        self,
        auto: str,
        new_head: bool = False,
        classes: Sequence[str] = (),
        trained: bool = False,
        placement: Placement = USUAL,
        **options: Any,
    ) -> nn.Module:
        """The model with its weights.

        Args:
            auto: name of a transformers class.
            new_head: put a new head in place of the folder's.
            classes: names of the head's outputs.
            trained: take the folder's own head or none.
            placement: the type and the devices of the weights.
            options: of the config.

        Raises: WorkflowError where weights of the body are missing or of another shape, where
            the head is another task's and no new one is asked for, and where a trained head is
            asked for and there is none.
        """
        config = copy.deepcopy(self.config)
        for key, value in options.items():
            setattr(config, key, value)
        more = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        more |= placement.options(auto, config)
        found, told = pretrained(self.name, auto, config=config, **more)
        own = {id(p) for p in head_parameters(found)}
        head = {n for n, p in found.named_parameters() if id(p) in own}
        sizes = {name: (there, here) for name, there, here in told["mismatched_keys"]}
        missing = set(told["missing_keys"])
        self._check_body(missing - head, set(sizes) - head)
        if sizes and not new_head:
            there, here = min(sizes.values(), key=lambda pair: len(pair[0]))
            raise HeadError(self.name, there[0], here[0])
        new = sorted(head if new_head else missing & head)
        if trained and new:
            raise WorkflowError(
                f"model '{self.name}' has no trained head, and a new one ('{new[0]}') would answer "
                "at random: tune it and give --adapter, or give the folder of a trained model"
            )
        if new_head:
            _reinitialise(found, own)
        if poolers := {id(p) for n, p in found.named_parameters() if n in missing - head}:
            # No adapter keeps it: whoever loads the folder must get the same one.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                _reinitialise(found, poolers)
        if head and options.get("num_labels", 1) > 1:
            self._name_classes(found.config, classes, bool(new))
        return placement.settle(found)

    def _check_body(self, missing: set[str], sizes: set[str]) -> None:
        if sizes:
            raise WorkflowError(
                f"model '{self.name}' cannot be loaded: its weights do not have the shapes that "
                f"its config says ({min(sizes)})"
            )
        # A pooler comes with a head, and is new where the folder had another.
        if lacking := sorted(n for n in missing if "pooler" not in n):
            raise WorkflowError(
                f"model '{self.name}' cannot be loaded: its weights lack '{lacking[0]}'; they are "
                "another model's, or damaged"
            )

    def _name_classes(self, config: PreTrainedConfig, classes: Sequence[str], new: bool) -> None:
        """Names of the outputs: those of the task, else the folder's own, else numbers."""
        plain = [f"LABEL_{i}" for i in range(config.num_labels)]
        own = plain if new else [str(n) for n in config.id2label.values()]
        classes = classes if len(classes) == len(plain) else ()
        require_order(f"model '{self.name}'", own, classes)
        config.id2label = dict(enumerate(classes or own))
        config.label2id = {n: i for i, n in config.id2label.items()}


def require_order(whose: str, own: Sequence[str], classes: Sequence[str]) -> None:
    """Raise WorkflowError where a trained head has the task's classes in another order."""
    ours, theirs = ([n.casefold() for n in names] for names in (classes, own))
    if ours != theirs and sorted(ours) == sorted(theirs):
        raise WorkflowError(
            f"{whose} has the classes in another order ({', '.join(own)}): let the task's "
            "'classes' have it too, or put a new head in its place (--new-head)"
        )


def _skeleton(name: str, config: PreTrainedConfig) -> nn.Module:
    import transformers

    try:
        with torch.device("meta"):
            found: nn.Module = transformers.AutoModel.from_config(config, trust_remote_code=False)
    except Exception as error:  # a config's checks, a layer's own
        raise WorkflowError(f"model '{name}' cannot be loaded: {_reason(error)}") from error
    return found


@torch.no_grad()
def _reinitialise(model: PreTrainedModel, parameters: Collection[int]) -> None:
    """New values for the modules whose parameters are all among these (by ``id``)."""
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if own and all(id(p) in parameters for p in own):
            for parameter in own:
                parameter._is_hf_initialized = False  # else transformers passes it by
            model._init_weights(module)


@dataclass(frozen=True)
class ModelSpec:
    """Which model, and how a task is put to it.

    Attributes:
        model: hub id or folder.
        objective: 'head', 'prompt', or 'auto': prompts for a model that only goes from left to
            right, where the task has one.
        max_length: of a text in tokens.
        seed: of a new head's weights.
        new_head: put a new head in place of the folder's.
        placement: the type and the devices of the weights.
    """

    model: str
    objective: str = "auto"
    max_length: int | None = None
    seed: int = 0
    new_head: bool = False
    placement: Placement = USUAL

    def load(
        self,
        task: Task,
        classes: int | None = 2,
        shots: Sequence[Example] = (),
        trained: bool = False,
    ) -> tuple[nn.Module, Objective]:
        """The model and the objective.

        classes: of a task that does not name them; None for as many as the folder's head has.
        trained: take the folder's own head or none.
        Raises WorkflowError or DataError.
        """
        folder = Folder.of(self.model)
        if classes is not None:
            return self._load(folder, task, classes, shots, trained)
        try:
            return self._load(folder, task, folder.config.num_labels, shots, trained)
        except HeadError as error:  # the config does not say how many
            if task.kind != "classification" or task.classes:
                raise
            return self._load(folder, task, error.outputs, shots, trained)

    def _load(
        self, folder: Folder, task: Task, classes: int, shots: Sequence[Example], trained: bool
    ) -> tuple[nn.Module, Objective]:
        tokenizer, config = folder.tokenizer, folder.config
        objective: Objective
        if self._prompts(task, config):
            if not (goes_left_to_right(config) or getattr(config, "is_decoder", False)):
                raise WorkflowError(
                    f"prompts need a language model, and '{self.model}' is a {config.model_type}, "
                    "which does not go from left to right: take a decoder, or a task for a head"
                )
            objective = PromptObjective(task, tokenizer, folder.skeleton, self.max_length, shots)
        else:
            objective = HeadObjective(task, tokenizer, classes, self.max_length, folder.skeleton)
        options: dict[str, Any] = {
            "classes": task.classes,
            "trained": trained,
            "placement": self.placement,
        }
        options |= objective.model_options
        torch.manual_seed(self.seed)
        return folder.load(objective.auto, self.new_head, **options), objective

    def _prompts(self, task: Task, config: PreTrainedConfig) -> bool:
        if self.objective != "auto":
            return self.objective == "prompt"
        needed = task.kind == "generation"
        return needed or (bool(task.prompt) and goes_left_to_right(config))


def goes_left_to_right(config: PreTrainedConfig) -> bool:
    """True for a decoder: a type with a causal language model and no masked one."""
    from transformers.models.auto import modeling_auto as auto

    causal = config.model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    others = (
        auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )
    return causal and not any(config.model_type in names for names in others)


def outputs_of(task: Task, *examples: Iterable[Example]) -> int:
    """Number of classes of a task: those that it names, or what the labels call for. 1 of a task
    without any."""
    if task.kind != "classification":
        return 1
    return len(task.classes) or classes_of(*examples)


def classes_of(*examples: Iterable[Example]) -> int:
    """Number of classes that the labels call for; the targets of a regression call for none.

    Raises DataError where no head has so many.
    """
    largest = int(max((e.label for part in examples for e in part if e.right), default=0))
    if largest >= MOST_CLASSES:
        raise DataError(
            f"label {largest} asks for a head of {largest + 1} classes, at most {MOST_CLASSES} are "
            "made: number the classes from 0"
        )
    return largest + 1
