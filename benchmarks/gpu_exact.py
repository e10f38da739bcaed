"""Exact mode on a GPU by how much of a draft is accepted: results/gpu_exact/h100.json.

    python benchmarks/gpu_exact.py [--drafts int4 lrq]

A model of the shape of Llama-3-8B with random weights in bfloat16, and drafts of random groups. What random weights
write says nothing, so acceptance is set by hand: a drafted token is accepted with the given chance, whatever the dense
model thinks of it; all else is exact mode as it is, lengths of its runs included. Milliseconds per token of 256 new
ones after a prompt of 64, the median of three; dense is the same model in our loop.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from frame import Columns, Content, Row, card, device_name, in_turn, parser, record, source, start, table
from gpu import DEVICE
from gpu_batches import METHODS, SHAPE, replaced
from gpu_decode import build
from transformers import PreTrainedModel

from rankgate.decoding import exact
from rankgate.decoding.loop import decode
from rankgate.reporting.runner import NEVER

ACCEPTANCE = (0.8, 0.9, 0.95, 0.98)
PROMPT, NEW = 64, 256


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--drafts", nargs="+", default=["int4", "lrq"], choices=[m for m in METHODS if m != "dense"])
    arguments = start(options)
    record(f"gpu_exact/{device_name()}", {"device": card(), "prompt": PROMPT, "new": NEW}, measured(arguments.drafts))


def measured(drafts: list[str]) -> Iterator[Row]:
    dense = build(SHAPE)
    yield {"draft": "none", "acceptance": None, "ms": per_token(dense, decode), "accepted": None}
    for name in drafts:
        loop = exact.Exact(replaced(METHODS[name]))
        for chance in ACCEPTANCE:
            exact._Choice.accepts = functools.partial(accepts, chance)  # type: ignore[method-assign,assignment]
            ms = per_token(dense, loop)
            yield {"draft": name, "acceptance": chance, "ms": ms, "accepted": loop.statistics.mean_accepted}
        del loop


def accepts(chance: float, *_: object) -> bool:
    return bool(torch.rand(()) < chance)


def per_token(model: PreTrainedModel, loop: Any) -> float:
    """Milliseconds."""
    ids = torch.randint(5, 250, (1, PROMPT), device=DEVICE)
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "eos_token_id": NEVER, "do_sample": False}
    call = functools.partial(model.generate, ids, custom_generate=loop, pad_token_id=0, **how)
    return 1e3 * statistics.median(in_turn({"": call}, 3, DEVICE)[""]) / NEW


COLUMNS: Columns = {
    "draft": lambda r: r["draft"],
    "acceptance": lambda r: "-" if r["acceptance"] is None else f"{r['acceptance']:.2f}",
    "accepted together": lambda r: "-" if r["accepted"] is None else f"{r['accepted']:.1f}",
    "× dense": lambda r: f"{r['dense'] / r['ms']:.2f}",
}


def section(content: Content) -> str:
    rows = content["results"]
    dense = rows[0]["ms"]
    return f"""## Exact mode on a GPU by acceptance ({content["settings"]["device"]})

A model of the shape of Llama-3-8B, random weights, bfloat16; drafted tokens are accepted with a chance set by hand.
Tokens per second against the dense model in the same loop ({dense:.2f} ms a token). {source(content)}

{table([{**r, "dense": dense} for r in rows], COLUMNS)}
"""


if __name__ == "__main__":
    main()
