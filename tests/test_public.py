"""What `import rankgate` offers. A public function must not be shadowed by a module of its name once that is loaded."""

import importlib
import pkgutil
import subprocess
import sys
import types

import pytest

import rankgate


def test_public_names_are_not_modules_even_when_everything_is_loaded():
    for module in pkgutil.walk_packages(rankgate.__path__, "rankgate."):
        if module.name != "rankgate.hub.vllm":  # needs vLLM
            importlib.import_module(module.name)
    for name in rankgate.__all__:
        assert not isinstance(getattr(rankgate, name), types.ModuleType), name
        assert getattr(rankgate, name).__doc__, name


@pytest.mark.parametrize("module", ["core", "quantized", "ops", "hub.config", "hub.loading"])
def test_any_module_may_be_the_first(module):
    """Hooks import more while a module is imported: kernels, the quantizer of transformers."""
    code = (
        f"import rankgate.{module}, rankgate.core, torch, transformers.quantizers.auto as auto; "
        "assert torch._C._dispatch_has_kernel_for_dispatch_key('rankgate::gated', 'CUDA'); "
        "assert 'rankgate' in auto.AUTO_QUANTIZER_MAPPING"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_former_paths_lead_on():
    from rankgate.moved import MOVED

    for former, now in MOVED.items():
        with pytest.warns(DeprecationWarning, match=now):
            assert importlib.import_module(former) is importlib.import_module(now)
