"""The Triton kernel against the oracle: on the GPU where there is one, in Triton's interpreter elsewhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_cpu_kernels import FLOAT32_STEPS, group
from torch import Tensor
from torch.nn import functional as F

from rankgate.errors import RankgateError
from rankgate.experts import tables_of
from rankgate.ops.attention import ALWAYS, STEP, attend_held_reference, attend_reference
from rankgate.ops.gpu import attention as attention_gpu
from rankgate.ops.gpu import chosen as chosen_gpu
from rankgate.ops.gpu import gathered as gathered_gpu
from rankgate.ops.gpu import linear as linear_gpu
from rankgate.ops.gpu import quantized as quantized_gpu
from rankgate.ops.register import ROUTES
from rankgate.quantized import GROUP_SIZES, QuantizedGroup

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Case = tuple[int, int, int, bool, int, float, int]  # m, n, bits, zero points, rank, share of open channels, tokens
CASES = (
    (1, 1, 4, False, 5, 0.5, 1),
    (65, 70, 4, False, 0, 0.0, 1),
    (70, 577, 8, False, 0, 0.0, 8),
    (200, 63, 8, True, 5, 0.1, 3),
    (129, 577, 4, True, 5, 0.1, 3),
    (66, 130, 4, False, 16, 1.0, 8),
    (130, 1100, 4, False, 16, 0.1, 1),
)


def bound(quantized: QuantizedGroup, x: Tensor) -> Tensor:
    """Float32 rounding of sums whose terms are up to 2,064 x scale at 4 bits, before the offset is taken off again."""
    scale = quantized.base.scale.float().repeat_interleave(quantized.base.group_size, 1)[:, : x.shape[-1]]
    whole = quantized.base.dequantize().abs() + (2064 * scale if quantized.base.bits == 4 else 0)
    if quantized.low_rank is not None:
        whole += (quantized.low_rank.A.abs().float() * quantized.low_rank.scale) @ quantized.low_rank.B.abs().float()
    if quantized.refinement is not None:
        whole += 8 * quantized.refinement.row.float()[:, None] * quantized.refinement.column.float()
    return FLOAT32_STEPS * torch.finfo(torch.float32).eps * (x.abs() @ whole.T)


def gemv(x: Tensor, quantized: QuantizedGroup) -> Tensor:
    y = quantized_gpu.gemv(x.reshape(-1, quantized.n), *quantized.parts)
    return y.view(*x.shape[:-1], quantized.m)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("size", GROUP_SIZES)
def test_kernel_is_the_oracle_but_for_rounding(size: int, case: Case, dtype: torch.dtype):
    m, n, bits, zero, rank, opened, tokens = case
    quantized = group(m, n, bits, zero=zero, rank=rank, opened=opened, size=size).to(DEVICE)
    x = torch.randn(tokens, n, generator=torch.Generator().manual_seed(7)).to(DEVICE, dtype)
    expected = quantized.reference(x.float())
    rounding = torch.finfo(dtype).eps * expected.abs() if dtype != torch.float32 else 0  # twice that of rounding once
    y = gemv(x, quantized)
    assert y.dtype == dtype
    assert ((y.float() - expected).abs() <= rounding + bound(quantized, x.float())).all()


MANY = (
    (1, 1, 4, False, 5, 0.5, 2),
    (65, 70, 4, False, 0, 0.0, 17),
    (200, 130, 8, True, 0, 0.0, 33),
    (129, 577, 4, True, 5, 0.1, 64),
    (70, 200, 8, False, 16, 1.0, 9),
    (130, 300, 4, False, 20, 0.1, 16),
)


def of_torch(quantized: QuantizedGroup, x: Tensor) -> Tensor:
    """By products of torch in the dtype of x."""
    y = F.linear(x, quantized.base.dequantize(x.dtype))
    if quantized.low_rank is not None:
        y += F.linear(x, quantized.low_rank.dequantize().to(x.dtype))
    return y if quantized.refinement is None else y + quantized.refinement(x)


def check_against_torch(y: Tensor, quantized: QuantizedGroup, x: Tensor) -> None:
    """At most twice as far from the oracle."""
    exact = quantized.reference(x.double())
    allowed = 2 * (of_torch(quantized, x) - exact).norm() + torch.finfo(x.dtype).eps * exact.norm()
    assert y.dtype == x.dtype and y.shape == exact.shape
    assert (y - exact).norm() <= allowed


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA C++ needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", MANY, ids=str)
@pytest.mark.parametrize("size", GROUP_SIZES)
def test_several_tokens_are_as_exact_as_torch(size: int, case: Case, dtype: torch.dtype):
    m, n, bits, zero, rank, opened, tokens = case
    quantized = group(m, n, bits, zero=zero, rank=rank, opened=opened, size=size).to(DEVICE)
    x = torch.randn(tokens, n, generator=torch.Generator().manual_seed(7)).to(DEVICE, dtype)
    check_against_torch(linear_gpu.linear(x, quantized.parts), quantized, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", MANY, ids=str)
@pytest.mark.parametrize("size", GROUP_SIZES)
def test_a_prompt_finds_every_channel_open(size: int, case: Case, dtype: torch.dtype):
    m, n, bits, zero, rank, opened, _ = case
    quantized = group(m, n, bits, zero=zero, rank=rank, opened=opened, size=size).to(DEVICE)
    x = torch.randn(65, n, generator=torch.Generator().manual_seed(7)).to(DEVICE, dtype)
    y = linear_gpu.linear(x, quantized.parts)
    if quantized.refinement is not None:
        quantized.refinement.gate.threshold.fill_(-1)
    check_against_torch(y, quantized, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("size", GROUP_SIZES)
def test_each_row_by_a_group_of_its_own(size: int, case: Case, dtype: torch.dtype):
    """Of unlike ranks. Groups that no row has hold what would show: scales and factors that are not finite."""
    m, n, bits, zero, rank, opened, rows = case
    ranks, like = (rank // 2, rank, 0, rank // 3, 0), {"zero": zero, "opened": opened, "size": size}
    groups = [group(m, n, bits, rank=r, seed=e, **like).to(DEVICE) for e, r in enumerate(ranks)]
    chosen = torch.tensor([3, 0, 3, 1, 0, 1, 3, 3][:rows], device=DEVICE)
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(7)).to(DEVICE, dtype)
    for e in {0, 1, 2, 3, 4} - {*chosen.tolist()}:
        for part in groups[e].parts:
            if part is not None and part.is_floating_point():
                part.fill_(torch.nan)
    tables, parts = tables_of(groups)
    y = chosen_gpu.linear(x, tables, chosen, parts)
    assert y.dtype == dtype
    for row, value, e in zip(x.float(), y.float(), chosen.tolist(), strict=True):
        expected = groups[e].reference(row)
        rounding = torch.finfo(dtype).eps * expected.abs() if dtype != torch.float32 else 0
        assert ((value - expected).abs() <= rounding + bound(groups[e], row[None])[0]).all()


def test_groups_that_no_kernel_reads_together_are_refused():
    for others in (group(65, 70, 8), group(65, 70, size=32), group(65, 70, opened=0.1), group(65, 70, zero=True)):
        with pytest.raises(RankgateError, match="stored in unlike ways"):
            tables_of([group(65, 70), others])
    with pytest.raises(RankgateError, match="not in"):
        ROUTES["chosen_linear.parts", "CUDA"].call(torch.ones(1, 70, dtype=torch.float64), None, None, [])


def test_an_input_that_begins_anywhere():
    quantized, buffer = group(40, 64).to(DEVICE), torch.randn(70, device=DEVICE).to(torch.bfloat16)
    for start in range(4):
        x = buffer[start : start + 64][None]
        torch.testing.assert_close(gemv(x, quantized), quantized.reference(x), rtol=0.02, atol=0.02)


def test_leading_dimensions_and_strides():
    quantized = group(40, 96, rank=8, opened=0.5).to(DEVICE)
    x = torch.randn(2, 1, 192, device=DEVICE)[..., ::2]
    y = gemv(x, quantized)
    assert y.shape == (2, 1, 40)
    assert ((y - quantized.reference(x)).abs() <= bound(quantized, x)).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_not_hidden(value: float):
    x = torch.ones(1, 70, device=DEVICE)
    x[0, 69] = value
    assert not torch.isfinite(gemv(x, group(65, 70, rank=4, opened=0.5).to(DEVICE))).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [(4, 4, 16, 16), (6, 2, 64, 64), (3, 1, 5, 7)], ids=str)
@pytest.mark.parametrize("rule", [(0, 0.0, False), (1, 0.0, False), (100, 2.0, True)], ids=str)
def test_attention_along_a_text(heads: tuple[int, int, int, int], dtype: torch.dtype, rule: tuple[int, float, bool]):
    H, G, d, e = heads
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    caches = [[random(1, G, 150, w) for w in (d, e, d, e)] for _ in "ab"]
    caches[1] = [buffer.clone() for buffer in caches[0]]
    cache = attention_gpu.table(caches[0])
    window, cap, learned = rule
    more = window, cap, 2 * torch.randn(H, generator=generator).to(DEVICE) if learned else None
    for at, count in ((0, 1), (63, 1), (149, 1), (0, 3), (126, 5)):
        q, k, v = random(1, H, count, d), random(1, G, count, d), random(1, G, count, e)
        position = torch.arange(at, at + count, device=DEVICE)[None]
        y = attention_gpu.attend(q, k, v, cache, 1, position, 0.3, *more)
        wide = [buffer.float() for buffer in caches[1][2:]]
        exact = attend_reference(q.float(), k.float(), v.float(), *wide, position, 0.3, *more)
        assert y.shape == (1, count, H, e)
        assert y.dtype == dtype
        eps = torch.finfo(dtype).eps if dtype != torch.float32 else 0
        assert ((y.float() - exact).abs() <= eps * exact.abs() + 1e-5).all()
        for buffer, exact_buffer in zip(caches[1][2:], wide, strict=True):
            buffer.copy_(exact_buffer)
        assert all(torch.equal(a, b) for a, b in zip(*caches, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(3, 3, 16, 16), (6, 3, 64, 20)], ids=str)
def test_attention_to_what_heads_hold(heads: tuple[int, int, int, int], dtype: torch.dtype):
    H, G, d, e = heads
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    # kept rows and a ring of two steps; a window without sinks; all keys
    rows = [[0, 150, 170, 2 * STEP, STEP, 4], [430, 0, 430, 3 * STEP, 2 * STEP - 9, 0], [820, 0, 820, 1024, ALWAYS, 0]]
    for at in (4, STEP - 1, 5 * STEP + 3, 1023):
        held = [random(1844, d), random(1844, e), random(1844).abs().float(), torch.tensor(rows, device=DEVICE)]
        q, k, v = random(1, H, 1, d), random(1, G, 1, d), random(1, G, 1, e)
        position = torch.tensor([[at]], device=DEVICE)
        wide = [held[0].float(), held[1].float(), *held[2:]]
        exact = attend_held_reference(q.float(), k.float(), v.float(), *wide, position, 0.3)
        y = attention_gpu.attend_held(q, k, v, attention_gpu.table(held), 0, position, 0.3)
        eps = torch.finfo(dtype).eps if dtype != torch.float32 else 0
        assert ((y.float() - exact).abs() <= eps * exact.abs() + 1e-5).all()
        assert all(torch.equal(a.float(), b) for a, b in zip(held[:2], wide[:2], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1),
        (70, 63, 5, 3),
        (40, 130, 130, 1),
        (65, 300, 270, 1),
        (65, 300, 270, 8),
        (65, 150, 70, 9),
        (40, 70, 20, 70),
    ],
    ids=str,
)
def test_subspaces_with_and_without_a_gate(shape: tuple[int, int, int, int], dtype: torch.dtype):
    """Tokens alternate between the subspace and all of the space, far from where the gate could tie."""
    m, n, k, tokens = shape
    generator = torch.Generator().manual_seed(2)
    B = torch.linalg.qr(torch.randn(n, n, generator=generator))[0][:, :k].T.to(DEVICE, dtype).contiguous()
    W = torch.randn(m, n, generator=generator).to(DEVICE, dtype)
    A = (W.float() @ B.float().T).to(dtype)
    x = torch.randn(tokens, n, generator=generator).to(DEVICE)
    x[::2] = x[::2] @ B.T.float() @ B.float()
    x = x.to(dtype)
    low, full = (x.float() @ B.float().T) @ A.float().T, x.float() @ W.float().T
    inside = ((torch.arange(tokens, device=DEVICE) % 2 == 0) | (k == n))[:, None]
    cases = {0.1: torch.where(inside, low, full), 2.0: low, 0.0: full}
    scale = x.float().norm(dim=1, keepdim=True) * W.float().norm(dim=1)
    limit = 1e-6 * scale * n**0.5 + torch.finfo(dtype).eps * scale * (dtype != torch.float32)
    for eps, expected in cases.items():
        y = gathered_gpu.linear(x, B, A, W, eps)
        assert y.dtype == dtype
        assert ((y.float() - expected).abs() <= limit).all()
    y = gathered_gpu.linear(x[None], B, A, None, None)
    assert ((y[0].float() - low).abs() <= limit).all()


def test_kernels_compile_for_a_gpu():
    """Without one: Triton brings its compiler."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "compile_kernels.py"
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "refine" in done.stdout
