"""Block shapes of Triton kernels, chosen by measuring on the GPU that is there. The choice is kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton


def tuned(configs: list[triton.Config], key: list[str], fitting: Callable[..., list[triton.Config]]) -> Any:
    """Decorate a kernel: for every new value of the arguments in `key`, the fastest of `configs` is found.

    fitting: which of them are possible at all, see `triton.autotune`. Triton's interpreter takes the last one.
    """
    if triton.knobs.runtime.interpret:
        return triton.autotune(configs[-1:], key)
    return triton.autotune(configs, key, prune_configs_by={"early_config_prune": fitting}, cache_results=True)
