"""The accounting, against sums done by hand for the tiny Llama: 2 blocks, hidden 32, MLP 48, 4 heads and 2 KV heads."""

import pytest
import torch
from conftest import VOCAB, calibrated, tiny_model, tokens

from rankgate.common.copies import twin
from rankgate.conversion.convert import convert_
from rankgate.conversion.gates import record_gates
from rankgate.conversion.reads import weight_reads
from rankgate.methods import GSIConfig, Int4Config, LRQConfig, SparseConfig, SVDConfig

WEIGHTS = 2 * (32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 48 * 32)
OTHER = 5 * 32 + VOCAB * 32 + 32  # norms, lm_head, one row of the embedding


def reads(method, dtype, lm_head=False):
    dense = tiny_model("llama", dtype)
    model = twin(dense)
    convert_(model, method, calibrated(dense, sensitivity=method.needs_sensitivity), lm_head=lm_head)
    with record_gates(model) as gates, torch.no_grad():
        model(input_ids=tokens(2, 20))
    return weight_reads(model, gates), gates


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_dense(dtype, size):
    account = weight_reads(tiny_model("llama", dtype), {})
    assert account.dense == account.converted == WEIGHTS * size
    assert account.other == OTHER * size
    assert account.bits_per_weight == 8 * size and account.weights == WEIGHTS


def test_svd_counts_both_factors_and_leaves_dense_layers_as_they_are():
    account, _ = reads(SVDConfig(rank=12), torch.float32)
    converted = 2 * (12 * 64 + 12 * 64 + 3 * 12 * 80)  # q, o, MLP; k and v (16 × 32) would not get smaller
    assert account.converted == 4 * (converted + 2 * 2 * 16 * 32)
    assert account.dense == 4 * WEIGHTS and account.other == 4 * OTHER


def test_gsi_counts_the_shared_projection_once_and_what_fired():
    account, gates = reads(GSIConfig(rank=8, eps=0.6), torch.float32)
    inputs = 2 * (32 + 32 + 32 + 48) * 8
    outputs = 2 * ((32 + 16 + 16) + 32 + (48 + 48) + 32) * 8
    sizes = [32 * 64, 32 * 32, 32 * 96, 48 * 32] * 2
    fired = sum(log.rate * size for log, size in zip(gates.values(), sizes, strict=True))
    assert account.converted == pytest.approx(4 * (inputs + outputs + fired))
    assert 0 < fired < WEIGHTS


def test_a_context_basis_counts_the_directions_it_had():
    account, gates = reads(GSIConfig(rank=8, eps=0.6, basis="context"), torch.float32)
    shapes = [(32, 64), (32, 32), (32, 96), (48, 32)] * 2
    expected = sum(log.columns * (n + m) + log.rate * n * m for log, (n, m) in zip(gates.values(), shapes, strict=True))
    assert account.converted == pytest.approx(4 * expected)
    assert all(0 < log.columns < 8 for log in gates.values())


def test_lrq_counts_what_is_stored_and_the_share_of_open_channels():
    account, gates = reads(LRQConfig(bits=4, rank=8, refine=0.3, symmetric=False), torch.float32)
    dense = tiny_model("llama")
    model = twin(dense)
    convert_(model, LRQConfig(bits=4, rank=8, refine=0.3, symmetric=False), calibrated(dense, sensitivity=True))
    shapes = [(64, 32), (32, 32), (96, 32), (32, 48)] * 2  # stacked rows × inputs
    expected = 0.0
    for (m, n), log in zip(shapes, gates.values(), strict=True):
        group = model.get_submodule(log.members[0]).group
        rank = group.low_rank.rank if group.low_rank is not None else 0
        base = m * 64 / 2 + 2 * m + m  # codes padded to 64 inputs, one scale and one zero a row
        factors = rank * (m + n) + 4 * rank
        columns = n * (-(-m // 64) * 32 + 2)  # codes padded to 64 rows, a scale
        expected += base + factors + 2 * n + 2 * m + log.rate * columns
        assert 0 < log.rate < 1
    assert account.converted == pytest.approx(expected)
    assert account.dense == 4 * WEIGHTS and account.weights == WEIGHTS and account.other == 4 * OTHER


def test_a_converted_output_embedding_counts_as_stored_outside_the_linear_layers():
    account, gates = reads(Int4Config(), torch.bfloat16, lm_head=True)
    rows = 2 * (64 + 32 + 96 + 32)
    assert account.converted == rows * (32 + 2) and not gates
    assert account.other_dense == 2 * OTHER and account.head_converted
    assert account.other == 2 * (OTHER - VOCAB * 32) + VOCAB * (64 + 2)
    assert account.model_speedup == pytest.approx((2 * WEIGHTS + 2 * OTHER) / (account.converted + account.other))


def test_sparse_counts_open_columns_and_thresholds():
    account, gates = reads(SparseConfig(keep=0.3), torch.bfloat16)
    sizes = [32 * 64, 32 * 32, 32 * 96, 48 * 32] * 2
    inputs = 2 * (32 + 32 + 32 + 48)
    fired = sum(log.rate * size for log, size in zip(gates.values(), sizes, strict=True))
    assert account.converted == pytest.approx(2 * fired + 4 * inputs)
