"""Train a LoRA adapter beside converted weights, and save it."""

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankgate import RankgateConfig
from rankgate.hub.adapters import adaptable

source, text, target = sys.argv[1:]
base = AutoModelForCausalLM.from_pretrained(source, quantization_config=RankgateConfig("int4"))
model = get_peft_model(base, adaptable(LoraConfig(r=4, target_modules=["q_proj", "v_proj"])))
ids = AutoTokenizer.from_pretrained(source)(text, return_tensors="pt").input_ids
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for step in range(5):
    (loss := model(input_ids=ids, labels=ids).loss).backward()
    optimizer.step(), optimizer.zero_grad(), print(f"step {step}: loss {loss.item():.3f}")
model.save_pretrained(target)
