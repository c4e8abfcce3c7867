"""What the AdamW kernels are told of tensors: the same with the native module and without it."""

from array import array

import pytest
import torch

from beft_ext.ops import dispatch
from beft_ext.ops.bias_adamw_tables import locate, packed_addresses, reach, survey, workspace_size


@pytest.fixture(params=["native", "no native module"], autouse=True)
def native(request, monkeypatch):
    if request.param == "native":
        dispatch.native or pytest.skip("the native module is not built")
    else:
        monkeypatch.setattr(dispatch, "native", None)


def words(packed):
    return array("q", packed).tolist()


GRADIENTS = {
    "plain": (lambda g: g, True),
    "none": (lambda g: None, True),
    "fp64": (lambda g: g.double(), False),
    "strided": (lambda g: g.repeat_interleave(2, 1)[:, ::2], False),
    "negative": (torch._neg_view, False),
    "sparse": (lambda g: g.to_sparse(), False),
    "of a class": (torch.nn.Parameter, False),
}


@pytest.mark.parametrize("kind", GRADIENTS)
def test_gradients_are_addressed_where_they_are_plain_memory(kind):
    make, plain = GRADIENTS[kind]
    p, q = (torch.ones(2, 3).requires_grad_() for _ in range(2))
    p.grad = torch.ones(2, 3)
    if (grad := make(torch.ones(2, 3))) is not None and grad.dtype != q.dtype:
        q.grad_dtype = None
    q.grad = grad
    grads, addresses, _, of_grads = survey([p, q])
    assert grads[0] is p.grad and grads[1] is q.grad
    assert words(addresses) == [p.data_ptr(), q.data_ptr()]
    expected = [p.grad.data_ptr(), 0 if grad is None else grad.data_ptr()] if plain else None
    assert (of_grads and words(of_grads)) == expected


def test_forms_differ_where_the_tables_would_not_fit():
    base = torch.ones(4, 6)
    same, *others = (
        base.clone(),
        base.half(),
        base.to("meta"),
        base.view(6, 4),
        base.t().contiguous().t(),
        torch._neg_view(base.clone()),
    )
    seen = survey([base])[2]
    assert survey([same])[2] == seen
    for other in others:
        assert survey([other])[2] != seen, other


def test_a_tensor_reaches_from_its_first_to_its_last_element():
    base = torch.zeros(6, 10)
    for tensor, size in (
        (base, 60),
        (base[1:3], 20),
        (base[:, 2:5], 53),
        (base.t(), 60),
        (base[::2, ::3], 50),
        (base[0, 0], 1),
        (base[:0], 0),
        (base[:1].expand(4, 10), 10),
    ):
        assert reach(tensor) == size


def test_parameters_are_located_with_dtype_group_reach_and_size():
    tensors = [torch.zeros(6, 10)[:, 2:5], torch.zeros(4).bfloat16(), torch.zeros(3).half()]
    tensors.append(torch.zeros(2, dtype=torch.float64))
    found = locate(tensors, [1, 0, 2, 0])
    assert list(map(id, found)) == list(map(id, tensors))
    assert words(found.addresses) == [t.data_ptr() for t in tensors]
    assert words(packed_addresses(found)) == words(found.addresses)
    assert words(packed_addresses([None, tensors[1]])) == [0, tensors[1].data_ptr()]
    forms = [[0, 1, 53, 18], [1, 0, 4, 4], [2, 2, 3, 3], [-1, 0, 2, 2]]
    assert words(found.forms) == [word for form in forms for word in form]


def test_the_scratch_has_four_sums_a_block_and_the_counters():
    assert workspace_size(5, 3) == 4 * 5 + 3 + 1
