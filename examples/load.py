"""Convert while loading, save, load again."""

import sys

from transformers import AutoModelForCausalLM

from rankgate import RankgateConfig

source, target = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, quantization_config=RankgateConfig("int8"))
model.save_pretrained(target)
again = AutoModelForCausalLM.from_pretrained(target)
print(f"{sum(p.nbytes for p in again.parameters()) / 1e6:.1f} MB in {target}")
