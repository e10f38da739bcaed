"""The model card of an export: where it comes from, what it is, and how to run it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

from rankgate.hub.checkpoint import Checkpoint

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


def text(
    checkpoint: Checkpoint, types: Mapping[str, int], command: str, name: str, adapter: tuple[str, int] | None
) -> str:
    """README.md of a directory called `name`; types: layers by how they are written; adapter: its name and rank."""
    origin = checkpoint.provenance
    base = origin.source if origin else "unknown"
    lines = [f"- {count} layers as {kind}" for kind, count in types.items()]
    if origin and origin.calibration_text:
        lines.append(f"- calibrated on {origin.calibration_tokens:,} tokens of {origin.calibration_text}")
    lines.append(f"- method `{checkpoint.method.record()}`")
    beside = ""
    if adapter is not None:
        rank = next((room for room in LORA_RANKS if room >= adapter[1]), adapter[1])
        beside = ADAPTER.format(name=name, adapter=adapter[0], rank=rank)
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

{COMPRESSED.format(name=name)}{beside}"""
