"""The metrics of tasks, each the larger the better. scikit-learn and scipy do the counting."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from beft_ext.tasks.cells import DataError, reason
from beft_ext.tasks.examples import Example

# Classes, choices, numbers or texts, as a metric's kind of task predicts them: see SUITABLE.
Predictions = Sequence[Any]
Metric = Callable[[Predictions, Sequence[Example]], float]


def measure(
    metrics: Sequence[str], predictions: Predictions, examples: Sequence[Example]
) -> dict[str, float]:
    """Each metric of ``predictions``: classes, choices, numbers or generated texts."""
    return {name: float(METRICS[name](predictions, examples)) for name in metrics}


def _accuracy(predictions: Sequence[int], examples: Sequence[Example]) -> float:
    return _mean([p in e.right for p, e in zip(predictions, examples, strict=True)])


def _counted(name: str, **options: str) -> Metric:
    def score(predictions: Sequence[int], examples: Sequence[Example]) -> float:
        labels = [int(e.label) for e in examples]
        counted = getattr(_library("sklearn.metrics"), name)
        try:
            return float(counted(labels, predictions, **options))
        except ValueError as error:  # f1 of a model that says a third class
            raise DataError(f"{name} cannot be counted: {reason(error)}") from error

    return score


def _correlation(name: str) -> Metric:
    def score(predictions: Sequence[float], examples: Sequence[Example]) -> float:
        labels = [e.label for e in examples]
        if wrong := [p for p in predictions if not math.isfinite(p)]:
            raise DataError(f"the model predicts {wrong[0]}: its training has diverged")
        if len(set(predictions)) < 2 or len(set(labels)) < 2:
            return 0.0  # a constant does not correlate with anything
        return float(getattr(_library("scipy.stats"), name)(labels, predictions).statistic)

    return score


def _exact_match(predictions: Sequence[str], examples: Sequence[Example]) -> float:
    return _best(predictions, examples, lambda a, b: float(a == b))


def _token_f1(predictions: Sequence[str], examples: Sequence[Example]) -> float:
    return _best(predictions, examples, _overlap)


def _best(
    predictions: Sequence[str],
    examples: Sequence[Example],
    score: Callable[[list[str], list[str]], float],
) -> float:
    """Mean of the best score over each example's answers, words compared as SQuAD does."""
    pairs = zip(predictions, examples, strict=True)
    return _mean([max(score(_words(p), _words(a)) for a in e.answers) for p, e in pairs])


def _words(text: str) -> list[str]:
    """Lower case, without punctuation and articles. Source: Rajpurkar et al. 2016 (SQuAD)."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def _overlap(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    common = (Counter(found) & Counter(wanted)).total()
    return 2 * common / (len(found) + len(wanted))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _library(name: str) -> ModuleType:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        raise DataError(
            f"this metric needs {name.partition('.')[0]}: pip install 'beft-ext[data]'"
        ) from error


METRICS: dict[str, Metric] = {
    "accuracy": _accuracy,
    "f1": _counted("f1_score"),
    "f1_macro": _counted("f1_score", average="macro"),
    "matthews": _counted("matthews_corrcoef"),
    "pearson": _correlation("pearsonr"),
    "spearman": _correlation("spearmanr"),
    "exact_match": _exact_match,
    "token_f1": _token_f1,
}

_LABELS = ("accuracy", "f1", "f1_macro", "matthews")

# By kind of task: what its predictions can be measured by.
SUITABLE: dict[str, tuple[str, ...]] = {
    "classification": _LABELS,
    "choice": _LABELS,
    "regression": ("pearson", "spearman"),
    "generation": ("exact_match", "token_f1"),
}
