"""Which rows are which example's: told from what changes, on outputs whose layout is known."""

import pytest
import torch

from beft_ext.layouts import Layout, Packed, TapError, fingerprint, locate, replaced

B, T, H = 3, 4, 5
OFFSETS = torch.tensor([0, 2, 3, 7])
# How (B, T, H) may be given out, and where the examples lie then.
ORDERS = {
    "examples first": (lambda y: y, Layout(0)),
    "tokens first": (lambda y: y.transpose(0, 1), Layout(1)),
    "flat": (lambda y: y.flatten(0, 1), Layout(0)),
    "flat, tokens first": (lambda y: y.transpose(0, 1).flatten(0, 1), Layout(0, outer=False)),
    "windows": (lambda y: y.unflatten(1, (2, 2)).flatten(0, 1), Layout(0)),
    "inner": (lambda y: y.transpose(0, 1).unflatten(0, (2, 2)), Layout(2)),
    "one row each": (lambda y: y[:, 0], Layout(0)),
}


def hidden():
    return torch.randn(B, T, H, generator=torch.Generator().manual_seed(0))


def changing(outputs):
    """``changes`` of a model that gives out ``outputs(hidden)``; texts see their own rows alone."""

    def changes(example):
        given = hidden()
        if example is not None:
            given[example] += 1
        return {key: fingerprint(y) for key, y in outputs(given).items()}

    return changes


def no_influence(example, known):
    raise AssertionError("every output was told by its changes")


@pytest.mark.parametrize("order", ORDERS)
def test_examples_are_found_and_read_in_any_order(order):
    given, layout = ORDERS[order]
    assert locate(changing(lambda y: {order: given(y)}), no_influence, B) == {order: layout}
    rows = layout.by_example(given(hidden()), B)
    for example in range(B):
        own = given(hidden() * (torch.arange(B) == example)[:, None, None])
        own = own.reshape(-1, H)[own.reshape(-1, H).any(1)]
        assert torch.equal(rows[example], own)
        assert torch.equal(layout.rows(given(hidden()), B, example), own)


def test_as_many_tokens_as_examples_are_told_apart():
    def outputs(y):
        square = y[:, :B]
        return {"first": square, "second": square.transpose(0, 1)}

    found = locate(changing(outputs), no_influence, B)
    assert found == {"first": Layout(0), "second": Layout(1)}


def test_an_output_that_does_not_hold_the_examples_is_refused():
    for layout, shape in (
        (Layout(0), (B + 1, T, H)),
        (Layout(1), (B, H)),
        (Layout(1, outer=False), (B, B + 1, H)),
    ):
        with pytest.raises(TapError, match=rf"does not hold 3 examples along axis {layout.axis}"):
            layout.by_example(torch.zeros(shape), B)
    assert Layout(0).by_example(torch.zeros(B, H), B).shape == (B, 1, H)


@pytest.mark.parametrize(
    ("size", "found"), [(0, Layout(0)), (1e-6, Layout(0)), (1e-2, None), (1, None)]
)
def test_what_others_change_by_rounding_does_not_count(size, found):
    def changes(example):
        y = torch.ones(B, T)
        if example is not None:
            y += size
            y[example] += 1
        return {"y": y}

    assert locate(changes, lambda *_: {}, B) == {"y": found}


def test_what_is_not_finite_is_no_change():
    def changes(example):
        y = torch.ones(B, T)
        y[:, 0], y[:, 1] = float("nan"), float("inf")
        if example is not None:
            y[example] += 1
        return {"y": y}

    assert locate(changes, no_influence, B) == {"y": Layout(0)}


@pytest.mark.parametrize("another", [{}, {"y": torch.ones(B, T + 1)}], ids=["gone", "longer"])
def test_an_output_that_comes_and_goes_cannot_be_told(another):
    def changes(example):
        return {"y": torch.ones(B, T)} if example is None else another

    assert locate(changes, no_influence, B) == {"y": None}


def test_an_output_that_nothing_changes_is_told_by_its_influence():
    asked, learnt = [], None

    def outputs(y):
        return {"tokens": y, "learnt": torch.ones(T, B, H), "idle": torch.ones(B, T, H)}

    def influence(example, known):
        nonlocal learnt
        asked.append(example)
        assert known == {"tokens": Layout(0), "learnt": learnt, "idle": None}
        effect = torch.zeros(T, B)
        effect[:, example] = 1
        learnt = Layout(1)  # known from now on
        return {"learnt": effect, "idle": torch.zeros(B, T)}

    found = locate(changing(outputs), influence, B)
    assert found == {"tokens": Layout(0), "learnt": Layout(1), "idle": None}
    assert asked[0] == B - 1 and len(asked) == len(set(asked))


def test_packed_texts_lie_one_after_another():
    def changes(example):
        y = torch.zeros(1, 7)
        if example is not None:
            y[0, OFFSETS[example] : OFFSETS[example + 1]] = 1
        return {"tokens": y, "flat": y[0], "all": y + y.sum(), "pooled": y[:, :3]}

    place = Packed((0, 2, 3, 7))
    found = locate(changes, no_influence, B, OFFSETS)
    assert found == {"tokens": place, "flat": place, "all": None, "pooled": None}
    rows = torch.arange(7 * H).view(1, 7, H)
    assert [place.rows(rows, B, i).tolist() for i in range(B)] == [
        rows[0, a:b].tolist() for a, b in ((0, 2), (2, 3), (3, 7))
    ]


def test_the_longest_packed_texts_are_tried_first():
    tried = []

    def changes(example):
        tried.append(example)
        return {"y": torch.ones(7)}

    locate(changes, lambda *_: {}, B, OFFSETS)
    assert tried == [None, 2, 0, 1]


def test_at_most_four_examples_are_replaced():
    tried = []

    def changes(example):
        tried.append(example)
        return {"y": torch.ones(9, 9)}

    locate(changes, lambda *_: {}, 9)
    assert tried == [None, 8, 7, 6, 5]


def test_a_fingerprint_tells_rows_apart_in_single_precision():
    y = hidden()
    prints = fingerprint(y)
    assert prints.shape == (B, T) and len(prints.unique()) == B * T
    assert torch.equal(fingerprint(y), prints) and fingerprint(y.double()).dtype == torch.float64
    assert fingerprint(y.bfloat16()).dtype == torch.float32


def test_an_example_is_replaced_by_the_next_with_its_tokens_reversed():
    given = {
        "input_ids": torch.arange(1, B * T + 1).view(B, T),
        "attention_mask": torch.arange(B * T).view(B, T),
        "position_ids": torch.arange(B * T).view(B, T),
        "inputs_embeds": hidden(),
        "labels": torch.arange(B),
        "table": torch.arange(8),
        "scalar": torch.tensor(1.0),
        "use_cache": False,
    }
    before = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    for example, other in ((0, 1), (1, 2), (2, 0)):
        found = replaced(given, example, B)
        want = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        for key in ("attention_mask", "position_ids", "inputs_embeds", "labels"):
            want[key][example] = given[key][other]
        want["input_ids"][example] = given["input_ids"][other].flip(0)
        assert found.keys() == given.keys()
        for key, value in want.items():
            same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
            assert same(found[key], value) and same(given[key], before[key]), key


def test_all_rows_of_an_example_are_replaced():
    """Options of a question: two rows for each example."""
    ids = torch.arange(1, 2 * B * T + 1).view(2 * B, T)
    found = replaced({"input_ids": ids, "labels": torch.arange(B)}, 1, B)
    want = ids.clone()
    want[2:4] = ids[4:6].flip(-1)
    assert torch.equal(found["input_ids"], want) and found["labels"].tolist() == [0, 2, 2]


def test_equal_texts_of_one_token_get_another_token_and_padding_stays():
    found = replaced({"input_ids": torch.tensor([[5, 5, 0], [0, 5, 5]])}, 0, 2)
    assert found["input_ids"].tolist() == [[4, 4, 0], [0, 5, 5]]


def test_a_packed_text_has_its_own_tokens_in_another_order():
    given = {
        "input_ids": torch.arange(1, 8)[None],
        "labels": torch.arange(7),
        "inputs_embeds": torch.randn(1, 7, H),
        "position_ids": torch.arange(7)[None],
        "attention_mask": torch.arange(7)[None],
        "cu_seq_lens_q": OFFSETS,
        "max_length_q": torch.tensor([4]),
        "seq_idx": torch.arange(7)[None],
        "use_cache": False,
    }
    found = replaced(given, 2, B, OFFSETS)
    order = [0, 1, 2, 6, 3, 4, 5]
    assert found["input_ids"].tolist() == given["input_ids"][:, order].tolist()
    assert found["labels"].tolist() == order
    assert torch.equal(found["inputs_embeds"], given["inputs_embeds"][:, order])
    for key in ("position_ids", "attention_mask", "cu_seq_lens_q", "max_length_q", "seq_idx"):
        assert found[key] is given[key]
    assert given["labels"].tolist() == list(range(7)) and found["use_cache"] is False


def test_a_batch_that_cannot_be_divided_is_refused():
    with pytest.raises(TapError, match="3 examples were announced, but the model got 4 rows"):
        replaced({"input_ids": torch.ones(4, 2)}, 0, 3)
    with pytest.raises(TapError, match="called without tensors"):
        replaced({"use_cache": False, "scalar": torch.tensor(1.0)}, 0, 3)
