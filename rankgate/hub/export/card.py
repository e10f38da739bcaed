"""The model card of an export: where it comes from, what it is, and how to run it."""

from __future__ import annotations

from collections import Counter
from importlib.metadata import version

from rankgate.hub.checkpoint import Checkpoint
from rankgate.hub.export.members import Member

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has room for
COMPRESSED = """vLLM and SGLang open this directory as it is, transformers with the package compressed-tensors:

```
vllm serve {name}
```
"""
ADAPTER = """
The low-rank part is an adapter beside it:

```
vllm serve {name} --enable-lora --lora-modules corrected={adapter} --max-lora-rank {rank}
```
"""


def text(checkpoint: Checkpoint, found: list[Member], command: str, name: str, adapter: str | None, rank: int) -> str:
    """README.md of a directory called `name`."""
    origin = checkpoint.provenance
    base = origin.source if origin else "unknown"
    kinds = Counter((member.base.bits, member.base.zero is None) for member in found if not member.head)
    lines = [
        f"- {count} linear layers with {bits} bits{'' if sym else ' and zeros'}, groups of 64"
        for (bits, sym), count in kinds.items()
    ]
    if origin and origin.calibration_text:
        lines.append(f"- calibrated on {origin.calibration_tokens:,} tokens of {origin.calibration_text}")
    lines.append(f"- method `{checkpoint.method.record()}`")
    room = next((room for room in LORA_RANKS if room >= rank), rank)
    return f"""---
base_model: {base}
base_model_relation: quantized
library_name: transformers
pipeline_tag: text-generation
tags: [rankgate, compressed-tensors]
---

# {name}

{base}, converted by rankgate {version("rankgate")}:

{chr(10).join(lines)}

Written by `{command}`; `rankgate evaluate` compares the directory that this was exported from with the dense model.

{COMPRESSED.format(name=name)}{ADAPTER.format(name=name, adapter=adapter, rank=room) if adapter else ""}"""
