"""What the docstring of `rankgate.ops` says of operators, devices, numbers of tokens and files is so."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cpu_kernels import group

from rankgate import ops
from rankgate.attention.held import as_rows
from rankgate.core import FEW
from rankgate.experts import tables_of
from rankgate.ops.gpu import attention as attention_gpu
from rankgate.ops.register import ROUTES

ROW = re.compile(
    r"^ {4}(?P<operator>[a-z_.]+) +(?P<device>CPU|CUDA) +(?P<tokens>[\d-]+) +(?P<file>ops/\S+)", re.MULTILINE
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RANGE = re.compile(r"(\d*)-(\d*)")
ROWS = [row.groupdict() for row in ROW.finditer(ops.__doc__ or "")]


def call(operator: str, device: str, tokens: int) -> Any:
    """As definitions call it; what is registered for a GPU, by itself: in Triton's interpreter where there is none."""
    registered = ROUTES[operator, device].call
    place = DEVICE if device == "CUDA" else "cpu"

    def noise(*shape: int) -> torch.Tensor:
        return torch.rand(shape, device=place) + 0.1

    x = noise(tokens, 70)
    match operator:
        case "gated":
            return registered(x, torch.eye(70, device=place)[:8].contiguous(), noise(9, 8), noise(9, 70), 0.5)
        case "quantized_linear.parts" if device == "CUDA":
            return registered(x, group(65, 70).to(place).parts)
        case "quantized_linear" | "quantized_linear.parts":
            return group(65, 70)(x)
        case "attend" | "attend_at" | "attend_held" | "attend_held_at":
            q, k, v, keys, values = (noise(1, 2, count, 8) for count in (*[tokens] * 3, 64, 64))
            held = as_rows(keys, values) if "held" in operator else [keys, values]
            cache = (attention_gpu.table(held), 0) if "at" in operator.split("_") else held
            rule = () if "held" in operator else (0, 0.0, None)
            return registered(q, k, v, *cache, torch.arange(tokens, device=place)[None], 0.3, *rule)
        case "chosen_linear" | "chosen_linear.parts":
            expert, chosen = group(65, 70).to(place), torch.zeros(tokens, dtype=torch.int64, device=place)
            tables, form = (torch.tensor([expert.table()]), 65) if device == "CPU" else tables_of([expert])
            return registered(x, tables, chosen, form)
        case "round_block":
            return registered(*(noise(8, 8) for _ in range(4)), 0, 15)
    raise ValueError(operator)


def test_every_route_is_in_the_overview_and_nothing_else():
    assert {(row["operator"], row["device"]): row["file"] for row in ROWS} == {
        key: route.module.removeprefix("rankgate.").replace(".", "/") + ".py" for key, route in ROUTES.items()
    }
    for row in ROWS:
        assert (Path(ops.__file__).parent.parent / row["file"]).is_file()
        name = f"rankgate::{row['operator']}"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, row["device"])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['operator']}-{row['device']}")
def test_kernels_compute_these_numbers_of_tokens(row: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    operator, device = row["operator"], row["device"]
    route = ROUTES[operator, device]
    module, calls = importlib.import_module(route.module), []
    function = "Attention" if operator in ("attend", "attend_held") else route.function  # of its kernels
    kernel = getattr(module, function)
    monkeypatch.setattr(module, function, lambda *given, **named: calls.append(operator) or kernel(*given, **named))
    if operator == "quantized_linear.parts" and device == "CPU":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    first, last = RANGE.fullmatch(row["tokens"]).groups()
    least, most = int(first or 1), int(last or 3 * FEW)
    for tokens in {least - 1, least, most, most + 1} - {0}:
        calls.clear()
        call(operator, device, tokens)
        assert bool(calls) == (least <= tokens and (not last or tokens <= most)), tokens
