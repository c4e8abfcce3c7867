"""``beft-ext``: the verbs of the library on the command line. Exit code 2 for bad input."""

from __future__ import annotations

import argparse
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from beft_ext import __version__, scores
from beft_ext.commands import methods, processes
from beft_ext.commands.arguments import (
    FILES,
    TERMS,
    Formatter,
    add_model,
    add_out,
    add_placement,
    add_rows,
    add_task,
    add_training,
    joined,
    placement_of,
    source_of,
    spec_of,
)
from beft_ext.commands.loading import WorkflowError
from beft_ext.commands.shortage import enough_memory
from beft_ext.errors import BeftError, BeftWarning
from beft_ext.files import require_writable, save_json
from beft_ext.parallel import leads
from beft_ext.selection.gain_result import GAIN


def main(argv: list[str] | None = None) -> int:
    with processes.one_voice():
        a = _parser().parse_args(argv)
    try:
        with _our_words_alone(), processes.together(a), enough_memory(a):
            if a.out is not None and leads():
                require_writable(a.out.parent if a.verb == "predict" else a.out)
            a.run(a)
    except KeyboardInterrupt:
        if processes.speaks():
            print(f"beft-ext: interrupted; {a.stands(a)}", file=sys.stderr)
        return 130
    except (BeftError, OSError) as error:
        if processes.speaks(error):
            print(f"beft-ext: {error}", file=sys.stderr)
        return 2
    return 0


@contextmanager
def _our_words_alone() -> Iterator[None]:
    """Our tables and notes on the screen, line by line: no warnings, log records, loading bars or
    reports of other packages, which nobody asked for."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log file shows each line as it comes
    logging.disable(logging.WARNING)
    from transformers.utils import logging as reports

    reports.set_verbosity_error()
    reports.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", BeftWarning)
            warnings.showwarning = _note
            yield
    finally:
        logging.disable(logging.NOTSET)


def _note(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    (file or sys.stderr).write(f"note: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="beft-ext",
        description="Select and train single bias terms. Exit code 2 for bad input.",
        formatter_class=Formatter,
    )
    parser.add_argument("--version", action="version", version=f"beft-ext {__version__}")
    parser.set_defaults(stands=lambda _: "nothing was written: results come whole, at the end")
    parser.set_defaults(joint=False, out=None)  # joint: several processes may run it together
    verbs = parser.add_subparsers(required=True, metavar="VERB", dest="verb")

    def verb(
        name: str, run: Callable[[argparse.Namespace], None], help: str
    ) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=help, description=help, formatter_class=Formatter)
        added.set_defaults(run=run)
        return added

    biases = verb("biases", _biases, "list the bias terms that a model has or can get")
    biases.add_argument("model", metavar="MODEL", help="hub id or folder")
    _select_options(verb("select", _select, "find out which bias term to train"))
    _tune_options(verb("tune", _tune, "train the chosen bias term and save the adapter"))
    evaluate = verb("evaluate", _evaluate, "measure a model, with an adapter or without")
    add_model(evaluate)
    evaluate.add_argument("--adapter", type=Path, metavar="DIR", help="what tune has saved")
    add_task(evaluate, answers=True)
    add_rows(evaluate, train=False)
    evaluate.add_argument(
        "--split",
        metavar="NAME",
        help="of a named task (default: test where rows are given for it, else validation)",
    )
    add_out(evaluate, "for evaluation.json", required=False)
    evaluate.set_defaults(joint=True)
    predict = verb("predict", _predict, "answer rows that have no labels")
    add_model(predict, head=False)
    predict.add_argument("--adapter", type=Path, metavar="DIR", help="what tune has saved")
    add_task(predict, answers=True, judged=False)
    predict.add_argument(
        "--file", required=True, type=Path, metavar="F", help=f"rows to answer: {FILES}"
    )
    predict.add_argument("--out", required=True, type=Path, metavar="F", help=".csv or .jsonl")
    predict.add_argument("--batch-size", type=int, default=64, metavar="N", help="rows at once")
    _compare_options(verb("compare", _compare, "methods side by side on one task"))
    merge = verb("merge", _merge, "a plain model folder with the adapter inside")
    merge.add_argument("--model", required=True, metavar="MODEL", help="hub id or folder")
    add_placement(merge)
    merge.add_argument("--adapter", required=True, type=Path, metavar="DIR", help="what tune saved")
    merge.add_argument("--out", required=True, type=Path, metavar="DIR", help="the new folder")
    tasks = verb("tasks", _tasks, "the named tasks; one's fields, and rows as a model reads them")
    _tasks_options(tasks)
    verb("doctor", _doctor, "which backends are usable here, and why not")
    demo = verb("demo", _demo, "select on the shipped data, then try the answer")
    add_out(demo, "for the selection", required=False)
    demo.set_defaults(out=Path("out/demo"))
    return parser


def _tasks_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", nargs="?", metavar="NAME", help="of a named task")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="so many training rows")
    parser.add_argument("--data", type=Path, metavar="DIR", help="its rows (default: the hub)")
    parser.add_argument("--task-config", type=Path, metavar="F", help="a task of one's own")
    parser.add_argument("--train-file", type=Path, metavar="F", help=f"its rows: {FILES}")


def _add_training_on_rows(parser: argparse.ArgumentParser, **training: Any) -> None:
    add_model(parser)
    add_task(parser)
    add_rows(parser)
    add_training(parser, **training)
    parser.set_defaults(joint=True)


def _select_options(parser: argparse.ArgumentParser) -> None:
    _add_training_on_rows(parser, epochs=1, warmup=0.0, race=False)
    group = parser.add_argument_group("selection")
    group.add_argument(
        "--terms", type=joined, metavar="T+T", help=f"candidates (default: all): {TERMS}"
    )
    group.add_argument(
        "--method",
        "--score",
        choices=(GAIN, *scores.SCORES),
        default=GAIN,
        metavar="SCORE",
        help=f"what the ranking goes by: {', '.join((GAIN, *scores.SCORES))}",
    )
    group.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="length of the run, in place of --epochs; 0 for the gains alone",
    )
    add_out(parser, "for selection.json, its tensors and heatmap.png")


def _tune_options(parser: argparse.ArgumentParser) -> None:
    _add_training_on_rows(parser, epochs=10, warmup=0.06, race=True)
    group = parser.add_argument_group("what trains, and how")
    group.add_argument(
        "--terms",
        type=joined,
        default="auto",
        metavar="auto|all|T+T",
        help=f"{TERMS}; auto: chosen by the gains",
    )
    group.add_argument(
        "--budget", type=int, metavar="N", help="parameters that auto may choose, at most"
    )
    group.add_argument("--resume", action="store_true", help="go on after a kill")
    group.add_argument(
        "--save-every", type=int, default=50, metavar="STEPS", help="from checkpoint to checkpoint"
    )
    group.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    group.add_argument("--compile", action="store_true", help="torch.compile of the model")
    group.add_argument("--graphs", action="store_true", help="whole steps as CUDA graphs")
    group.add_argument(
        "--deterministic", action="store_true", help="the same bits on a GPU too, which costs time"
    )
    add_out(parser, "for adapter/, evaluation.json, log.jsonl and the learning curve")
    parser.set_defaults(stands=_tune_stands)


def _compare_options(parser: argparse.ArgumentParser) -> None:
    _add_training_on_rows(parser, epochs=10, warmup=0.06, race=True)
    group = parser.add_argument_group("what is compared")
    group.add_argument(
        "--methods",
        default="head,auto,value,all-biases,random-mask,lora,full",
        metavar="M,M",
        help=f"{', '.join(methods.METHODS)}, or bias terms such as query+value@6-11, or "
        "lora:TERM, low-rank:TERM, random-mask:COUNT, in-context:SHOTS",
    )
    group.add_argument("--seeds", type=int, default=3, metavar="N", help="number of runs each")
    group.add_argument(
        "--rates", default="", metavar="M=LR,M=LR", help="in place of usual ones (default: none)"
    )
    add_out(parser, "for the table, the picture and a line for each run")
    parser.set_defaults(stands=_compare_stands)


def _biases(a: argparse.Namespace) -> None:
    from beft_ext.adapters import facts_table, term_facts
    from beft_ext.commands.loading import pretrained

    print(facts_table(term_facts(pretrained(a.model, "AutoModel"))))


def _select(a: argparse.Namespace) -> None:
    from beft_ext.commands import workflow

    source = source_of(a)
    selection = workflow.run_select(
        source, spec_of(a), workflow.Settings.of(a), a.terms, a.method, a.steps
    )
    print(selection)
    if leads():
        selection.save(a.out, source.record())
    print(f"\ntrain '{selection.best}'; written to {a.out}")


def _tune(a: argparse.Namespace) -> None:
    from beft_ext.commands import tuning, workflow

    settings = workflow.Settings.of(a)
    if a.budget is not None and a.terms != "auto":
        raise WorkflowError("--budget is what --terms auto may choose: give one of the two")
    options = {"resume": a.resume, "save_every": a.save_every, "parameters": a.budget}
    options |= {name: getattr(a, name) for name in ("bf16", "compile", "graphs", "deterministic")}
    tuning.run_tune(source_of(a), spec_of(a), settings, a.terms, a.out, **options)


def _tune_stands(a: argparse.Namespace) -> str:
    from beft_ext.commands import tuning

    return tuning.tune_stands(a.out)


def _evaluate(a: argparse.Namespace) -> None:
    from beft_ext.commands import workflow

    record = workflow.run_evaluate(source_of(a), spec_of(a), a.adapter, a.split)
    metrics = "  ".join(f"{name} {value:.4f}" for name, value in record["metrics"].items())
    print(f"{metrics}  ({record['examples']} examples)")
    if a.out and leads():
        save_json(a.out / "evaluation.json", record)


def _predict(a: argparse.Namespace) -> None:
    from beft_ext.commands import predict

    count = predict.run_predict(source_of(a), spec_of(a), a.adapter, a.file, a.out, a.batch_size)
    print(f"{count} answers are in {a.out}")


def _compare(a: argparse.Namespace) -> None:
    from beft_ext.commands import comparison, workflow

    planned = comparison.Comparison(
        source_of(a),
        spec_of(a),
        workflow.Settings.of(a),
        methods=a.methods.split(","),
        seeds=range(a.seed, a.seed + a.seeds),
        rates=comparison.rates_of(a.rates),
    )
    outcomes = planned.run(a.out)
    if leads():
        found = comparison.write(planned, outcomes, a.out)
        print(f"\n{found}\n\ntable and plot are in {a.out}")
    comparison.require_result(outcomes)


def _compare_stands(a: argparse.Namespace) -> str:
    from beft_ext.commands import comparison

    return comparison.stands(a.out)


def _merge(a: argparse.Namespace) -> None:
    from beft_ext.commands import workflow

    workflow.run_merge(a.model, a.adapter, a.out, placement_of(a))
    print(f"a plain model is in {a.out}")


def _tasks(a: argparse.Namespace) -> None:
    from beft_ext.commands import showing

    if a.task is None and a.task_config is None:
        print(showing.listed())
    else:
        print(showing.described(source_of(a), a.show))


def _doctor(_: argparse.Namespace) -> None:
    from beft_ext.commands.doctor import report

    print(report())


def _demo(a: argparse.Namespace) -> None:
    from beft_ext.commands.demo import run

    run(a.out)


if __name__ == "__main__":
    sys.exit(main())
