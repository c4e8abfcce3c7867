"""``beft-ext``: the verbs of the library on the command line. Exit code 2 for bad input."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from pathlib import Path
from typing import TextIO

from beft_ext import scores
from beft_ext.commands import methods, processes
from beft_ext.commands.loading import OBJECTIVES, ModelSpec, Source, WorkflowError
from beft_ext.errors import BeftError, BeftWarning
from beft_ext.files import require_writable, save_json
from beft_ext.parallel import leads
from beft_ext.selection.gain_result import GAIN
from beft_ext.tasks import TASKS

TERMS_HELP = "value@6-11+query is the value in layers 6 to 11, from 0, and every query"


def main(argv: list[str] | None = None) -> int:
    with processes.one_voice():
        a = _parser().parse_args(argv)
    try:
        _quiet()
        with warnings.catch_warnings(), processes.together(a):
            warnings.showwarning = _note
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


def _note(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Our own warnings are notes to the user; others look as ever."""
    ours = issubclass(category, BeftWarning)
    text = (
        f"note: {message}\n"
        if ours
        else warnings.formatwarning(message, category, filename, lineno, line)
    )
    (file or sys.stderr).write(text)


def _quiet() -> None:
    """Our tables alone on the screen: no loading bars, no report of a head that is new, nothing of
    what other packages cannot load on this machine."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as reports

    reports.set_verbosity_error()
    reports.disable_progress_bar()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="beft-ext", description=__doc__)
    parser.set_defaults(stands=lambda _: "nothing was written: results come whole, at the end")
    parser.set_defaults(joint=False)  # whether several processes may run it together
    verbs = parser.add_subparsers(required=True, metavar="VERB", dest="verb")
    biases = verbs.add_parser("biases", help="list the bias terms that a model has or can get")
    biases.add_argument("model", metavar="MODEL", help="hub id or folder")
    biases.set_defaults(run=_biases)
    select = verbs.add_parser("select", help="find out which bias term to train")
    _add_data(select)
    _add_run(select, epochs=1, warmup=0.0)
    select.add_argument(
        "--terms",
        type=_set_of_terms,
        metavar="T+T",
        help=f"candidates (default: all): {TERMS_HELP}",
    )
    select.add_argument(
        "--method",
        "--score",
        choices=(GAIN, *scores.SCORES),
        default=GAIN,
        help=f"what the ranking goes by (default: {GAIN})",
    )
    select.add_argument(
        "--steps", type=int, help="length of the run, in place of --epochs; 0 for the gains alone"
    )
    select.set_defaults(run=_select, joint=True)
    tune = verbs.add_parser("tune", help="train the chosen bias term and save the adapter")
    _add_data(tune)
    _add_run(tune, epochs=10, warmup=0.06, race=True)
    tune.add_argument(
        "--terms",
        type=_set_of_terms,
        default="auto",
        metavar="auto|all|T+T",
        help=f"what trains: {TERMS_HELP}",
    )
    tune.add_argument(
        "--budget", type=int, metavar="N", help="parameters that auto may choose, at most"
    )
    tune.add_argument("--resume", action="store_true", help="go on after a kill")
    tune.add_argument("--save-every", type=int, default=50, metavar="STEPS")
    tune.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    tune.add_argument("--compile", action="store_true", help="torch.compile of the model")
    tune.add_argument("--graphs", action="store_true", help="whole steps as CUDA graphs")
    tune.add_argument(
        "--deterministic", action="store_true", help="the same bits on a GPU too, which costs time"
    )
    tune.set_defaults(run=_tune, stands=_tune_stands, joint=True)
    evaluate = verbs.add_parser("evaluate", help="measure a model, with an adapter or without")
    _add_data(evaluate)
    evaluate.add_argument("--adapter", type=Path, metavar="DIR")
    evaluate.add_argument("--split", default="validation", help="of a named task")
    evaluate.add_argument("--out", type=Path, metavar="DIR", help="for evaluation.json")
    evaluate.set_defaults(run=_evaluate, joint=True)
    compare = verbs.add_parser("compare", help="methods side by side on one task")
    _add_data(compare)
    _add_run(compare, epochs=10, warmup=0.06, race=True)
    compare.add_argument(
        "--methods",
        default="head,auto,value,all-biases,random-mask,lora,full",
        metavar="M,M",
        help=f"{', '.join(methods.METHODS)}, or bias terms such as query+value@6-11, or "
        "lora:TERM, low-rank:TERM, random-mask:COUNT, in-context:SHOTS",
    )
    compare.add_argument("--seeds", type=int, default=3, metavar="N", help="number of runs each")
    compare.add_argument("--rates", default="", metavar="M=LR,M=LR", help="in place of usual ones")
    compare.set_defaults(run=_compare, stands=_compare_stands, joint=True)
    merge = verbs.add_parser("merge", help="a plain model folder with the adapter inside")
    merge.add_argument("--model", required=True, metavar="MODEL", help="hub id or folder")
    merge.add_argument("--adapter", required=True, type=Path, metavar="DIR")
    merge.add_argument("--out", required=True, type=Path, metavar="DIR")
    merge.set_defaults(run=_merge)
    doctor = verbs.add_parser("doctor", help="which backends are usable here, and why not")
    doctor.set_defaults(run=_doctor)
    demo = verbs.add_parser("demo", help="select on the shipped data, then try the answer")
    demo.add_argument("--out", type=Path, default=Path("out/demo"), metavar="DIR")
    demo.set_defaults(run=_demo)
    return parser


def _set_of_terms(text: str) -> str:
    """A comma joins terms as + does."""
    return text.replace(",", "+")


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="MODEL", help="hub id or folder")
    parser.add_argument("--task", metavar="NAME", help=", ".join(TASKS))
    parser.add_argument("--data", type=Path, metavar="DIR", help="holds NAME/train.jsonl")
    parser.add_argument(
        "--train-file", type=Path, metavar="F", help="csv, tsv, json, jsonl, parquet; .gz too"
    )
    parser.add_argument("--validation-file", type=Path, metavar="F")
    parser.add_argument("--text-column", default="sentence")
    parser.add_argument("--text-pair-column")
    parser.add_argument("--label-column", default="label")
    parser.add_argument("--task-config", type=Path, metavar="F", help="JSON: what the files mean")
    parser.add_argument(
        "--objective", choices=OBJECTIVES, default="auto", help="how the task is put"
    )
    parser.add_argument(
        "--new-head", action="store_true", help="put a new head in place of the model's own"
    )
    parser.add_argument(
        "--max-length", type=int, metavar="TOKENS", help="(head: 128, prompt: 2048)"
    )
    parser.add_argument("--seed", type=int, default=0)


def _add_run(
    parser: argparse.ArgumentParser, epochs: int, warmup: float, race: bool = False
) -> None:
    """race: whether the rate may be found by an audition."""
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--train-size", type=int, metavar="N")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=epochs)
    if race:
        parser.add_argument(
            "--lr",
            type=_rate,
            default=1e-3,
            metavar="auto|LR",
            help="auto: raced on held-out training rows",
        )
        parser.add_argument(
            "--audition-budget",
            type=float,
            default=3.0,
            metavar="EPOCHS",
            help="what --lr auto may cost, in epochs' time (default: 3)",
        )
    else:
        parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=float, default=warmup)
    parser.add_argument("--clip", type=float, default=1.0, dest="max_grad_norm", metavar="NORM")
    parser.add_argument(
        "--group-by-length",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="batches of rows of like length, in random order",
    )


def _rate(text: str) -> float | None:
    """None for 'auto'."""
    return None if text == "auto" else float(text)


def _source(arguments: argparse.Namespace) -> Source:
    a = arguments
    columns = (a.text_column, a.text_pair_column, a.label_column)
    return Source(a.task, a.data, a.train_file, a.validation_file, a.task_config, *columns)


def _spec(arguments: argparse.Namespace) -> ModelSpec:
    a = arguments
    if a.max_length is not None and a.max_length < 1:
        raise WorkflowError("--max-length must be at least 1")
    if not 0 <= a.seed < 2**32:
        raise WorkflowError(f"--seed must be 0 to {2**32 - 1}, but is {a.seed}")
    return ModelSpec(a.model, a.objective, a.max_length, a.seed, a.new_head)


def _biases(arguments: argparse.Namespace) -> None:
    from beft_ext.adapters import facts_table, term_facts
    from beft_ext.commands.loading import pretrained

    print(facts_table(term_facts(pretrained(arguments.model, "AutoModel"))))


def _select(arguments: argparse.Namespace) -> None:
    from beft_ext.commands import workflow

    a = arguments
    if leads():
        require_writable(a.out)
    selection = workflow.run_select(
        _source(a), _spec(a), workflow.Settings.of(a), a.terms, a.method, a.steps
    )
    print(selection)
    if leads():
        selection.save(a.out)
    print(f"\ntrain '{selection.best}'; written to {a.out}")


def _tune(arguments: argparse.Namespace) -> None:
    from beft_ext.commands import workflow

    a = arguments
    if leads():
        require_writable(a.out)
    settings = workflow.Settings.of(a)
    if a.budget is not None and a.terms != "auto":
        raise WorkflowError("--budget is what --terms auto may choose: give one of the two")
    options = {"resume": a.resume, "save_every": a.save_every, "parameters": a.budget}
    options |= {name: getattr(a, name) for name in ("bf16", "compile", "graphs", "deterministic")}
    workflow.run_tune(_source(a), _spec(a), settings, a.terms, a.out, **options)


def _tune_stands(arguments: argparse.Namespace) -> str:
    from beft_ext.commands import workflow

    return workflow.tune_stands(arguments.out)


def _evaluate(arguments: argparse.Namespace) -> None:
    from beft_ext.commands import workflow

    a = arguments
    if a.out and leads():
        require_writable(a.out)
    record = workflow.run_evaluate(_source(a), _spec(a), a.adapter, a.split)
    metrics = "  ".join(f"{name} {value:.4f}" for name, value in record["metrics"].items())
    print(f"{metrics}  ({record['examples']} examples)")
    if a.out and leads():
        save_json(a.out / "evaluation.json", record)


def _compare(arguments: argparse.Namespace) -> None:
    from beft_ext.commands import comparison, workflow

    a = arguments
    if leads():
        require_writable(a.out)
    planned = comparison.Comparison(
        _source(a),
        _spec(a),
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


def _compare_stands(arguments: argparse.Namespace) -> str:
    from beft_ext.commands import comparison

    return comparison.stands(arguments.out)


def _merge(arguments: argparse.Namespace) -> None:
    from beft_ext.commands import workflow

    require_writable(arguments.out)
    workflow.run_merge(arguments.model, arguments.adapter, arguments.out)
    print(f"a plain model is in {arguments.out}")


def _doctor(_: argparse.Namespace) -> None:
    from beft_ext.commands.doctor import report

    print(report())


def _demo(arguments: argparse.Namespace) -> None:
    from beft_ext.commands.demo import run

    require_writable(arguments.out)
    run(arguments.out)


if __name__ == "__main__":
    sys.exit(main())
