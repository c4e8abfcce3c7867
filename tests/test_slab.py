"""Rows of single examples' gradients: kept whole, or folded."""

from __future__ import annotations

import pytest
import torch
from conftest import batch, tiny

from beft_ext import Tap, find_biases
from beft_ext.models import Bias
from beft_ext.slab import SiteSlab


def rows_by_autograd(model, given, bias):
    """``(B, H)``: one backward an example."""
    parameter = model.get_parameter(bias.parameter)
    rows = []
    for i in range(len(given["labels"])):
        own = {k: v[i : i + 1] for k, v in given.items()}
        rows.append(bias.read(torch.autograd.grad(model(**own).loss, parameter)[0]))
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["bert", "gpt2", "albert", "gpt-neox"])
def test_a_tap_keeps_the_gradient_of_each_example(name):
    """Slices of one parameter and parameters that are used several times too."""
    model, given = tiny(name).double(), batch()
    biases = find_biases(model)
    literal = {b: rows_by_autograd(model, given, b) for b in biases}
    with Tap(model, biases) as tap:
        tap.keep_rows(6)
        tap.step(batch=4, scale=4.0, row=1)
        model(**given).loss.backward()
        for bias in biases:
            rows = tap.rows(bias, 6)
            torch.testing.assert_close(rows[1:5], literal[bias], rtol=1e-9, atol=1e-12)
            assert not rows[0].any() and not rows[5].any()
        assert not any(total.any() for total, _ in tap.statistics().values())


def slab(columns, width=1000, examples=3, seed=0):
    bias = Bias("mlp_up", 0, "m", "m.bias", 0, width)
    return bias, SiteSlab([bias], torch.zeros(width), examples, columns, seed)


@pytest.mark.parametrize("columns", [None, 8])
def test_more_examples_than_were_asked_for_find_room(columns):
    """A rank does not know how many of all examples will be its own."""
    model, given = tiny("bert").double(), batch()
    biases = find_biases(model)
    kept = {}
    for room in (1, 12):
        with Tap(model, biases) as tap:
            tap.keep_rows(room, columns)
            for row in (0, 4, 8):
                tap.step(batch=4, scale=4.0, row=row)
                model(**given).loss.backward()
            kept[room] = [tap.rows(bias, 12).clone() for bias in biases]
    for grown, ample in zip(kept[1], kept[12], strict=True):
        assert torch.equal(grown, ample) and grown[8:].any()


def test_a_bias_that_fits_is_kept_as_it_is():
    bias, kept = slab(columns=1000)
    grads = torch.randn(2, 1000)
    kept.put(1, grads)
    assert torch.equal(kept.rows(bias, 3)[1:], grads)


@pytest.mark.parametrize("width", [1000, 1001])
@pytest.mark.parametrize(("bits", "off"), [(4, 0.1), (8, 4e-3), (16, 2e-5)])
def test_whole_numbers_keep_each_row_to_a_part_of_its_largest_element(bits, off, width):
    bias = Bias("mlp_up", 0, "m", "m.bias", 0, width)
    kept = SiteSlab([bias], torch.zeros(width), 4, None, 0, bits)
    grads = torch.randn(4, width) * torch.tensor([[1e-6], [1.0], [1e6], [0.0]])
    kept.put(0, grads)
    rows, sizes = kept.rows(bias, 4), grads.norm(dim=1)
    if bits > 4:  # of 4 bits other directions are kept
        step = grads.abs().amax(1) / (2 ** (bits - 1) - 1)
        assert ((rows - grads).abs().amax(1) <= step * 1.01).all()
    assert ((rows @ rows.T - grads @ grads.T).abs() <= off * torch.outer(sizes, sizes)).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_tells_nothing_of_the_row(bits):
    """Rows that are equal, as those of one class may be, have errors of their own."""
    bias = Bias("mlp_up", 0, "m", "m.bias", 0, 1000)
    kept = SiteSlab([bias], torch.zeros(1000), 400, None, 0, bits)
    row = torch.randn(1000)
    kept.put(0, row.expand(400, -1))
    products = kept.rows(bias, 400) @ kept.rows(bias, 400).T / row.square().sum()
    apart = products[~torch.eye(400, dtype=torch.bool)]
    assert apart.mean() == pytest.approx(1, abs=5e-3)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("bits", [4, 8])
def test_whole_numbers_do_not_hide_what_is_not_finite(wrong, bits):
    bias = Bias("mlp_up", 0, "m", "m.bias", 0, 4)
    kept = SiteSlab([bias], torch.zeros(4), 2, None, 0, bits)
    kept.put(0, torch.tensor([[1.0, wrong, 0.0, 2.0], [1.0, 2.0, 3.0, 4.0]]))
    finite = kept.rows(bias, 2).square().sum(1).isfinite()
    assert finite.tolist() == [False, True]


def test_folding_keeps_every_number_once():
    bias, kept = slab(columns=7, width=10)
    kept.put(0, torch.eye(10)[:3])
    assert kept.rows(bias, 3).abs().sum(1).tolist() == [1, 1, 1]


def test_folded_products_are_right_on_average():
    """Over seeds the mean product of two rows is theirs; its spread is that of a count sketch."""
    generator = torch.Generator().manual_seed(0)
    grads = torch.randn(2, 1000, generator=generator)
    true, products = float(grads[0] @ grads[1]), []
    for seed in range(200):
        bias, kept = slab(columns=50, examples=2, seed=seed)
        kept.put(0, grads)
        a, b = kept.rows(bias, 2)
        products.append(float(a @ b))
    found = torch.tensor(products)
    sizes = grads.square().sum(1)
    spread = float((sizes[0] * sizes[1] + true**2) / 50) ** 0.5
    assert abs(float(found.mean()) - true) < 4 * spread / 200**0.5
    assert float(found.std()) < 1.2 * spread


def test_the_same_seed_folds_the_same_way():
    grads = torch.randn(1, 1000)
    (bias, first), (_, again), (_, other) = (slab(columns=9, seed=s) for s in (1, 1, 2))
    for kept in (first, again, other):
        kept.put(0, grads)
    assert torch.equal(first.rows(bias, 1), again.rows(bias, 1))
    assert not torch.equal(first.rows(bias, 1), other.rows(bias, 1))


def test_groups_of_a_fused_parameter_are_told_apart():
    query = Bias("query", 0, "m", "m.bias", 0, 2, groups=2)
    key = Bias("key", 0, "m", "m.bias", 2, 4, groups=2)
    kept = SiteSlab([query, key], torch.zeros(8), 1, None, 0)
    kept.put(0, torch.arange(8.0)[None])
    assert kept.rows(query, 1).tolist() == [[0, 1, 4, 5]]
    assert kept.rows(key, 1).tolist() == [[2, 3, 6, 7]]
