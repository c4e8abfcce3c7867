"""The options of ``beft-ext``'s verbs, in groups, and the settings that are made of them."""

from __future__ import annotations

import argparse
from pathlib import Path

from beft_ext.commands.loading import OBJECTIVES, ModelSpec, WorkflowError
from beft_ext.commands.placement import DTYPES, Placement
from beft_ext.commands.sources import Parts, Source
from beft_ext.tasks import TASKS
from beft_ext.tasks.metrics import METRICS

TERMS = "value@6-11+query is the value in layers 6 to 11, from 0, and every query"
FILES = "csv, tsv, json, jsonl or parquet, also compressed (.gz, .bz2, .xz, .zst)"


class Formatter(argparse.HelpFormatter):
    """Every default stands in the help, also where no other word does."""

    def _get_help_string(self, action: argparse.Action) -> str:
        said = action.help or ""
        silent = any(action.default is value for value in (None, False, argparse.SUPPRESS))
        if silent or action.required or not action.option_strings or "default" in said:
            return said
        return f"{said} (default: %(default)s)".lstrip()


def joined(text: str) -> str:
    """A set of terms or methods: a comma joins as + does."""
    return text.replace(",", "+")


def rate(text: str) -> float | None:
    """A learning rate; None for 'auto'."""
    return None if text == "auto" else float(text)


def add_model(parser: argparse.ArgumentParser, head: bool = True) -> None:
    """head: whether a new one may be asked for."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=True, metavar="MODEL", help="hub id or folder")
    group.add_argument(
        "--objective",
        choices=OBJECTIVES,
        default="auto",
        help="by a task head or by prompts; auto: prompts for a decoder, where the task has one",
    )
    if head:
        group.add_argument(
            "--new-head", action="store_true", help="put a new head in place of the model's own"
        )
    group.add_argument(
        "--max-length",
        type=int,
        metavar="TOKENS",
        help="longer texts are cut (default: 128 for a head, 2048 for prompts)",
    )
    group.add_argument("--seed", type=int, default=0, help="of every choice made at random")
    add_placement(group)


def add_placement(group: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    """How the model's weights are held."""
    group.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of the weights; auto: as the folder has it"
    )
    group.add_argument(
        "--device-map",
        metavar="auto|sequential|DEVICE",
        help="auto: layers over all GPUs, then the host, then the disk, by Accelerate "
        "(default: the first GPU, else the host)",
    )
    group.add_argument(
        "--max-memory",
        metavar="D=SIZE,D=SIZE",
        help="of a device map, such as 0=20GiB,cpu=64GiB (default: what is free)",
    )


def add_task(parser: argparse.ArgumentParser, answers: bool = False, judged: bool = True) -> None:
    """What the rows mean. answers: of a model that is trained, whose adapter may say it; judged:
    whether there are labels to measure by."""
    kept = "the adapter's, else " if answers else ""
    group = parser.add_argument_group("task: by name, or what the columns of a file mean")
    group.add_argument("--task", metavar="NAME", help=", ".join(TASKS))
    group.add_argument(
        "--task-config", type=Path, metavar="F", help="JSON with the fields that 'tasks' prints"
    )
    group.add_argument("--text-column", metavar="C", help=f"text (default: {kept}sentence)")
    group.add_argument("--text-pair-column", metavar="C", help="second text, for pairs")
    group.add_argument("--label-column", metavar="C", help=f"label (default: {kept}label)")
    if not answers:
        group.add_argument(
            "--group-by",
            metavar="C",
            help="what rows have in common (a passage, a user): gains leave such rows out together",
        )
    group.add_argument(
        "--kind",
        choices=("classification", "regression"),
        help="labels are classes, by word or number, or numbers to be predicted "
        f"(default: {kept}classification)",
    )
    if judged:
        group.add_argument(
            "--metric",
            type=joined,
            metavar="M+M",
            help=f"the first decides; {', '.join(METRICS)} (default: the task's; accuracy for "
            "classes, pearson for numbers)",
        )


def add_rows(parser: argparse.ArgumentParser, train: bool = True) -> None:
    """Where the rows are."""
    group = parser.add_argument_group("rows")
    group.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="of --task NAME: holds NAME/train.jsonl or the like (default: the hub)",
    )
    group.add_argument("--train-file", type=Path, metavar="F", help=FILES)
    if train:
        group.add_argument(
            "--train-size", type=int, metavar="N", help="rows to train on (default: all)"
        )
    chosen = "these choose the epoch" if train else "measured, where there is no test"
    group.add_argument("--validation-file", type=Path, metavar="F", help=chosen)
    group.add_argument(
        "--validation-split", type=float, metavar="P", help="a share of the training rows instead"
    )
    group.add_argument(
        "--validation-size",
        type=int,
        metavar="N",
        help="so many rows validate: of the validation rows, or of the training rows where there "
        "are none",
    )
    kept = "measured once at the end; no choice sees them" if train else "measured"
    group.add_argument("--test-file", type=Path, metavar="F", help=kept)
    group.add_argument(
        "--test-split", type=float, metavar="P", help="a share of the training rows instead"
    )


def add_training(parser: argparse.ArgumentParser, epochs: int, warmup: float, race: bool) -> None:
    """race: whether the rate may be found by an audition."""
    group = parser.add_argument_group("training")
    group.add_argument("--batch-size", type=int, default=16, metavar="N", help="rows of a step")
    group.add_argument(
        "--gradient-accumulation",
        type=int,
        default=1,
        metavar="N",
        help="parts that a step's rows are read in: the same step in less memory",
    )
    group.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="compute activations anew in the backward: less memory, more time",
    )
    group.add_argument("--epochs", type=int, default=epochs, metavar="N", help="passes")
    if race:
        group.add_argument(
            "--lr",
            type=rate,
            default="auto",
            metavar="auto|LR",
            help="learning rate; auto: raced on parts of the training rows",
        )
        group.add_argument(
            "--audition-budget",
            type=float,
            default=3.0,
            metavar="EPOCHS",
            help="what --lr auto may cost, in epochs' time",
        )
    else:
        group.add_argument("--lr", type=float, default=1e-3, help="learning rate")
    group.add_argument(
        "--warmup",
        type=float,
        default=warmup,
        metavar="SHARE",
        help="of the steps, in which the rate rises",
    )
    group.add_argument(
        "--clip",
        type=float,
        default=1.0,
        dest="max_grad_norm",
        metavar="NORM",
        help="largest norm of the gradient; 0: any",
    )
    group.add_argument(
        "--group-by-length",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="batches of rows of like length, in random order",
    )


def add_out(parser: argparse.ArgumentParser, help: str, required: bool = True) -> None:
    group = parser.add_argument_group("result")
    group.add_argument("--out", required=required, type=Path, metavar="DIR", help=help)


def source_of(arguments: argparse.Namespace) -> Source:
    """Raises WorkflowError for parts that do not go together."""
    given = vars(arguments).get  # not every verb has all of them
    parts = Parts(
        given("validation_split"),
        given("validation_size"),
        given("test_split"),
        given("test_file"),
        given("seed", 0),
    )
    return Source(
        name=given("task"),
        data=given("data"),
        train_file=given("train_file"),
        validation_file=given("validation_file"),
        config=given("task_config"),
        text=given("text_column"),
        pair=given("text_pair_column"),
        label=given("label_column"),
        kind=given("kind"),
        group=given("group_by"),
        metrics=tuple(filter(None, (given("metric") or "").split("+"))),
        parts=parts,
    )


def spec_of(arguments: argparse.Namespace) -> ModelSpec:
    """Raises WorkflowError for a number out of range."""
    a = arguments
    if a.max_length is not None and a.max_length < 1:
        raise WorkflowError("--max-length must be at least 1")
    if not 0 <= a.seed < 2**32:
        raise WorkflowError(f"--seed must be 0 to {2**32 - 1}, but is {a.seed}")
    new_head = vars(a).get("new_head", False)
    return ModelSpec(a.model, a.objective, a.max_length, a.seed, new_head, placement_of(a))


def placement_of(arguments: argparse.Namespace) -> Placement:
    """Raises PlacementError for what does not go together."""
    a = arguments
    checkpointing = vars(a).get("gradient_checkpointing", False)
    return Placement(a.dtype, a.device_map, a.max_memory, checkpointing)
