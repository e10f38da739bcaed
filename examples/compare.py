"""What does each method cost in quality, and how many bits does it read?"""

import sys

from rankgate import GSIConfig, Int8Config, LRQConfig, calibrate, convert_, evaluate, open_dense, twin

dense = open_dense(sys.argv[1])
stats = calibrate(dense.model, dense.windows("pydoc:calibration", tokens=1024, context=128), sensitivity=True)
text = dense.windows("pydoc:held-out", tokens=512, context=128)
for method in (Int8Config(), LRQConfig(rank=8), GSIConfig(rank=0.25, eps=0.05)):
    model = twin(dense.model)
    convert_(model, method, stats)
    result = evaluate(dense.model, model, text)
    print(f"{method.name}: perplexity x {result.ppl_ratio:.3f}, {result.reads.bits_per_weight:.1f} bits per weight")
