"""What `import rankgate` offers. A public function must not be shadowed by a module of its name once that is loaded."""

import importlib
import pkgutil
import types

import rankgate


def test_public_names_are_not_modules_even_when_everything_is_loaded():
    for module in pkgutil.walk_packages(rankgate.__path__, "rankgate."):
        importlib.import_module(module.name)
    for name in rankgate.__all__:
        assert not isinstance(getattr(rankgate, name), types.ModuleType), name
        assert getattr(rankgate, name).__doc__, name
