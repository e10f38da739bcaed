"""Tiny, randomly initialised models of every architecture that the tests cover, and a byte tokenizer for them."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # one process per core: threads beyond that wait for each other
    os.environ.setdefault("NUMBA_NUM_THREADS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's kernels on the CPU; read when Triton is imported

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from rankgate.conversion.calibration import Stats, calibrate
from rankgate.hub.opening import Opened, open_any

torch.set_num_threads(1)  # tiny models, and pytest runs one process per core
VOCAB = 260
BASE = {"vocab_size": VOCAB, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
LLAMA = {
    **BASE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CONFIGS = {
    "gpt2": GPT2Config(**BASE, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "gptj": GPTJConfig(**BASE, n_embd=32, n_layer=2, n_head=4, n_positions=128, rotary_dim=4),
    "opt": OPTConfig(
        **BASE,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=128,
    ),
    "llama": LlamaConfig(**LLAMA),
    "qwen2": Qwen2Config(**LLAMA),
    "mamba": MambaConfig(**BASE, hidden_size=32, state_size=4, num_hidden_layers=2, time_step_rank=4),
}
ARCHITECTURES = tuple(CONFIGS)


def tiny_model(architecture: str, dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
    """Random weights, large enough that layers matter, biases included. The same for every dtype but for rounding."""
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[architecture])
    config.update(changes)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and "ln_" not in name and not name.endswith(("A_log", ".D")):
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.eval()


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def calibrated(model: PreTrainedModel, *, sensitivity: bool = False) -> Stats:
    return calibrate(model, tokens(16, 32, seed=1), sensitivity=sensitivity)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(["<unk>", "<pad>", "<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.fixture(scope="session")
def prefixing(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same, which puts <s> before a text and </s> after it."""
    changed = copy.deepcopy(tokenizer)
    special = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    changed.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=special)
    return changed


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny Llama as a Hugging Face directory."""
    directory = tmp_path_factory.mktemp("tiny") / "llama"
    tiny_model("llama").save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="session")
def chat_dir(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """A tiny Llama with a chat template and 4,000 positions that never ends by itself."""
    directory = tmp_path_factory.mktemp("chatting") / "tiny-chat"
    tiny_model("llama", max_position_embeddings=4000, eos_token_id=None).save_pretrained(directory)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_dir)
    tokenizer.chat_template, tokenizer.eos_token = TEMPLATE, None
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def opened(chat_dir: Path) -> Opened:
    """That model."""
    return open_any(str(chat_dir))


@pytest.fixture(scope="module")
def address(opened: Opened) -> Iterator[str]:
    """Of a server with it."""
    from server import serving

    with serving(opened) as address:
        yield address


@pytest.fixture
def refuses(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command line, check that it exits with 2 and one line on stderr, and return that line."""
    from rankgate.cli import main

    def run(*argv: object) -> str:
        try:
            code = main([str(word) for word in argv])
        except SystemExit as exit:
            code = exit.code
        captured = capsys.readouterr()
        errors = [line for line in captured.err.splitlines() if line.startswith("rankgate: error: ")]
        assert code == 2
        assert len(errors) == 1
        assert captured.err.splitlines()[-1] == errors[0]
        assert "Traceback" not in captured.err
        return errors[0]

    return run


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command line, check that it succeeds, and return what it prints."""
    from rankgate.cli import main

    def run(*argv: object) -> str:
        assert main([str(word) for word in argv]) == 0
        return capsys.readouterr().out

    return run
