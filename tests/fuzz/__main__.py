"""Random calls of the operators and of BiasAdamW: no signal, and every number right or refused.

Each round draws dtypes, shapes, strides, gradients and the default dtype from its own seed, in a
child process. Tensors lie between fences, so that a write beside them is seen, and a read beside
them spoils the numbers. A round is *right* where all numbers are those of torch in float64, and
*refused* where it ended in a BeftError or ValueError with nothing written. All else is a fault:
it is printed with the command that repeats it.

    python tests/fuzz [--rounds 10000] [--seed 0]
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from draw import Draw, Fault, Refused
from optimizer import optimizer_round
from stats import rows_round, stats_round
from steps import step_round

ROUND_SECONDS = 60  # a round that takes longer hangs
ROUNDS = [stats_round, rows_round, step_round, optimizer_round]
KERNELS = [0]  # how often a compiled kernel was called


def count_kernels() -> None:
    for name in ("bias_grad_stats", "bias_example_grads", "bias_adamw_step"):
        backends = sys.modules[f"beft_ext.ops.{name}"]._BACKENDS

        def counted(*arguments, run=backends["cpu"]):  # type: ignore[no-untyped-def]
            KERNELS[0] += 1
            return run(*arguments)

        backends["cpu"] = counted


def play(seed: int) -> str:
    """One round: 'right', 'refused' or 'fault <what>'."""
    draw = Draw(seed)
    try:
        draw.choice(ROUNDS)(draw)
        outcome = "right"
    except Refused:
        outcome = "refused"
    except Exception as error:  # Fault, or what neither we nor the package expected
        return f"fault {type(error).__name__}: {error}"
    finally:
        torch.set_default_dtype(torch.float32)
    try:
        draw.check_fences()
    except Fault as fault:
        return f"fault {fault}"
    return outcome


def child(first: int, rounds: int) -> None:
    """Plays rounds; a line each: its outcome, and how often it reached a kernel."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    count_kernels()
    for seed in range(first, first + rounds):
        faulthandler.dump_traceback_later(ROUND_SECONDS, exit=True)
        KERNELS[0] = 0
        outcome = " ".join(play(seed).split())
        print(seed, KERNELS[0], outcome, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--most-faults", type=int, default=20, help="stop behind so many")
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.seed, arguments.rounds)
        return 0
    started, seed, end = time.monotonic(), arguments.seed, arguments.seed + arguments.rounds
    outcomes: collections.Counter[str] = collections.Counter()
    while seed < end and outcomes["fault"] < arguments.most_faults:
        command = [
            sys.executable,
            Path(__file__).parent,
            "--child",
            "--seed",
            seed,
            "--rounds",
            end - seed,
        ]
        with subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                number, kernels, outcome, *what = line.rstrip("\n").split(" ", 3)
                seed = int(number) + 1
                outcomes[outcome] += 1
                outcomes["kernel"] += int(kernels) > 0
                if what:
                    report(int(number), what[0])
                if outcomes["fault"] >= arguments.most_faults:
                    process.kill()
        if seed < end and outcomes["fault"] < arguments.most_faults:
            died = process.returncode
            name = signal.Signals(-died).name if died < 0 else f"exit status {died} (or a hang)"
            report(seed, f"the process died: {name}")
            outcomes["fault"] += 1
            seed += 1
    print(
        f"fuzz: {sum(outcomes[o] for o in ('right', 'refused', 'fault'))} rounds from seed "
        f"{arguments.seed}: {outcomes['right']} right, {outcomes['refused']} refused, "
        f"{outcomes['fault']} faults; {outcomes['kernel']} reached a kernel; "
        f"{time.monotonic() - started:.0f} s"
    )
    return 1 if outcomes["fault"] else 0


def report(seed: int, what: str) -> None:
    print(f"round {seed}: {what}\n  again: python tests/fuzz --seed {seed} --rounds 1", flush=True)


if __name__ == "__main__":
    sys.exit(main())
