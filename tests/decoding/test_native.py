"""A step as programs: every operation that has a kernel, against torch, and what is left to torch."""

import numpy as np
import pytest
import torch
from conftest import tokens
from test_decode import CAPTURED, both, variant
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from rankgate.decoding import native
from rankgate.decoding.native import Native
from rankgate.ops.cpu import dense, team
from rankgate.ops.cpu.attention import KINDS

DTYPES = torch.float32, torch.bfloat16, torch.float16
pytestmark = pytest.mark.filterwarnings("ignore:.*without the fast path")


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def step(function, threads=1):
    """`function` of a position (1, 1), lowered, and a call of it."""
    inputs = [torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[2]])]
    lowered = Native(make_fx(lambda token, position: function(position), pre_dispatch=True)(*inputs), inputs)
    return lowered, lambda position: lowered.bind([], threads)(inputs[0], torch.tensor([[position]])).result()


ELEMENTWISE = {
    "neg": lambda x, y: -x,
    "abs": lambda x, y: x.abs(),
    "sqrt": lambda x, y: (x * x).sqrt(),
    "rsqrt": lambda x, y: torch.rsqrt(x * x + 1),
    "reciprocal": lambda x, y: torch.reciprocal(x * x + 1),
    "exp": lambda x, y: torch.exp(x * 20),
    "log": lambda x, y: torch.log(x * x + 1),
    "tanh": lambda x, y: torch.tanh(x * x * x),
    "sigmoid": lambda x, y: torch.sigmoid(10 * x),
    "silu": lambda x, y: F.silu(10 * x),
    "relu": lambda x, y: F.relu(x),
    "gelu": lambda x, y: F.gelu(x),
    "gelu_tanh": lambda x, y: F.gelu(x, approximate="tanh"),
    "cos": lambda x, y: torch.cos(1000 * x),
    "sin": lambda x, y: torch.sin(1000 * x),
    "square": lambda x, y: x.pow(2) + x.pow(3) + (x * x).pow(0.5) + (x * x + 1).pow(-1.5),
    "arithmetic": lambda x, y: (x + y) * (x - 3) / (y * y + 2) - (1 - x),
    "extremes": lambda x, y: torch.maximum(x, y) + 2 * torch.minimum(x, y),
    "comparison": lambda x, y: x * (x.abs() > y),
    "other dtype": lambda x, y: (x.float() * 3).to(x.dtype) + y,
    "strided": lambda x, y: torch.cat([-x[..., 1::2], y.transpose(0, 1).transpose(0, 1)[..., ::2]], -1) + x,
    "stacked": lambda x, y: torch.stack([x, y * 2], -1).flatten(-2),
    "broadcast": lambda x, y: x[:, :1] * y[..., :1] + x[:1],
    "repeated": lambda x, y: x.repeat_interleave(2, 1)[:, ::2] + y,
    "tiled": lambda x, y: x.repeat(2, 1, 3)[0, :, :200] + y,
    "transposed copy": lambda x, y: (x.transpose(0, 1) + 1).contiguous().view(-1).view(y.shape[1], -1),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_functions_of_elements(name, dtype):
    """Within four roundings of their arguments and results."""
    x, y = random(5, 200, dtype=dtype), random(5, 200, dtype=dtype, seed=1)
    lowered, call = step(lambda position: ELEMENTWISE[name](x, y) + position.to(x.dtype) * 0)
    got, expected = call(3), ELEMENTWISE[name](x, y)
    assert got.dtype == expected.dtype and lowered.parts == 1
    close = {torch.float32: (2e-6, 1e-6), torch.bfloat16: (2**-6, 2**-7), torch.float16: (2**-9, 2**-9)}[dtype]
    if name in {"cos", "sin"} and dtype != torch.float32:
        close = 2**-6, 2**-6
    torch.testing.assert_close(got, expected, rtol=close[0] * 4, atol=close[1] * 4)


@pytest.mark.parametrize("function", [torch.exp, torch.tanh, torch.sigmoid, F.silu, F.relu])
def test_values_that_are_not_finite_stay_so(function):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 100.0, -100.0, 0.0, -0.0, 1e-30])
    _, call = step(lambda position: function(x * 1))
    torch.testing.assert_close(call(0), function(x), equal_nan=True, rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n"), [(1, 1), (7, 5), (130, 33), (1000, 64)])
@pytest.mark.parametrize("threads", [1, 2])
def test_products(dtype, m, n, threads):
    x, W, bias = (random(*shape, dtype=dtype) for shape in ((1, 1, n), (m, n), (m,)))
    across = W.t().contiguous()
    for function in (
        lambda: F.linear(x, W),
        lambda: F.linear(x, W, bias) * 2,
        lambda: torch.addmm(bias, x[0], across),
        lambda: x.view(1, n) @ W.t(),
        lambda: F.linear(x + 1, across.t(), bias),
    ):
        lowered, call = step(lambda position, f=function: f() + position.to(dtype) * 0, threads)
        assert lowered.parts == 1
        exact = [t.double() for t in (x, W, bias, across)]
        close = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-8}[dtype]
        torch.testing.assert_close(call(1), function(), rtol=close, atol=close * float(exact[0].norm() + 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_and_embeddings(dtype):
    x, weight, bias, table = (random(*shape, dtype=dtype) for shape in ((3, 130), (130,), (130,), (9, 130)))
    cases = (
        lambda p: F.layer_norm(x, (130,), weight, bias, 1e-5),
        lambda p: F.layer_norm(x * 5, (130,)),
        lambda p: weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(dtype),
        lambda p: F.embedding(p + 2, table) * 3,
    )
    for function in cases:
        lowered, call = step(function)
        assert lowered.parts == 1
        close = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-8}[dtype]
        torch.testing.assert_close(call(4), function(torch.tensor([[4]])), rtol=close, atol=close)
    _, call = step(cases[-1])
    assert call(7).isnan().all()  # no such row


def test_what_has_no_kernel_is_left_to_torch():
    x = random(6, 6, dtype=torch.float64)

    def function(position):
        return torch.sort(x.float() * 2 + position, dim=-1).values.cumsum(0) + 1

    lowered, call = step(function)
    assert lowered.parts == 5
    for position in (0, 5):
        torch.testing.assert_close(call(position), function(torch.tensor([[position]])))


@pytest.mark.parametrize("architecture", sorted(CAPTURED))
@pytest.mark.parametrize("method", ["dense", "lrq"])
def test_a_step_is_one_program(architecture, method, monkeypatch):
    parts = []
    own = Native.__init__
    monkeypatch.setattr(native.Native, "__init__", lambda self, *a: (own(self, *a), parts.append(self.parts))[0])
    both(variant(architecture, method), tokens(1, 6))
    assert max(parts) == 1 if architecture != "gptj" else max(parts) == 5  # a gather in each layer


def test_steps_of_several_sequences_may_run_at_once():
    """Each has its own result, however they are begun, asked for and given up."""
    inputs = [torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[2]])]
    x = random(40, 300)
    lowered = Native(make_fx(lambda token, position: x @ x.T * (position + token), pre_dispatch=True)(*inputs), inputs)
    first, second, third = (lowered.bind([], 2) for _ in range(3))
    a = first(inputs[0], torch.tensor([[3]]))
    b = second(inputs[0], torch.tensor([[5]]))
    third(inputs[0], torch.tensor([[7]])).cancel()
    torch.testing.assert_close(b.result(), 5 * x @ x.T, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(a.result(), 3 * x @ x.T, rtol=1e-4, atol=1e-3)
    a.cancel()
    torch.testing.assert_close(first(inputs[0], torch.tensor([[1]])).result(), x @ x.T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("across", [False, True])
def test_dense_products_of_several_tokens(dtype, bias, across):
    """Against float64, more rows than one piece has, and more tokens than one."""
    torch.manual_seed(0)
    tokens, n, m = 5, 70, 333
    x, W, b = (torch.randn(shape).to(dtype) for shape in ((tokens, n), (n, m) if across else (m, n), (m,)))
    y = torch.empty(tokens, m, dtype=dtype)
    share = team.chunk_rows(m, n * W.element_size(), dense.COLUMNS if across else dense.ROWS)
    kind, place = KINDS[dtype], b.data_ptr() if bias else 0
    words = [kind, m, n, W.stride(0) * W.element_size(), share, W.data_ptr(), x.data_ptr(), place, y.data_ptr(), kind]
    arguments = np.array([*words, tokens], np.int64)
    kernel = dense.transposed if across else dense.linear
    team.run(team.program([team.row(kernel, arguments, -(-m // share))]))
    exact = x.double() @ (W if across else W.T).double() + (b.double() if bias else 0)
    assert ((y.double() - exact).abs() <= 4 * torch.finfo(dtype).eps * (exact.abs() + n**0.5)).all()
