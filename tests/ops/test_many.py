"""Products of several tokens on the CPU against the oracle, `QuantizedGroup.reference`."""

import os
import subprocess
import sys

import pytest
import torch
from test_cpu_kernels import FLOAT32_STEPS, SHAPES, group
from torch import Tensor

from rankgate.ops.cpu import many, tiles
from rankgate.quantized import GROUP, GROUP_SIZES, QuantizedGroup

TOKENS = (2, 5, 6, 7, 13, 100)
ADDED = [(0, 0.0), (16, 0.0), (5, 0.3), (70, 1.0), (0, 0.01)]  # rank, share of open channels
PROCESSORS = {  # that Numba can compile for: AVX2 alone, and neither that nor anything else
    "avx2": ("haswell", "+avx,+avx2,+fma,+bmi,+bmi2,+f16c,+popcnt,+sse4.2,+ssse3"),
    "plain": ("x86-64", "+sse2"),
}
OTHER = "RANKGATE_TEST_PROCESSOR"


def steps(v: Tensor) -> Tensor:
    """Half a step of the 14 bits of every value: of the largest of its block of 64."""
    blocks = torch.nn.functional.pad(v.abs(), (0, -v.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    return (blocks.amax(-1) / (2 * tiles.LARGEST)).repeat_interleave(GROUP, -1)[..., : v.shape[-1]]


def bound(quantized: QuantizedGroup, x: Tensor) -> Tensor:
    """How far an output may be off: see `many`. Float32 rounds sums, and codes and zero apart, of up to 128 each."""
    x, Q = x.double(), quantized.base.dequantize().double()
    scale = quantized.base.scale.double().repeat_interleave(quantized.base.group_size, 1)[:, : quantized.n]
    rounding = steps(x) @ Q.abs().T
    whole = x.abs() @ (Q.abs() + scale).T
    if quantized.low_rank is not None:
        A, B, s = (v.double() for v in (quantized.low_rank.A, quantized.low_rank.B, quantized.low_rank.scale))
        off, z = (steps(x) @ B.abs().T) * s, (x @ B.T) * s
        rounding += (off + steps(z.abs() + off)) @ A.abs().T
        whole += (x.abs() @ B.abs().T * s) @ A.abs().T
    if quantized.refinement is not None:
        fine = quantized.refinement
        opened = x * (x.abs() > fine.gate.threshold) * fine.column
        E = fine.dequantize(torch.float64).abs() / fine.column.double().clamp_min(1e-30)
        # 64 open channels share a step, whichever they are: at most that of the largest
        rounding += opened.abs().amax(-1, keepdim=True) / (2 * tiles.LARGEST) * E.sum(1)
        whole += opened.abs() @ E.T
    return rounding + FLOAT32_STEPS * torch.finfo(torch.float32).eps * whole


def noise(tokens: int, n: int) -> Tensor:
    x = torch.randn(tokens, n, generator=torch.Generator().manual_seed(7)) * 3
    x[:, 0] *= 100  # one block with a wide range
    return x


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("size", GROUP_SIZES)
@pytest.mark.parametrize(("rank", "opened"), ADDED)
def test_kernel_is_the_definition_within_the_derived_bound(
    shape: tuple[int, int], bits: int, zero: bool, size: int, rank: int, opened: float
) -> None:
    quantized = group(*shape, bits, zero=zero, rank=rank, opened=opened, size=size)
    for tokens in TOKENS:
        x = noise(tokens, shape[1])
        error = many.gemm(x, quantized.table(), quantized.m).double() - quantized.reference(x.double())
        assert (error.abs() <= bound(quantized, x)).all()


@pytest.mark.skipif(OTHER in os.environ, reason="is another processor")
@pytest.mark.skipif("avx2" not in tiles.FEATURES, reason="runs what it compiles for another x86")
@pytest.mark.parametrize("name", PROCESSORS)
def test_other_processors(name: str) -> None:
    """Tests of this file, compiled for less than this processor has."""
    cpu, features = PROCESSORS[name]
    env = {**os.environ, OTHER: name, "NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features, "NUMBA_NUM_THREADS": "1"}
    tests = "shape5 and kernel or finite or most or dtype"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", __file__, "-k", tests]
    run = subprocess.run(command, check=False, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def test_a_token_is_the_same_whatever_its_neighbours_are() -> None:
    quantized = group(129, 200, rank=8, opened=0.2)
    x = noise(20, 200)
    alone = torch.cat([many.gemm(token, quantized.table(), quantized.m) for token in x.split(1)])
    assert torch.equal(many.gemm(x, quantized.table(), quantized.m), alone)


def test_tiles_that_open_most_channels_and_tiles_that_open_few() -> None:
    """Read in two ways, and mean the same."""
    quantized = group(129, 200, opened=0.5)
    x = noise(6 * tiles.TILE, 200)
    alike = x.clone()
    for tile, factor in enumerate((0.01, 100, 1, 0.3, 0.01, 100)):
        x[tile * tiles.TILE : (tile + 1) * tiles.TILE] *= factor
        alike[tile :: tiles.TILE] *= factor
    for tokens in (x, alike):
        error = many.gemm(tokens, quantized.table(), quantized.m).double() - quantized.reference(tokens.double())
        assert (error.abs() <= bound(quantized, tokens)).all()


def test_a_token_that_is_not_finite_is_nan_and_no_other_one() -> None:
    for bits in (4, 8):
        quantized = group(65, 70, bits, zero=True, rank=4, opened=0.5)
        x = torch.randn(9, 70)
        clean = many.gemm(x, quantized.table(), quantized.m)
        broken = {1: float("nan"), 4: float("inf"), 8: -float("inf")}
        for token, value in broken.items():
            x[token, 69] = value
        y = many.gemm(x, quantized.table(), quantized.m)
        for token in range(9):
            assert torch.isnan(y[token]).all() if token in broken else torch.equal(y[token], clean[token])


def test_zeros_and_values_too_small_to_have_an_inverse() -> None:
    quantized = group(70, 70, rank=4, opened=0.5)
    assert (quantized(torch.zeros(3, 70)) == 0).all()
    assert (quantized(torch.full((3, 70), 1e-42)).abs() < 1e-30).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_leading_dimensions_are_kept(dtype: torch.dtype) -> None:
    quantized = group(40, 96, rank=8, opened=0.5)
    for shape in ((2, 96), (2, 1, 96), (2, 7, 96), (0, 96)):
        x = torch.randn(shape).to(dtype)
        y = quantized(x)
        assert y.shape == (*shape[:-1], 40)
        assert y.dtype == dtype
        step = torch.finfo(dtype).eps * quantized.reference(x).abs()
        assert ((y.double() - quantized.reference(x.double())).abs() <= bound(quantized, x) + step).all()


def test_float64_is_the_definition() -> None:
    quantized = group(40, 96, rank=8, opened=0.5)
    x = torch.randn(3, 96, dtype=torch.float64)
    assert torch.equal(quantized(x), quantized.reference(x))
    assert torch.equal(torch.ops.rankgate.quantized_linear.parts(x, quantized.parts), quantized.reference(x))


def test_strided_input() -> None:
    quantized = group(40, 96)
    wide = torch.randn(3, 192)
    assert torch.equal(quantized(wide[:, ::2]), quantized(wide[:, ::2].contiguous()))


def test_more_tokens_than_are_prepared_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    quantized = group(65, 70, rank=4, opened=0.3)
    x = noise(30, 70)
    whole = quantized(x)
    monkeypatch.setattr(many, "MOST_TOKENS", 12)
    assert torch.equal(quantized(x), whole)
