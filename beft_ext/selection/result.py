"""What a selection found, as an object, a printed table and files."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from beft_ext import __version__, scores
from beft_ext.errors import BeftError
from beft_ext.files import (
    DIGEST,
    UNSEALED,
    JsonObject,
    digest,
    locked,
    whole_file,
    whole_files,
    write_json,
    write_tensors,
)
from beft_ext.models import parse_terms
from beft_ext.plots import draw
from beft_ext.selection.gain_result import Gains

RECORD, BIASES, PICTURE = "selection.json", "biases.safetensors", "heatmap.png"
GRAMS = "gains.safetensors"
SHOWN = 3  # terms of a ranking that a line has room for


class SelectionError(BeftError, RuntimeError):
    """A selection that cannot start or go on; the model is as it was before."""


@dataclass(frozen=True, repr=False)
class Selection:
    """What ``select`` found; printed, it is the ranked tables of the gains and of the run.

    A score that does not exist is NaN here and null in ``selection.json``.

    Attributes:
        method: what ``best`` goes by.
        scores: ``scores[method][term]``, each the mean over the term's layers.
        per_layer: ``per_layer[method][term]``, one score for each layer, in their order; the
            mean where a layer has several biases of the term.
        ranking: ``ranking[method]``, the terms from the greatest down. Dead terms and
            undefined scores are left out.
        undefined: why a term has no BEFT score, by term.
        dead: terms whose gradient is zero but for rounding.
        obtuse: names of the biases that turned by more than 90 degrees.
        losses: one number for each step that was made.
        steps: number of steps that were planned.
        initial, current: each bias ``(H,)`` before and after the run, by ``Bias.name``, on the
            CPU. Half-precision biases are fp32 in ``current``.
        gains: what each term alone would explain; None where they were not asked for.
        model: name or folder of the model, as its config has it; its class where that has none.
        best: the first term by ``method``. To read it where no term is ranked raises
            SelectionError.
    Example:
        >>> import beft_ext
        >>> selection = beft_ext.select(model, loader, "magnitude")
        >>> selection.dead
        ['key']
        >>> selection.best == selection.ranking["magnitude"][0]
        True
    Source: Huang et al. 2025 (arXiv 2509.15974); docs/definitions.md.
    """

    method: str
    scores: dict[str, dict[str, float]]
    per_layer: dict[str, dict[str, list[float]]]
    ranking: dict[str, list[str]]
    undefined: dict[str, str]
    dead: list[str]
    obtuse: list[str]
    losses: list[float]
    steps: int
    initial: dict[str, Tensor] = field(repr=False)
    current: dict[str, Tensor] = field(repr=False)
    gains: Gains | None = None
    model: str = ""

    @property
    def best(self) -> str:
        """The first term by ``method``. Raises SelectionError where no term is ranked."""
        if not self.ranking.get(self.method):
            other = next((m for m, ranked in self.ranking.items() if ranked), None)
            advice = "select anew" if other is None else f"choose another method, such as '{other}'"
            raise SelectionError(f"no term has a defined '{self.method}' score: {advice}")
        return self.ranking[self.method][0]

    def __repr__(self) -> str:
        own, order = self.scores.get(self.method, {}), self.ranking.get(self.method, [])
        first = " > ".join(f"{t} {own[t]:.3g}" for t in order[:SHOWN]) or "no term is ranked"
        more = f" > {len(order) - SHOWN} more" if len(order) > SHOWN else ""
        left = [t for t in self.undefined if t not in (*order, *self.dead)]
        unranked = (("dead", self.dead), ("undefined", left))
        notes = [f"{what}: {', '.join(terms)}" for what, terms in unranked if terms]
        notes.append(f"{len(self.losses)} of {self.steps} steps")
        return f"<Selection by '{self.method}': {first}{more}\n {'; '.join(notes)}>"

    def __str__(self) -> str:
        parts = [] if self.gains is None else [str(self.gains)]
        if columns := [m for m in scores.SCORES if self.scores.get(m)]:
            parts.append(self._table(columns))
        return "\n\n".join(parts or ["no term was scored"])

    def _table(self, columns: list[str]) -> str:
        """The scores of the run."""
        by = self.method if self.method in columns else columns[0]
        order = self.ranking.get(by, [])
        rest = [t for t in self.scores[by] if t not in order]
        width = max(18, *(1 + len(term) for term in self.scores[by]))
        lines = [f"{'':>4} {'term':<{width}}" + "".join(f"{m:>16}" for m in columns)]
        for place, term in enumerate(order + rest, 1):
            rank = f"{place}." if term in order else "-"
            note = "  dead" if term in self.dead else ""
            note += "  undefined" if term in self.undefined else ""
            cells = "".join(f"{self.scores[m][term]:>16.4e}" for m in columns)
            lines.append(f"{rank:>4} {term:<{width}}{cells}{note}")
        return "\n".join(lines)

    def plot(self, path: str | Path, task: str = "") -> None:
        """Draw the term x layer heatmap of ``method``.

        Args:
            path: where the picture goes, as PNG.
            task: its name, for the title, which says the model too.
        Raises:
            PlotError: matplotlib is missing, or there are no scores by layer (a selection that
                was read from a file).
        """
        from beft_ext.plots import heatmap, title_of

        rows: dict[str, list[float | None]] = {
            name: [*[None] * parse_terms(name)[0].first, *values]
            for name, values in self.per_layer.get(self.method, {}).items()
        }
        layers = max(map(len, rows.values()), default=0)
        rows |= {name: [math.nan] * layers for name in self.dead if name not in rows}
        of = title_of(self.model, task)
        title = f"{of}: {self.method}" if of else self.method
        with whole_file(path) as temporary:
            heatmap(rows, title, temporary, score=self.method, dead=self.dead)

    def save(self, folder: str | Path, about: JsonObject | None = None) -> None:
        """Write ``selection.json``, its tensors and ``heatmap.png`` as one.

        ``biases.safetensors`` has the biases before and after the run, ``gains.safetensors`` the
        Gram matrices that the gains are computed from. Without matplotlib there is no picture,
        and a warning says so.

        Args:
            folder: is made where it does not exist.
            about: what else ``selection.json`` keeps, as JSON: the ``task`` and the ``file`` of its
                rows, of which the picture's title says the name.
        Raises:
            OSError: the disk is full, or the folder cannot be written to.
        """
        tensors = {f"initial/{name}": t for name, t in self.initial.items()}
        tensors |= {f"current/{name}": t for name, t in self.current.items()}
        about = about or {}
        record = {
            **about,
            "version": __version__,
            "model": self.model,
            "method": self.method,
            "best": next(iter(self.ranking.get(self.method, [])), None),
            "ranking": self.ranking,
            "scores": self.scores,
            "per_layer": self.per_layer,
            "undefined": self.undefined,
            "dead": self.dead,
            "above_90_degrees": self.obtuse,
            "losses": self.losses,
            "steps": self.steps,
            "gains": None if self.gains is None else self.gains.record(),
            DIGEST: UNSEALED,
        }
        with whole_files(folder, last=RECORD) as temporary:
            record["biases"] = write_tensors(temporary / BIASES, tensors)
            if self.gains is not None:
                record["grams"] = write_tensors(temporary / GRAMS, self.gains.tensors())
            task = about.get("task", {}).get("name") or about.get("file", "")
            draw(self.plot, temporary / PICTURE, task)
            write_json(temporary / RECORD, _nulls(record))


RECORD_KEYS = {"method", "best", "ranking", "scores", "per_layer", "undefined", "dead", "losses"}
RECORD_KEYS |= {"model", "steps", "above_90_degrees", "biases", "gains", "grams", DIGEST}
RECORD_KEYS |= {"version", "task", "file"}
RECORD_KEYS |= {"settled"}  # of older files


def read_selection(path: Path) -> Selection:
    """Read a Selection from ``selection.json`` or its folder, without tensors and ``per_layer``.

    Raises:
        SelectionError: the file is not whole, or the ``biases.safetensors`` beside it is damaged
            or of another selection. That file may be missing.
    """
    path = path / RECORD if path.is_dir() else path
    try:
        with locked(path.parent):
            record: JsonObject = dict(json.loads(path.read_text(encoding="utf-8")))
            _check_digests(path, record)
        return Selection(
            method=record["method"],
            scores={m: _numbers(v) for m, v in record["scores"].items()},
            per_layer={},
            ranking=record["ranking"],
            undefined=record["undefined"],
            dead=record["dead"],
            obtuse=record["above_90_degrees"],
            losses=record["losses"],
            steps=record["steps"],
            initial={},
            current={},
            gains=Gains.of(record["gains"]) if record.get("gains") else None,
            model=str(record.get("model", "")),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SelectionError(f"{path} is not a {RECORD}: {error}") from error


def _check_digests(path: Path, record: JsonObject) -> None:
    """Raise SelectionError where a digest is not that of its file, or a key is unknown.

    Files that were saved before there were digests have none.
    """
    if odd := sorted(record.keys() - RECORD_KEYS):
        raise SelectionError(
            f"{path} is not a selection.json, or is damaged: it has the key '{odd[0][:80]}'"
        )
    sealed = digest(path, SelectionError) is not None
    if sealed != ("biases" in record) or (DIGEST in record) != sealed:
        raise SelectionError(f"{path} is damaged: its digest is not whole")
    for file, key in ((BIASES, "biases"), (GRAMS, "grams")):
        beside = path.parent / file
        if key in record and beside.exists() and digest(beside, SelectionError) != record[key]:
            raise SelectionError(
                f"{beside} is damaged or of another selection than {path.name} beside it: select "
                "again"
            )


def _numbers(values: dict[str, float | None]) -> dict[str, float]:
    return {t: math.nan if v is None else v for t, v in values.items()}


def _nulls(value: object) -> object:
    """JSON has no NaN: null in its place."""
    if isinstance(value, dict):
        return {k: _nulls(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_nulls(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
