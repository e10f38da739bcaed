"""The steps of quantising one group, against what they promise."""

import itertools

import pytest
import torch

from rankgate.errors import RankgateError
from rankgate.methods import LRQConfig, quantize
from rankgate.methods.quantize import (
    DAMPING,
    TRUST,
    ChannelWorth,
    Metric,
    allocate_ranks,
    compensated,
    decompose,
    factor,
    gate_level,
    low_rank,
    nearest,
    output_weights,
    predicted_loss,
    quantize_group,
    refine,
)
from rankgate.quantized import GROUP, GROUP_SIZES, NIBBLE_ZERO, Grid, QuantizedMatrix, Refinement, pad_to_group

SHAPES = ((1, 1), (7, 33), (40, 64), (24, 100), (50, 200))


def problem(m, n, seed=0):
    """Weights, the second moment of correlated inputs of very different size, and sensitivities."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(m, n, generator=generator)
    x = torch.randn(4 * n + 8, n, generator=generator) @ torch.randn(n, n, generator=generator)
    x *= torch.logspace(-1, 1, n)
    return W, x.T @ x / len(x), torch.rand(m, generator=generator)


def blocks(W):
    return pad_to_group(W).unflatten(-1, (-1, GROUP))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_packing_round_trip(shape, bits):
    m, n = shape
    low, high, offset = (0, 16, NIBBLE_ZERO) if bits == 4 else (-128, 128, 0)
    codes = torch.randint(low, high, shape)
    scale = torch.randn(m, -(-n // GROUP)).bfloat16()
    zero = torch.randint(-20, 20, scale.shape).to(torch.int8)
    s, z = (v.float().repeat_interleave(GROUP, 1)[:, :n] for v in (scale, zero))
    assert torch.equal(QuantizedMatrix.pack(codes, scale, None, bits).dequantize(), s * (codes - offset))
    assert torch.equal(QuantizedMatrix.pack(codes, scale, zero, bits).dequantize(), s * (codes - z))
    if bits == 4:
        row, column = torch.randn(m).bfloat16(), torch.randn(n).bfloat16()
        plane = Refinement.pack(codes, row, column, torch.zeros(n))
        expected = (codes - 8.0) * row.float()[:, None] * column.float()
        assert torch.equal(plane.dequantize(), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_to_nearest_stays_within_a_step(shape, bits):
    """Of the unshrunken range: half a step, but a whole one at the end that the largest weight does not take."""
    W = problem(*shape)[0]
    W[0] = 0
    step = blocks(W).abs().amax(-1) / 2 ** (bits - 1)
    error = blocks(nearest(W, bits).dequantize() - W).square().sum(-1)
    assert (error <= GROUP * (1.05 * step).square()).all()
    assert (error[0] == 0).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_on_a_grid_are_kept_exactly(bits):
    low = -(2 ** (bits - 1))
    W = torch.randint(low, -low, (10, 128)) * 0.5
    W[:, ::GROUP] = low * 0.5
    assert torch.equal(nearest(W, bits).dequantize(), W)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", GROUP_SIZES)
@pytest.mark.parametrize(("bits", "shape"), [(4, (24, 100)), (4, (50, 200)), (8, (50, 200)), (4, (7, 33))])
def test_compensated_rounding_is_never_worse_than_to_nearest(bits, shape, size, symmetric, seed):
    W, C, _ = problem(*shape, seed)
    metric, one = Metric(C), torch.ones(len(W))
    plain = predicted_loss(W - nearest(W, bits).dequantize(), metric, one)
    assert predicted_loss(W - compensated(W, metric, Grid(bits, symmetric, size)).dequantize(), metric, one) < plain


def test_half_as_many_inputs_with_a_scale_lose_less():
    W, C, _ = problem(50, 200)
    metric, one = Metric(C), torch.ones(50)
    loss = [
        predicted_loss(W - compensated(W, metric, Grid(4, True, size)).dequantize(), metric, one) for size in (32, 64)
    ]
    assert loss[0] < loss[1]


def test_uncorrelated_inputs_leave_nothing_to_compensate():
    W = problem(20, 100)[0]
    ordinary = compensated(W, Metric(torch.eye(100)), Grid()).dequantize()
    assert torch.equal(ordinary, nearest(W, 4).dequantize())


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (300, 200)])
def test_decomposition_is_that_of_the_weighted_error(shape):
    E, C, F = problem(*shape)
    D, metric = output_weights(F), Metric(C)
    U, sigma = decompose(E, metric, D, 4)
    values, vectors = torch.linalg.eigh(C.double())
    weighted = (D[:, None] * E).double() @ vectors * values.clamp_min(0).sqrt()
    exact = torch.linalg.svdvals(weighted)
    torch.testing.assert_close(sigma.double(), exact[:4], rtol=1e-2, atol=0)
    torch.testing.assert_close(U.T @ U, torch.eye(4), rtol=0, atol=1e-4)
    rest = (weighted - U.double() @ (U.T.double() @ weighted)).square().sum()
    assert rest <= exact[4:].square().sum() * 1.01


@pytest.mark.parametrize("n", [1, 64, 150])
def test_second_moment_in_factors_some_columns_at_a_time(n, monkeypatch):
    monkeypatch.setattr(quantize, "COLUMNS", 64)
    _, C, _ = problem(1, n)
    metric = Metric(C)
    assert torch.allclose(metric.root @ metric.root.T, C, rtol=1e-4, atol=1e-4 * C.diagonal().mean())
    U, order = metric.propagation.double(), metric.order
    damped = TRUST * C.double() + (1 - TRUST) * C.double().diagonal().diag()
    damped += DAMPING * C.diagonal().mean() * torch.eye(n)
    assert torch.equal(U, U.triu())
    assert torch.allclose(U.T @ U @ damped[order][:, order], torch.eye(n).double(), atol=1e-5)


def test_a_singular_second_moment_is_damped_until_it_has_factors():
    L = factor(torch.ones(80, 80), 1e-20)
    assert torch.equal(L, L.tril()) and (L @ L.T - 1).abs().max() < 1e-6


@pytest.mark.parametrize("shape", [(20, 50), (50, 20)])
def test_at_full_rank_only_the_rounding_of_the_factors_is_left(shape):
    E, C, F = problem(*shape)
    correction = low_rank(E, Metric(C), output_weights(F), 20)
    # A factor entry is off by at most half a step, and no larger than 127 of them.
    assert (correction.dequantize() - E).abs().max() <= 127.25 * correction.scale.sum()
    assert (correction.dequantize() - E).norm() <= 0.02 * E.norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_refinement_restores_all_but_half_a_step(shape):
    E, _, F = problem(*shape)
    D = output_weights(F)
    plane, worth = refine(E, D)
    row = E.square().mean(1).sqrt()
    row = row / row.mean()
    step = (E / row[:, None]).abs().amax(0) / 7.5
    error = (D[:, None] * (plane.dequantize() - E)).square().sum(0)
    assert (error <= (0.55 * step).square() * (D * row).square().sum()).all()
    torch.testing.assert_close(worth, (D[:, None] * plane.dequantize()).norm(dim=0), rtol=1e-5, atol=1e-6)
    assert not plane.gate(torch.full((1, shape[1]), 1e30)).any()


@pytest.mark.parametrize("symmetric", [True, False])
def test_more_bits_and_more_rank_are_never_worse(symmetric):
    W, C, F = problem(96, 130)

    def loss(bits, rank):
        return quantize_group(W, C, F, grid=Grid(bits, symmetric), rank=rank, refined=True).losses

    losses = [[loss(bits, rank) for rank in (0, 8, 32, 96)] for bits in (4, 8)]
    for row in losses:
        assert all(b.corrected <= a.corrected for a, b in itertools.pairwise(row))
        assert all(x.refined <= x.corrected <= x.rounded for x in row)
    assert all(eight.corrected < four.corrected for four, eight in zip(*losses, strict=True))


def test_losses_are_those_of_the_stored_group():
    W, C, F = problem(30, 70)
    result = quantize_group(W, C, F, grid=Grid(), rank=8, refined=True)
    left = W - result.base.dequantize() - result.low_rank.dequantize()
    D = output_weights(F)
    for E, predicted in (
        (left, result.losses.corrected),
        (left - result.refinement.dequantize(), result.losses.refined),
    ):
        assert predicted == pytest.approx(0.5 * (D[:, None] * E @ C @ E.T * D).trace().item(), rel=1e-4)


def test_the_same_group_always_gets_the_same_codes():
    W, C, F = problem(300, 200)
    a, b = (quantize_group(W, C, F, grid=Grid(), rank=16, refined=True) for _ in range(2))
    for x, y in ((a.base, b.base), (a.low_rank, b.low_rank), (a.refinement, b.refinement)):
        assert all(torch.equal(p, q) for p, q in zip(x.parameters(), y.parameters(), strict=True))


def test_inputs_and_outputs_without_any_signal_do_no_harm():
    W, C, F = problem(20, 70)
    C[:9], C[:, :9], W[:, -3:] = 0, 0, 0
    result = quantize_group(W, C, torch.zeros_like(F), grid=Grid(), rank=8, refined=True)
    for part in (result.base, result.low_rank, result.refinement):
        assert torch.isfinite(part.dequantize()).all()


@pytest.mark.parametrize("bits", [2, 5, 16])
def test_other_widths_are_refused(bits):
    with pytest.raises(RankgateError, match="use 4 or 8"):
        nearest(torch.ones(2, 2), bits)


def test_other_group_sizes_are_refused():
    with pytest.raises(RankgateError, match="use 32 or 64"):
        LRQConfig(group_size=128)


def test_ranks_go_where_they_restore_most():
    spectra = [torch.full((32,), 2.0), torch.full((32,), 1.0), torch.cat([torch.full((8,), 9.0), torch.zeros(20)])]
    shapes = [(40, 60), (40, 60), (20, 30)]
    assert allocate_ranks(spectra, shapes, 0) == [0, 0, 0]
    assert allocate_ranks(spectra, shapes, 16) == [32, 0, 8]  # 4,000 bytes: 400 + 4 × 800, and another 800 do not fit
    for rank in (3, 8, 17, 64):
        ranks = allocate_ranks(spectra, shapes, rank)
        assert all(r % 8 == 0 and r <= len(s) for r, s in zip(ranks, spectra, strict=True))
        assert sum(r * sum(shape) for r, shape in zip(ranks, shapes, strict=True)) <= rank * 250
    assert allocate_ranks(spectra, shapes, 64) == [32, 32, 8]


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.5, 1.0])
def test_the_gate_level_reads_the_fraction_of_the_sample(fraction):
    torch.manual_seed(0)
    groups = [
        ChannelWorth(torch.randn(50, n), torch.rand(n) * size, cost)
        for n, size, cost in ((30, 1e-6, 10), (64, 1e-5, 40), (7, 1e-6, 1000))
    ]
    level = gate_level(groups, fraction)
    read = sum(g.cost * len(g.worth) * g.share(level) for g in groups) / sum(g.cost * len(g.worth) for g in groups)
    assert read == pytest.approx(fraction, abs=0.01)
    for group in groups:  # worth per byte is what decides
        mask = group.x.abs() > group.thresholds(level)
        torch.testing.assert_close(mask, (group.x * group.worth).square() / group.cost > level)


def test_worthless_channels_are_never_read():
    worth = ChannelWorth(torch.randn(20, 4), torch.tensor([0.0, 1, 1, 1]), 1)
    for level in (0.0, 0.5):
        assert torch.isfinite(worth.thresholds(level)).all()
        assert not (torch.full((4,), 1e30) > worth.thresholds(level))[0]
