"""The CPU kernels of one token against the oracle, `QuantizedGroup.reference`."""

import copy

import pytest
import torch
from torch import Tensor

from rankgate.core import GroupedLinear
from rankgate.errors import RankgateError
from rankgate.ops.cpu import quantized as cpu
from rankgate.quantized import (
    GROUP,
    GROUP_SIZES,
    LowRank,
    QuantizedGroup,
    QuantizedMatrix,
    Refinement,
    pack_nibbles,
    unpack_nibbles,
)

SHAPES = ((1, 1), (3, 64), (65, 70), (200, 63), (37, 130), (129, 577), (960, 576))
STEPS = {cpu.VNNI: 16319, cpu.SHORT: 32767, cpu.PLAIN: 32767}  # of x to each side of 0
FLOAT32_STEPS = 64  # how many roundings of the largest partial sum float32 may be off by


@pytest.fixture(params=cpu.PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Each way to multiply that this processor has."""
    monkeypatch.setattr(cpu, "PATHS", [request.param])
    return int(request.param)


def group(
    m: int, n: int, bits: int = 4, *, zero: bool = False, rank: int = 0, opened: float = 0.0, size: int = GROUP, seed=0
) -> QuantizedGroup:
    """Random codes; `opened` is the share of channels that a standard normal x opens."""
    generator = torch.Generator().manual_seed(m + n + seed)

    def codes(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    low, high = (0, 16) if bits == 4 else (-128, 128)
    groups = -(-n // GROUP) * GROUP // size
    zeros = codes(low, high, m, groups).to(torch.int8) if zero else None
    base = QuantizedMatrix.pack(codes(low, high, m, n), torch.rand(m, groups, generator=generator), zeros, bits)
    low_rank = refinement = None
    if rank:
        factors = codes(-127, 128, m, rank).to(torch.int8), codes(-127, 128, rank, n).to(torch.int8)
        low_rank = LowRank(*factors, torch.rand(rank, generator=generator) / 1000)
    if opened:
        level = torch.distributions.Normal(0, 1).icdf(torch.tensor(1 - opened / 2)) if opened < 1 else -1.0
        row, column = torch.rand(m, generator=generator), torch.rand(n, generator=generator)
        refinement = Refinement.pack(codes(0, 16, m, n), row, column, torch.full((n,), float(level)))
    return QuantizedGroup(base, low_rank, refinement)


def bound(quantized: QuantizedGroup, x: Tensor) -> Tensor:
    """How far the kernel may be off, per output: 15 or 16 bits for x in each block of 64, and float32 rounding."""
    padded = torch.nn.functional.pad(x.abs(), (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    largest = padded.amax(-1).repeat_interleave(GROUP, -1)[..., : x.shape[-1]]
    rounding = (largest / (2 * STEPS[cpu.PATHS[0]])) @ quantized.base.dequantize().abs().T
    whole = quantized.base.dequantize().abs()
    if quantized.low_rank is not None:
        factors = quantized.low_rank
        whole += (factors.A.abs().float() * factors.scale) @ factors.B.abs().float()
    if quantized.refinement is not None:
        steps = quantized.refinement.row.float()[:, None] * quantized.refinement.column.float()
        whole += 24 * steps  # 1 + q/16 and its offset 1.5, times 16, cancel down to q − 8
    return rounding + FLOAT32_STEPS * torch.finfo(torch.float32).eps * (x.abs() @ whole.T)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("size", GROUP_SIZES)
@pytest.mark.parametrize(("rank", "opened"), [(0, 0.0), (16, 0.0), (5, 0.3), (8, 1.0), (0, 0.01)])
def test_kernel_is_the_oracle_within_the_derived_bound(
    path: int, shape: tuple[int, int], bits: int, zero: bool, size: int, rank: int, opened: float
) -> None:
    quantized = group(*shape, bits, zero=zero, rank=rank, opened=opened, size=size)
    x = torch.randn(1, shape[1], generator=torch.Generator().manual_seed(7)) * 3
    x[:, 0] *= 100  # one block with a wide range
    assert ((quantized(x) - quantized.reference(x)).abs() <= bound(quantized, x)).all()


def test_float32_rounding_alone_where_x_has_few_bits(path: int) -> None:
    quantized, top = group(100, 192, rank=8), STEPS[path]
    x = torch.randint(-top, top + 1, (1, 192), generator=torch.Generator().manual_seed(0)).float()
    x[:, ::GROUP] = top
    error = (quantized(x) - quantized.reference(x)).abs()
    assert (error <= FLOAT32_STEPS * 6e-8 * (x.abs() @ quantized.base.dequantize().abs().T)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_leading_dimensions_are_kept(dtype: torch.dtype) -> None:
    quantized = group(40, 96, rank=8, opened=0.5)
    for shape in ((96,), (1, 96), (2, 1, 96), (2, 7, 96)):
        x = torch.randn(shape).to(dtype)
        y = quantized(x)
        assert y.shape == (*shape[:-1], 40)
        assert y.dtype == dtype
        torch.testing.assert_close(y, quantized.reference(x), rtol=2e-2, atol=2e-2 * float(y.float().abs().max()))


def test_strided_input() -> None:
    quantized = group(40, 96)
    wide = torch.randn(3, 192)
    torch.testing.assert_close(quantized(wide[:, ::2]), quantized(wide[:, ::2].contiguous()))


def test_no_channel_open_and_x_of_zero(path: int) -> None:
    quantized = group(70, 70, rank=4, opened=0.5)
    assert (quantized(torch.zeros(1, 70)) == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_not_hidden(path: int, value: float) -> None:
    x = torch.ones(1, 70)
    x[0, 69] = value
    assert torch.isnan(group(65, 70, rank=4, opened=0.5)(x)).all()


def test_a_watched_gate_is_reported() -> None:
    quantized = group(64, 64, opened=0.5)
    seen: list[Tensor] = []
    assert quantized.refinement is not None
    handle = quantized.refinement.gate.register_forward_hook(lambda _, args, mask: seen.append(mask))
    quantized(torch.randn(1, 64))
    handle.remove()
    assert [mask.shape for mask in seen] == [(1, 64)]


def test_changed_and_moved_tensors_are_seen() -> None:
    quantized, other = group(64, 64, rank=8), group(64, 64, 4, rank=8)
    for parameter in other.parameters():
        parameter.data = (parameter.data.float() * 0.5).to(parameter.dtype)
    x = torch.randn(1, 64)
    before, address = quantized(x), quantized.table()
    quantized.load_state_dict(other.state_dict(), assign=True)
    after = quantized(x)
    assert not torch.equal(before, after)
    assert quantized.table() == address  # captured steps keep it
    torch.testing.assert_close(after, other.reference(x), rtol=1e-3, atol=1e-3)
    assert torch.equal(copy.deepcopy(quantized)(x), after)


def test_members_are_rows_of_their_group() -> None:
    quantized, bias = group(65, 64, rank=8), torch.randn(25)
    first, second = GroupedLinear(quantized, 0, 40, None), GroupedLinear(quantized, 40, 65, bias)
    x = torch.randn(1, 1, 64)
    whole = quantized(x)
    assert torch.equal(first(x), whole[..., :40])
    assert torch.equal(second(x), whole[..., 40:] + bias)


def test_packing_round_trip() -> None:
    codes = torch.randint(0, 16, (5, 192))
    assert torch.equal(unpack_nibbles(pack_nibbles(codes)), codes.to(torch.uint8))


def test_refinement_unpacks_to_what_was_packed() -> None:
    codes = torch.randint(0, 16, (130, 7))
    row, column = torch.ones(130), torch.ones(7)
    assert torch.equal(Refinement.pack(codes, row, column, torch.zeros(7)).dequantize(), codes.float() - 8)


def test_what_helpers_widen_is_narrowed_again():
    """As peft's `prepare_model_for_kbit_training` does, before and after the first use."""
    x = torch.randn(2, 70)
    for used in (False, True):
        quantized = group(65, 70, zero=True, rank=4, opened=0.3)
        expected = group(65, 70, zero=True, rank=4, opened=0.3)(x)
        if used:
            quantized(x)
        for parameter in quantized.parameters():
            if parameter.dtype == torch.bfloat16:
                parameter.data = parameter.data.float()
        assert torch.equal(quantized(x), expected)


def test_tensors_that_were_moved_or_narrowed():
    quantized, x = group(65, 70, rank=4), torch.randn(2, 70)
    expected = quantized(x)
    for parameter in quantized.parameters():
        parameter.data = parameter.data.clone()
    assert torch.equal(quantized(x), expected)
    quantized.low_rank.scale.data = quantized.low_rank.scale.data.half()
    with pytest.raises(RankgateError, match="load the model again"):
        quantized(x)
