"""``beft-ext``: the verbs of the library on the command line. Exit code 2 for bad input."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


class UsageError(ValueError):
    """Arguments that do not go together, or a model that cannot be had."""


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        print("beft-ext: interrupted; nothing was written", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        if not _ours(error):
            raise
        print(f"beft-ext: {error}", file=sys.stderr)
        return 2
    return 0


def _ours(error: Exception) -> bool:
    return isinstance(error, OSError) or type(error).__module__.startswith("beft_ext")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="beft-ext", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    biases = verbs.add_parser("biases", help="list the bias terms of a model")
    biases.add_argument("model", metavar="MODEL", help="hub id or folder")
    biases.set_defaults(run=_biases)
    select = verbs.add_parser("select", help="find out which bias term to train")
    _add_select(select)
    select.set_defaults(run=_select)
    doctor = verbs.add_parser("doctor", help="which backends are usable here, and why not")
    doctor.set_defaults(run=_doctor)
    demo = verbs.add_parser("demo", help="select on the shipped data, then try the answer")
    demo.add_argument("--out", type=Path, default=Path("out/demo"), metavar="DIR")
    demo.set_defaults(run=_demo)
    return parser


def _add_select(parser: argparse.ArgumentParser) -> None:
    from beft_ext.scores import METHODS

    parser.add_argument("--model", required=True, metavar="MODEL", help="hub id or folder")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--task", metavar="NAME", help="sst2 or rte")
    parser.add_argument("--data", type=Path, metavar="DIR", help="holds NAME/train.jsonl")
    parser.add_argument("--train-file", type=Path, metavar="F", help="csv, tsv, jsonl, parquet")
    parser.add_argument("--validation-file", type=Path, metavar="F")
    parser.add_argument("--text-column", default="sentence")
    parser.add_argument("--text-pair-column")
    parser.add_argument("--label-column", default="label")
    parser.add_argument("--train-size", type=int, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", choices=METHODS, default="beft")
    parser.add_argument("--terms", metavar="T,T", help="candidates (default: all)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--warmup", type=float, default=0.06)
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--max-length", type=int, default=128)


def _load(model: str, auto: str, **options: Any) -> Any:
    """A transformers object, by the Auto class called ``auto``, with one-line errors."""
    import transformers

    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise UsageError(f"{model}: the folder has no config.json")
    try:
        return getattr(transformers, auto).from_pretrained(model, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"model '{model}' cannot be loaded: {reason}") from error


def _biases(arguments: argparse.Namespace) -> None:
    from beft_ext.models import find_biases

    print(find_biases(_load(arguments.model, "AutoModel")))


def _select(arguments: argparse.Namespace) -> None:
    import torch

    from beft_ext.selection import select
    from beft_ext.tasks import Batches
    from beft_ext.tasks.batches import check_labels
    from beft_ext.tasks.data import subset

    _writable(arguments.out)
    if arguments.batch_size < 1 or arguments.max_length < 1:
        raise UsageError("--batch-size and --max-length must be at least 1")
    train = subset(_examples(arguments), arguments.train_size, arguments.seed)
    torch.manual_seed(arguments.seed)  # the new head's weights
    classes = max(2, max(train.labels) + 1)
    model = _load(arguments.model, "AutoModelForSequenceClassification", num_labels=classes)
    tokenizer = _load(arguments.model, "AutoTokenizer")
    check_labels(train, model.config.num_labels)
    if torch.cuda.is_available():
        model.cuda()
    loader = Batches(train, tokenizer, arguments.batch_size, arguments.seed, arguments.max_length)
    selection = select(
        model,
        loader,
        arguments.method,
        terms=arguments.terms.split(",") if arguments.terms else None,
        epochs=arguments.epochs,
        steps=arguments.steps,
        lr=arguments.lr,
        warmup=arguments.warmup,
        clip=arguments.clip,
        seed=arguments.seed,
        progress=sys.stderr.isatty(),
    )
    print(selection)
    selection.save(arguments.out)
    print(f"\ntrain '{selection.best}'; written to {arguments.out}")


def _examples(arguments: argparse.Namespace) -> Any:
    from beft_ext.tasks.data import Columns, load_task, read_file

    if (arguments.task is None) == (arguments.train_file is None):
        raise UsageError("give either --task NAME or --train-file F")
    if arguments.task:
        return load_task(arguments.task, "train", arguments.data)
    columns = Columns(arguments.text_column, arguments.text_pair_column, arguments.label_column)
    if arguments.validation_file:
        read_file(arguments.validation_file, columns)  # selection needs it not, but check it now
    return read_file(arguments.train_file, columns)


def _writable(folder: Path) -> None:
    """Fail before the run, not after it, where ``folder`` cannot be written to."""
    from beft_ext.files import whole_file

    probe = folder / ".writable"
    with whole_file(probe):
        pass
    probe.unlink()


def _doctor(_: argparse.Namespace) -> None:
    from beft_ext.ops import backends

    for name, reason in backends().items():
        print(f"{name:<10} {'usable' if not reason else 'not usable: ' + reason}")


def _demo(arguments: argparse.Namespace) -> None:
    from beft_ext.demo import run

    _writable(arguments.out)
    run(arguments.out)


if __name__ == "__main__":
    sys.exit(main())
