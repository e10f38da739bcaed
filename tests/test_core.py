import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rankgate.core import GatedGroup, GroupedLinear, Subspace

N, M, K = 12, 7, 5


def gated(eps: float, k: int = K) -> tuple[GroupedLinear, nn.Linear]:
    torch.manual_seed(0)
    dense = nn.Linear(N, M)
    V, _ = torch.linalg.qr(torch.randn(N, N))
    V = V[:, :k]
    group = GatedGroup(Subspace(V.T.contiguous(), eps), dense.weight.detach() @ V, dense.weight)
    return GroupedLinear(group, 0, M, dense.bias), dense


def test_gate_opens_exactly_where_the_residual_exceeds_eps():
    layer, dense = gated(eps=0.5)
    V = layer.group.subspace.B.T
    inside, outside = V @ torch.randn(K), torch.randn(N)
    outside -= V @ (V.T @ outside)
    x = torch.stack([inside + s * outside / outside.norm() * inside.norm() for s in (0.1, 0.4, 0.7, 3.0)])
    z, ratio, fire = layer.group.subspace(x)
    assert fire.tolist() == [False, False, True, True]
    torch.testing.assert_close(ratio, (x - z @ V.T).norm(dim=1) / x.norm(dim=1))
    y = layer(x)
    assert torch.equal(y[fire], F.linear(x[fire], dense.weight) + dense.bias)
    torch.testing.assert_close(y[~fire], F.linear(x[~fire] @ V @ V.T, dense.weight, dense.bias))
    assert (y[~fire] - dense(x[~fire])).abs().max() > 1e-3


def test_zero_tolerance_is_dense():
    layer, dense = gated(eps=0.0)
    x = torch.randn(3, 4, N)
    torch.testing.assert_close(layer(x), dense(x))


def test_a_zero_input_keeps_the_gate_closed_and_gives_the_bias():
    layer, dense = gated(eps=0.0)
    _, ratio, fire = layer.group.subspace(torch.zeros(2, N))
    assert not fire.any() and ratio.tolist() == [0, 0]
    torch.testing.assert_close(layer(torch.zeros(2, N)), dense.bias.expand(2, M))


def test_tolerance_of_one_or_more_never_fires():
    layer, _ = gated(eps=1.0)
    assert not layer.group.subspace(torch.randn(100, N)).fire.any()


def test_members_are_rows_of_their_group_which_is_asked_once_per_tensor():
    layer, dense = gated(eps=0.3)
    first, second = GroupedLinear(layer.group, 0, 3, dense.bias[:3]), GroupedLinear(layer.group, 3, M, None)
    calls = []
    layer.group.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(4, N)
    whole = layer.group(x)
    calls.clear()
    assert torch.equal(first(x), whole[:, :3] + dense.bias[:3]) and torch.equal(second(x), whole[:, 3:])
    assert len(calls) == 1
    x.mul_(2)  # the same tensor object with other contents must not be answered from memory
    torch.testing.assert_close(second(x), 2 * whole[:, 3:])
    second(x.clone())
    assert len(calls) == 3


def test_a_watched_gate_is_reported_and_a_gradient_passes():
    layer, _ = gated(eps=0.6)
    x = torch.randn(50, N)
    expected, seen = layer(x), []
    handle = layer.group.subspace.register_forward_hook(lambda _, args, projection: seen.append(projection.fire))
    assert torch.equal(layer(x.clone()), expected) and 0 < seen[0].sum() < 50
    handle.remove()
    assert torch.equal(layer(x.requires_grad_()), expected)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad[seen[0]], layer.group.W.sum(0).expand(int(seen[0].sum()), N))


def test_the_memory_of_a_group_does_not_keep_its_input_alive():
    layer, _ = gated(eps=0.3)
    x = torch.randn(4, N)
    layer(x)
    alive = weakref.ref(x)
    del x
    gc.collect()
    assert alive() is None and not layer.group._memos
    assert torch.equal(pickle.loads(pickle.dumps(layer)).group.A, layer.group.A)


def test_result_of_a_token_does_not_depend_on_the_batch():
    layer, _ = gated(eps=0.6)
    x = torch.randn(50, N)
    assert 0 < layer.group.subspace(x).fire.sum() < 50
    torch.testing.assert_close(layer(x), torch.stack([layer(row[None])[0] for row in x]))


@pytest.mark.parametrize("eps", [None, 0.1])
def test_a_gate_and_a_residual_come_together(eps):
    W = torch.randn(M, N) if eps is None else None
    with pytest.raises(ValueError, match="gate"):
        GatedGroup(Subspace(torch.eye(N)[:K], eps), torch.randn(M, K), W)


def test_an_answer_without_gradients_is_not_given_where_they_are_wanted():
    layer, _ = gated(eps=0.3)
    x = torch.randn(4, N, requires_grad=True)
    with torch.no_grad():
        layer(x)
    assert layer(x).requires_grad


def test_a_changed_answer_is_not_given_again():
    layer, _ = gated(eps=0.3)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            x = torch.randn(4, N)
            first = layer(x).clone()
            layer(x).add_(1)
            assert torch.equal(layer(x), first)


def test_weights_that_change_between_members_are_seen():
    layer, _ = gated(eps=0.3)
    half = layer.group.m // 2
    first, second = GroupedLinear(layer.group, 0, half, None), GroupedLinear(layer.group, half, layer.group.m, None)
    x = torch.randn(4, N)
    first(x)
    with torch.no_grad():
        layer.group.A.mul_(2), layer.group.W.mul_(2)
    assert torch.equal(second(x), layer.group.reference(x)[:, half:])


def test_threads_have_answers_of_their_own():
    layer, _ = gated(eps=0.3)
    x = torch.randn(4, N)
    layer(x)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(layer, x).result()
    assert len(layer.group._memos) == 2
