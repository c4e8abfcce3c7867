"""What do the statistics cost? The operator against eager torch, a tapped step against a plain one.

Every figure is a median of interleaved rounds, printed with its quartiles, and written to
benchmarks/results/<device>/statistics.json with versions and the digest of the kernel sources.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from beft_ext.files import whole_file
from beft_ext.models import find_biases
from beft_ext.ops import backends, bias_grad_stats
from beft_ext.tap import Tap

ROOT = Path(__file__).resolve().parent.parent
SHAPES = [(16, 128, 768), (32, 512, 768), (64, 512, 1024), (32, 512, 4096)]
BATCH, TOKENS = 16, 128
Case = Callable[[], object]


def digest() -> str:
    """SHA-256 over the kernel sources that a result belongs to."""
    sources = sorted([*ROOT.glob("csrc/**/*.*"), *ROOT.glob("beft_ext/ops/*.py")])
    total = hashlib.sha256()
    for path in sources:
        total.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return total.hexdigest()


def interleaved(cases: dict[str, Case], rounds: int, device: str) -> dict[str, dict[str, float]]:
    """Seconds of each case: median and quartiles over rounds that run every case in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for i in range(rounds + 2):
        names = list(cases) if i % 2 else list(cases)[::-1]
        for name in names:
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            cases[name]()
            if device == "cuda":
                torch.cuda.synchronize()
            if i >= 2:  # two rounds of warm-up
                seconds[name].append(time.perf_counter() - start)
    return {n: _summary(s) for n, s in seconds.items()}


def _summary(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median_s": middle, "q1_s": low, "q3_s": high}


def eager(dy: torch.Tensor, total: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """The same statistics as plain torch writes them."""
    grads = dy.sum(1, dtype=torch.float32)
    grad = grads.sum(0)
    total += grad
    squares += grads.square().sum(0)
    return grad


def operator(device: str, rounds: int) -> dict[str, object]:
    results: dict[str, object] = {}
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            # Several inputs in turn, so that no cache holds the one that is read.
            inputs = [torch.randn(shape, device=device).to(dtype) for _ in range(3)]
            buffers = [torch.zeros(shape[-1], device=device) for _ in range(2)]
            turn = {"ours": 0, "eager": 0, "sum": 0}

            def pick(name: str, turn=turn, inputs=inputs) -> torch.Tensor:
                turn[name] += 1
                return inputs[turn[name] % 3]

            cases: dict[str, Case] = {
                "ours": lambda p=pick, b=buffers: bias_grad_stats(p("ours"), *b),
                "eager": lambda p=pick, b=buffers: eager(p("eager"), *b),
                "sum": lambda p=pick: p("sum").sum((0, 1)),
            }
            found = interleaved(cases, rounds, device)
            key = f"{'x'.join(map(str, shape))} {str(dtype)[6:]}"
            results[key] = found
            ours = found["ours"]["median_s"]
            gigabytes = inputs[0].numel() * inputs[0].element_size() / 1e9
            print(
                f"operator {key:<24} ours {ours * 1e6:9.1f} us ({gigabytes / ours:6.1f} GB/s)"
                f"  eager x{found['eager']['median_s'] / ours:5.2f}"
                f"  sum alone x{found['sum']['median_s'] / ours:5.2f}"
            )
    return results


def models() -> dict[str, transformers.PreTrainedModel]:
    small = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    make = transformers.AutoModelForSequenceClassification.from_config
    return {"MiniLM": make(small), "BERT-base": make(transformers.BertConfig())}


def steps(device: str, rounds: int) -> dict[str, object]:
    """One training step, all bias terms: plain autograd, tapped, and a batch-of-one loop."""
    results: dict[str, object] = {}
    for name, model in models().items():
        model.to(device).train()
        biases = find_biases(model)
        inputs = {
            "input_ids": torch.randint(5, 30000, (BATCH, TOKENS), device=device),
            "labels": torch.randint(0, 2, (BATCH,), device=device),
        }
        model.requires_grad_(False)
        own = [model.get_parameter(n) for n in dict.fromkeys(b.parameter for b in biases)]

        def plain(model=model, own=own, inputs=inputs) -> None:
            for p in own:
                p.requires_grad_(True)
            torch.autograd.grad(model(**inputs).loss, own)
            for p in own:
                p.requires_grad_(False)

        def tapped(model=model, biases=biases, inputs=inputs) -> None:
            with Tap(model, biases) as tap:
                tap.step(BATCH, scale=float(BATCH))
                model(**inputs).loss.backward()

        def loop(model=model, own=own, inputs=inputs) -> None:
            for p in own:
                p.requires_grad_(True)
            for i in range(BATCH):
                one = {k: v[i : i + 1] for k, v in inputs.items()}
                for g in torch.autograd.grad(model(**one).loss, own):
                    g.square()
            for p in own:
                p.requires_grad_(False)

        cases: dict[str, Case] = {"plain": plain, "tapped": tapped, "batch of one": loop}
        found = interleaved(cases, rounds, device)
        results[name] = found
        base = found["plain"]["median_s"]
        for case, s in found.items():
            print(
                f"step {name:<10}{case:<14}{s['median_s'] * 1e3:9.1f} ms"
                f"  [{s['q1_s'] * 1e3:.1f}, {s['q3_s'] * 1e3:.1f}]  x{s['median_s'] / base:.3f}"
            )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=15, help="of whole steps; operators x 3")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    cuda = arguments.device == "cuda"
    record = {
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "backends": backends(),
        "kernel_digest": digest(),
        "operator": operator(arguments.device, 3 * arguments.rounds),
        "step": steps(arguments.device, arguments.rounds),
    }
    folder = ROOT / "benchmarks" / "results" / arguments.device
    with whole_file(folder / "statistics.json") as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
