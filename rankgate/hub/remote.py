"""Asking the Hugging Face hub whether it has something, without making anybody wait when it cannot be reached."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

from rankgate.errors import RankgateError

TIMEOUT = 10  # seconds
FILES = {"model": "config.json", "dataset": "README.md"}


def require(name: str, kind: str) -> None:
    """Check that the hub, or its cache on this machine, has the "model" or "dataset" `name` ("ORG/NAME").

    One short request; raises RankgateError with one line if it fails, within 20 seconds.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import RepositoryNotFoundError

    if isinstance(try_to_load_from_cache(name, FILES[kind], repo_type=kind), str):
        return
    if constants.HF_HUB_OFFLINE:
        raise RankgateError(f"{name} is neither a path nor in the hub cache, and HF_HUB_OFFLINE is set")
    try:
        HfApi().repo_info(name, repo_type=kind, timeout=TIMEOUT)
    except RepositoryNotFoundError as error:
        raise RankgateError(f"no {kind} {name}: not a path here, and the hub does not have it (or hides it)") from error
    except Exception as error:  # every transport reports an unreachable host in its own way
        reason = type(error).__name__
        raise RankgateError(
            f"the hub is unreachable ({reason}); {name} is not a path on this machine either"
        ) from error


@contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """Ask the hub once; if it does not answer, libraries make do with their caches in the meantime, and do not wait."""
    from datasets import config
    from huggingface_hub import constants, get_session

    with ExitStack() as stack:
        try:
            get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
        except Exception:  # every transport reports an unreachable host in its own way
            for module in (constants, config):
                stack.enter_context(patch.object(module, "HF_HUB_OFFLINE", True))
        yield
