"""What a training reached, on which rows, and what would be reached without it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from beft_ext.commands.processes import shared_by_all
from beft_ext.commands.watched import watched
from beft_ext.files import JsonObject
from beft_ext.tasks import Batches, Example, Objective, Task
from beft_ext.tasks.metrics import measure
from beft_ext.tasks.streams import Examples

BATCH = 64  # rows that a model answers at once
BEST = "best on validation"  # not what unseen rows would give: these rows chose the epoch


@dataclass(frozen=True)
class Judged:
    """Rows that judge a model. split: 'validation', 'test'; majority: what the class that most
    training rows have reaches on them, by metric, and its name."""

    split: str
    examples: Sequence[Example]
    batches: Batches
    objective: Objective
    majority: tuple[str, Mapping[str, float]] | None

    @classmethod
    def of(
        cls,
        objective: Objective,
        split: str,
        examples: Sequence[Example],
        train: Sequence[Example] | Examples,
    ) -> Judged:
        """Raises DataError where a metric cannot be had of these rows, WorkflowError where another
        rank has others."""
        batches = shared_by_all(objective.held_out(examples, BATCH))
        return cls(split, examples, batches, objective, _majority(objective.task, train, examples))

    def measure(self, model: nn.Module) -> dict[str, float]:
        """The task's metrics."""
        shown = watched(self.batches, "evaluation")
        return self.objective.evaluate(model, shown, self.examples)

    def beside(self, before: Mapping[str, float]) -> dict[str, float]:
        """The deciding metric of what a training must beat, by words for it: the model as it was,
        and always saying the class that most training rows have."""
        metric = self.objective.task.metric
        found = {"before training": before[metric]}
        if self.majority is not None:
            found[f"always '{self.majority[0]}'"] = self.majority[1][metric]
        return found

    def start(self, before: Mapping[str, float]) -> str:
        """Where a training sets out from, in a line."""
        (name, reached), *guess = self.beside(before).items()
        line = f"{name}  {self.objective.task.metric} {reached:.4f}"
        line += "".join(f"  ({said}: {value:.4f})" for said, value in guess)
        return f"{line}  on {len(self.examples)} {self.split} rows"


@dataclass(frozen=True)
class Report:
    """What a training reached. best: of the epochs, on the rows that chose between them; before,
    after: on ``judged``, which are others where there are test rows."""

    judged: Judged
    before: Mapping[str, float]
    after: Mapping[str, float]
    best: float

    def record(self) -> JsonObject:
        """As evaluation.json and the adapter keep it. ``after`` stands there only of rows that no
        choice has seen."""
        judged, metric = self.judged, self.judged.objective.task.metric
        seen = judged.split == "validation"
        found: JsonObject = {"rows": judged.split, "examples": len(judged.examples)}
        found |= {"before": dict(self.before), "after": None if seen else dict(self.after)}
        found[BEST.replace(" ", "_")] = dict(self.after) if seen else {metric: self.best}
        if judged.majority is not None:
            found["majority"] = {"class": judged.majority[0], **judged.majority[1]}
        return found

    def __str__(self) -> str:
        judged, metric = self.judged, self.judged.objective.task.metric
        rows = f"{len(judged.examples)} {judged.split} rows"
        before, after = self.before[metric], self.after[metric]
        if judged.split == "validation":
            told = f"{metric} {before:.4f} before, {BEST} {after:.4f} ({rows}, which chose the "
            return told + "epoch: --test-file or --test-split measures on others)"
        told = f"{metric} {before:.4f} before, {after:.4f} after, on {rows} that no choice saw"
        return f"{told} ({BEST}: {self.best:.4f})"


def _majority(
    task: Task, train: Sequence[Example] | Examples, examples: Sequence[Example]
) -> tuple[str, Mapping[str, float]] | None:
    if task.kind != "classification":
        return None
    labels = train.labels if isinstance(train, Examples) else [e.label for e in train]
    place = int(Counter(labels).most_common(1)[0][0])
    name = task.classes[place] if place < len(task.classes) else str(place)
    return name, measure(task.metrics, [place] * len(examples), examples)
