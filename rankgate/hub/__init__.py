"""At home in the ecosystem: where models and texts come from, what is stored, transformers, PEFT, lm-eval."""
