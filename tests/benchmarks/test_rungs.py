"""Each rung of docs/kernels.md computes what the operator computes, and the page shows the figures
that were measured."""

import shutil
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
UNIT = torch.finfo(torch.float32).eps / 2  # the largest relative error of one rounding
FLOATS, DOUBLES = ("columns", "rows", "one_pass"), ("doubles", "vectors")
CHUNKED = 3 + 128 // 8 + 7  # additions in fp32 that a number goes through: tree, chunk, last rows

pytestmark = pytest.mark.usefixtures("benchmarks_on_the_path")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")


def random(shape, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def assert_sums(found, dy, roundings, roundings_of_examples):
    """Within what so many roundings of an example's sum, and after it, could do at most."""
    x = dy.double()
    g = x.sum(1)
    off = roundings * UNIT * x.abs().sum(1)
    grad_bound = off.sum(0) + roundings_of_examples * UNIT * g.abs().sum(0)
    squares_bound = (2 * g.abs() * off + off**2).sum(0)
    squares_bound += roundings_of_examples * UNIT * g.square().sum(0)
    grad, squares = found
    assert bool(((grad - g.sum(0)).abs() <= 1.01 * grad_bound).all())
    assert bool(((squares - g.square().sum(0)).abs() <= 1.01 * squares_bound).all())


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 300, 131), (2, 21, 700), (2, 5, 7), (0, 4, 8), (2, 0, 8)])
def test_every_rung_gives_the_sums_of_float64(shape, dtype):
    from rungs import sums

    dy = random(shape, dtype)
    for name in sums.RUNGS:
        found = sums.rung(name)(dy)
        if name in FLOATS:
            assert_sums(found, dy, dy.shape[1], dy.shape[0] + 8)
        else:
            assert_sums(found, dy, 0 if name in DOUBLES else CHUNKED, 8)


@needs_compiler
def test_the_rungs_are_built_like_the_module():
    from rungs import sums

    flags = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert [f for f in sums.FLAGS if f'"{f}"' not in flags] == ["-fPIC", "-shared"]


@needs_compiler
def test_threads_change_nothing(monkeypatch):
    from rungs import sums

    dy, found = random((5, 40, 96), torch.bfloat16), []
    for count in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        found.append(torch.stack(sums.rung("threads")(dy)))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_without_a_compiler_the_rungs_say_what_to_do(monkeypatch):
    from rungs import sums

    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"g\+\+ is not on PATH: install it"):
        sums.library.__wrapped__()


def test_todays_kernel_stands_at_the_end_of_the_climb():
    import bench_rungs

    dy = random((3, 300, 131), torch.float32)
    names = list(bench_rungs.works("cpu"))
    for name in ("kernel", "ours"):
        assert_sums(bench_rungs.works("cpu")[name][1]()(dy), dy, CHUNKED, 8)
        assert names.index(name) > names.index("threads")


def test_every_step_is_that_of_float64():
    from rungs import steps

    initial, grads = (
        [random((n,), torch.float32) * factor for n in (5, 33, 8)] for factor in (1.0, 0.1)
    )
    exact = [p.double().requires_grad_() for p in initial]
    optimizer = torch.optim.AdamW(exact, lr=1e-2, weight_decay=0.0)
    made = {}
    for name, make in steps.RUNGS.items():
        params = [p.clone().requires_grad_() for p in initial]
        made[name] = params, make(params, 1e-2)
    for t in range(3):
        for p, g in zip(exact, grads, strict=True):
            p.grad = (1 + t) * g.double()
        optimizer.step()
        want = torch.stack([sums_of(p, b) for p, b in zip(exact, initial, strict=True)])
        for params, step in made.values():
            for p, g in zip(params, grads, strict=True):
                p.grad = (1 + t) * g
            torch.testing.assert_close(step().double(), want, rtol=1e-4, atol=1e-5)
            for p, q in zip(params, exact, strict=True):
                torch.testing.assert_close(p.double(), q, rtol=1e-6, atol=1e-6)


def sums_of(p, initial):
    b, b0 = p.detach(), initial.double()
    between = b0 @ b
    return torch.stack([(b - b0).norm(1), between - b0 @ b0, b @ b - between, p.grad.norm() ** 2])


def test_the_page_shows_what_was_measured():
    import render
    from rungs import steps, sums

    text = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert text == render.kernels(text), "run benchmarks/render.py"
    marks = [f"<!-- sums {name} -->" for name in (*sums.RUNGS, "kernel", "ours")]
    marks += [f"<!-- steps {name} -->" for name in (*steps.RUNGS, "ours")]
    places = [text.index(mark) for mark in marks]
    assert places == sorted(places)


def test_figures_stand_between_their_marks():
    from rungs import page

    case = {"median_s": 2e-3, "q1_s": 2e-3, "q3_s": 2e-3, "bytes_per_s": 1.25e10}
    common = {"device": "a processor", "threads": 2, "torch": "2.13", "kernel_digest": "old"}
    cases = {"one_pass": {**case, "error": 2e-7}, "rows": {"missing": "no g++"}, "read": case}
    record = {**common, "sums": {"float32": cases, "float16": cases}, "steps": {"BERT": cases}}
    text = "a <!-- sums one_pass -->0<!-- / --> b <!-- sums rows --><!-- / -->"
    filled = page.filled(text, {"cpu": record})
    assert filled == text.replace(">0<", ">12.5, 12.5<").replace(
        " rows --><", " rows -->missing, missing<"
    )
    table = page.filled("<!-- cpu sums -->old<!-- / -->", {"cpu": record}).splitlines()
    assert "| GB/s | float32 | float16 | error |" in table and "old" not in table[0]
    assert "| one pass | 12.5 | 12.5 | 2.0e-07 |" in table
    assert "| rows | missing | missing |  |" in table
    assert "| read | 12.5 in 2 ms |  |" in page.filled(
        "<!-- cpu steps --><!-- / -->", {"cpu": record}
    )
    nothing = page.filled("<!-- cuda steps --><!-- / -->", {"cpu": record})
    assert nothing == "<!-- cuda steps -->Not yet measured.<!-- / -->"
    with pytest.raises(KeyError, match="sums gone"):
        page.filled("<!-- sums gone --><!-- / -->", {"cpu": record})
