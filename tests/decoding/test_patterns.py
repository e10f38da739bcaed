"""Several operations as one row, memory that results share, and attention in parts: against torch."""

import pytest
import torch
from test_native import DTYPES, random, step

from rankgate.ops.attention import attend_reference
from rankgate.ops.cpu import norms, team
from rankgate.ops.cpu.attention import attend

WIDTH = 40


def kernels(lowered):
    """The addresses of the kernels of all rows."""
    return {int(row[0]) for program in lowered.programs if not callable(program) for row in program}


def norm(x, eps=1e-5):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_norm_is_one_row(tokens):
    x, weight = random(1, tokens, WIDTH), random(WIDTH, seed=1)
    lowered, call = step(lambda position: weight * norm(x * position))
    assert norms.rms_norm.address in kernels(lowered)
    for position in (3, 11):
        torch.testing.assert_close(call(position), weight * norm(x * position))


def test_a_norm_of_what_is_not_finite_is_not():
    x = random(1, 2, WIDTH)
    x[0, 1, 7] = torch.inf
    _, call = step(lambda position: norm(x * position))
    assert call(2)[0, 0].isfinite().all()
    assert call(2)[0, 1].isnan().any()


def test_a_norm_whose_mean_somebody_reads_is_several():
    def function(position):
        y = x * position
        mean = y.pow(2).mean(-1, keepdim=True)
        return y * torch.rsqrt(mean + 1e-5) + mean

    x = random(1, 2, WIDTH)
    lowered, call = step(function)
    assert norms.rms_norm.address not in kernels(lowered)
    torch.testing.assert_close(call(5), function(5))


def turned(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_rotary_embedding_is_one_row(dtype, tokens):
    def function(position):
        q = (x * position).view(1, tokens, 4, 16).transpose(1, 2)
        return (q * cosine) + (turned(q) * sine)

    x = random(1, tokens, 64, dtype=dtype)
    cosine, sine = (random(1, 1, tokens, 16, dtype=dtype, seed=seed) for seed in (1, 2))
    lowered, call = step(function)
    assert norms.rotation.address in kernels(lowered)
    slack = 1e-5 if dtype == torch.float32 else 0
    for position in (3, 11):
        torch.testing.assert_close(call(position), function(position), atol=slack, rtol=0)


def test_other_rotations_are_not_taken_for_it():
    def function(position):
        q = (x * position).view(1, 1, 4, 16)
        return (q * cosine) + (torch.cat((-q[..., 8:], q[..., 4:12]), dim=-1) * cosine)

    x, cosine = random(1, 64), random(1, 1, 1, 16, seed=1)
    lowered, call = step(function)
    assert norms.rotation.address not in kernels(lowered)
    torch.testing.assert_close(call(3), function(3))


def test_results_that_are_needed_later_keep_their_memory():
    def function(position):
        kept = [norm(x * position + i) for i in range(12)]
        total = x * 0
        for i, value in enumerate(kept):
            total = total + torch.tanh(value[..., ::2].repeat(1, 1, 2)) * i
        return total + sum(kept[::-3])

    x = random(1, 2, WIDTH)
    lowered, call = step(function)
    own = {block.data_ptr() for block in lowered.kept if isinstance(block, torch.Tensor)}
    assert len(own) < 30  # of some 80 results
    for position in (3, 11):
        torch.testing.assert_close(call(position), function(position))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (5, 1), (4, 4)])
@pytest.mark.parametrize("position", [0, 1, 63, 64, 200, 299])
@pytest.mark.parametrize("window", [0, 70])
def test_attention_in_parts(threads, heads, groups, position, window, monkeypatch):
    monkeypatch.setattr(team, "size", lambda: threads)
    q, k, v = (random(1, count, 1, 64, seed=i) for i, count in enumerate((heads, groups, groups)))
    keys, values = random(1, groups, 300, 64, seed=4), random(1, groups, 300, 64, seed=5)
    at = torch.tensor([[position]])
    expected = attend_reference(q, k, v, keys.clone(), values.clone(), at, 2.0, window)
    got = attend(q, k, v, keys, values, at, 2.0, window)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
    assert torch.equal(keys[:, :, position], k[:, :, 0])
