"""The accounting, against sums done by hand for the tiny Llama: 2 blocks, hidden 32, MLP 48, 4 heads and 2 KV heads."""

import pytest
import torch
from conftest import VOCAB, calibrated, tiny_model, tokens

from rankgate.convert import convert_, twin
from rankgate.gates import record_gates
from rankgate.methods import GSIConfig, SVDConfig
from rankgate.reads import weight_reads

WEIGHTS = 2 * (32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 48 * 32)
OTHER = 5 * 32 + VOCAB * 32 + 32  # norms, lm_head, one row of the embedding


def reads(method, dtype):
    dense = tiny_model("llama", dtype)
    model = twin(dense)
    convert_(model, method, calibrated(dense))
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
