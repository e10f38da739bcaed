"""Converted models in the formats of other engines: compressed-tensors, GGUF, and PEFT adapters beside them."""
