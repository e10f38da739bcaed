"""One sequence or several, token by token, by captured steps (`capture`), and their cache, which grows by doubling.

Several sequences are read as one prompt, filled up from the left. When there is a capture the filling is taken out of
the cache: from then on every sequence has positions of its own, as if it were alone.

A capture is made on the first call and kept with the model. It sees weights that change in place. It is made again
when anything else has changed that `forward` depends on: modules, parameters, hooks, settings (see `_fingerprint`).
Where a step cannot be captured the model's own forward is called, and says why, once.
"""

from __future__ import annotations

import copy
import logging
import time
import warnings
import weakref
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from rankgate.attention.cache import CountedLayer
from rankgate.decoding.begun import Begun, Step
from rankgate.decoding.capture import Capture, Uncapturable
from rankgate.ops.cpu import team

CAPACITY = 256  # tokens that a new cache has room for
TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-6}  # of a capture's first logits, as a share of the largest
HALF_TOLERANCE = 0.1  # the same in other dtypes
# attributes of modules that are compared by themselves, or are only memory
MODULE_PARTS = {*vars(nn.Module()), "_memos", "_traced", "_described"} - {"training"}
Shape = tuple[int, ...]  # of the tokens that a step reads: sequences × tokens
log = logging.getLogger(__name__)


def room(length: int) -> int:
    """The capacity of a cache that grows by doubling, for so many tokens."""
    return max(CAPACITY, 1 << (length - 1).bit_length())


class GrowingLayer(CountedLayer):
    """Keys and values (sequences, heads, capacity, width) of one layer, of which the first `length` are filled."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def reserve(self, length: int) -> None:
        """Have room for `length` tokens."""
        assert self.keys is not None and self.values is not None
        capacity = self.keys.shape[2]
        if length > capacity:
            capacity = room(length)
            self.keys, self.values = (self._moved(old, capacity) for old in (self.keys, self.values))

    def _moved(self, old: Tensor, capacity: int) -> Tensor:
        new = old.new_zeros((*old.shape[:2], capacity, old.shape[3]))
        new[:, :, : old.shape[2]] = old
        return new

    def shift(self, counts: list[int]) -> None:
        """Leave out so many tokens at the beginning of each sequence."""
        assert self.keys is not None and self.values is not None
        for buffer in (self.keys, self.values):
            for sequence, count in zip(buffer, counts, strict=True):
                if count:
                    sequence.copy_(sequence.roll(-count, dims=1))

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[2]
        self.reserve(self.length)
        assert self.keys is not None and self.values is not None
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


def _buffers(layers: list[GrowingLayer]) -> list[Tensor]:
    """Keys and values, alternating."""
    return [buffer for layer in layers for buffer in (layer.keys, layer.values) if buffer is not None]


def _shift(layers: list[GrowingLayer], counts: list[int]) -> None:
    for layer in layers:
        layer.shift(counts)


_explained: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_captures: weakref.WeakKeyDictionary[nn.Module, tuple[Any, dict[Shape, Capture | None]]] = weakref.WeakKeyDictionary()


def explain(model: nn.Module, reason: str) -> None:
    """Warn, once per model."""
    if model not in _explained:
        _explained.add(model)
        warnings.warn(f"{type(model).__name__} generates without the fast path: {reason}", stacklevel=2)


def captured(model: nn.Module, tokens: int = 1, sequences: int = 1) -> Capture | None:
    """The capture of `model` for so many tokens at once of so many sequences, if there is one."""
    return _captures.get(model, (None, {}))[1].get((sequences, tokens))


def failed(model: nn.Module, sequences: int) -> bool:
    """Whether a step of the model as it is now was tried, and could not be captured."""
    key, captures = _captures.get(model, (None, {}))
    shape = sequences, 1
    return shape in captures and captures[shape] is None and bool(key[0] == _fingerprint(model))


def _fingerprint(model: nn.Module) -> Any:
    """Equal as long as a capture of the model holds: all that `forward` can depend on, but for values in tensors.

    That is the same modules, with the same tensors of the same dtypes at the same addresses, the same hooks, and the
    same settings: whatever plain values modules and configurations have as attributes (which adapter is active, its
    scale, a window, an ε, training or not).
    """
    modules = list(model.modules())
    tensors = [
        (id(t), t.dtype, t.data_ptr())
        for m in modules
        for t in (*m._parameters.values(), *m._buffers.values())
        if t is not None
    ]
    hooks = [(*m._forward_hooks, *m._forward_pre_hooks) for m in modules]  # their numbers are given once
    configs = {id(m.config): m.config for m in modules if isinstance(m, PreTrainedModel)}
    settings = [_plain(vars(thing)) for thing in (*modules, *configs.values())]
    return [(weakref.ref(m), id(vars(m).get("forward"))) for m in modules], tensors, hooks, settings


def _plain(value: Any) -> Any:
    """What is plain of a value, in a form that can be compared; None for all else."""
    if value is None or isinstance(value, str | bool | int | float | torch.dtype):
        return value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if key not in MODULE_PARTS}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return frozenset(value) if isinstance(value, set) and all(isinstance(item, str) for item in value) else None


class Steps:
    """The prompts (sequences, tokens), and then more of them; to be used without gradients.

    What reads several tokens at once is for one sequence only.
    """

    def __init__(self, model: PreTrainedModel, input_ids: Tensor, kwargs: dict[str, Any]) -> None:
        self.model = model
        cache = self._cache(len(kwargs["past_key_values"].layers))
        mask = kwargs.get("attention_mask")
        self.filling = [0] * len(input_ids)  # tokens of each sequence in the cache that are none of its own
        if mask is not None:
            self.filling = (mask == 0).sum(dim=1).tolist()
            mask = mask if any(self.filling) else None
        kwargs = {**kwargs, "past_key_values": cache, "attention_mask": mask}
        self.inputs = cast(Any, model).prepare_inputs_for_generation(input_ids, is_first_iteration=True, **kwargs)
        self.inputs["return_dict"] = True
        self.length = input_ids.shape[1]  # tokens in the cache after the current call
        own = [[self.length - 1 - count] for count in self.filling]
        self.position = torch.tensor(own, device=input_ids.device)  # of the last token of each sequence
        self.captures: dict[Shape, Capture | None] = {}  # the model's, once they are known
        self.steps: dict[Shape, Step] = {}  # those of them that are bound to the cache of this capacity:
        self.capacity = 0
        self.threads = 1 if input_ids.is_cuda else team.size()

    def _cache(self, layers: int) -> Cache:
        """What the model's own forward leaves, for so many layers."""
        self.layers = [GrowingLayer() for _ in range(layers)]
        return Cache(layers=list(self.layers))

    def prompt(self) -> Tensor:
        """Logits (sequences, vocabulary) after the prompts."""
        logits: Tensor = self.model(**self.inputs).logits[:, -1]
        return logits

    def next(self, token: Tensor) -> Tensor:
        """Logits (sequences, vocabulary) after one more token of each (sequences, 1)."""
        self.position += 1
        return self._read(token, 1, self.position)

    def begin(self, token: Tensor) -> Begun:
        """The same, to be waited for, and gone with the next step. What is not captured begins with the waiting."""
        capture = self.captures.get(token.shape)
        if capture is None:
            return Begun(lambda: self.next(token))
        self.position += 1
        self.length += 1
        return self._replay(token, 1, self.position, capture)

    def read(self, ids: Tensor) -> Tensor:
        """Logits (tokens, vocabulary) after each of several more tokens (1, tokens), by the model's own forward."""
        self.length += ids.shape[1]
        self.position += ids.shape[1]
        return self._forward(ids)

    def read_captured(self, ids: Tensor, size: int) -> Tensor:
        """The same by a captured step over `size` tokens, of which the last ones may be there for nothing."""
        count = ids.shape[1]
        positions = self.position + torch.arange(1, size + 1, device=ids.device)
        self.position += count
        filled = torch.cat([ids, ids[:, -1:].expand(1, size - count)], dim=1)
        return self._read(filled, count, positions)[:count]

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self.length = length
        self.position.fill_(length - 1)

    def _read(self, ids: Tensor, count: int, positions: Tensor) -> Tensor:
        """Logits after each of `ids`, the first `count` of which belong to the text, at their `positions`."""
        self.length += count
        if ids.shape not in self.captures:
            self.captures = self._known()
        if ids.shape not in self.captures:
            logits = self._forward(ids[:, :count])
            self.captures[ids.shape] = self._checked(ids, positions, logits)
            return logits
        capture = self.captures[ids.shape]
        if capture is None:
            return self._forward(ids[:, :count])
        return self._replay(ids, count, positions, capture).result().clone()

    def _known(self) -> dict[Shape, Capture | None]:
        """The captures of the model as it is now."""
        key = _fingerprint(self.model), self._options(1)
        if self.model not in _captures or _captures[self.model][0] != key:
            _captures[self.model] = key, {}
        return _captures[self.model][1]

    def _options(self, tokens: int) -> dict[str, Any]:
        """Keyword arguments of `forward` for so many tokens at once."""
        own = {"input_ids", "past_key_values", "position_ids", "attention_mask"}
        options = {k: v for k, v in self.inputs.items() if k not in own}
        return options if tokens == 1 or "logits_to_keep" not in options else {**options, "logits_to_keep": 0}

    def _forward(self, ids: Tensor) -> Tensor:
        """Logits after each of `ids`, which end the texts; by the model's own forward."""
        start = self.length - ids.shape[1]
        self._rewound(start)
        given = self._options(ids.shape[1])
        filling = torch.tensor(self.filling, device=ids.device)[:, None]
        if self.inputs.get("position_ids") is not None:
            given["position_ids"] = torch.arange(start, self.length, device=ids.device) - filling
        if any(self.filling):
            given["attention_mask"] = (torch.arange(self.length, device=ids.device) >= filling).long()
        cache = self.inputs["past_key_values"]
        logits: Tensor = self.model(input_ids=ids, past_key_values=cache, **given).logits.flatten(0, 1)
        return logits

    def _rewound(self, start: int) -> None:
        """Have the model's own forward begin after so many tokens."""
        self._reserved(self.length)
        for layer in self.layers:
            layer.length = start

    def _replay(self, ids: Tensor, count: int, positions: Tensor, capture: Capture) -> Begun:
        end = self.length - count + ids.shape[1]
        if end > self.capacity or ids.shape not in self.steps:
            buffers = self._reserved(end)
            _shift(self.layers, self.filling)
            self.filling = [0] * len(ids)
            self.steps[ids.shape] = capture.bind(buffers, self.threads)
            if not self.position.is_cuda:  # our threads and torch's, which wait by spinning, would share the cores
                torch.set_num_threads(1)
        return self.steps[ids.shape](ids, positions)

    def _reserved(self, length: int) -> list[Tensor]:
        """Keys and values of every layer, alternating, with room for `length` tokens; the prompt has been read."""
        if length > self.capacity:
            for layer in self.layers:
                layer.reserve(length)
            self.steps.clear()
        buffers = _buffers(self.layers)
        self.capacity = buffers[0].shape[2]
        return buffers

    def _copies(self, length: int) -> list[Tensor]:
        """Buffers with room for so many tokens, for a trial."""
        self._reserved(length)
        copies = copy.deepcopy(self.layers)
        _shift(copies, self.filling)
        return _buffers(copies)

    def _checked(self, ids: Tensor, positions: Tensor, expected: Tensor) -> Capture | None:
        """A capture that gave the expected logits for tokens that are in the cache already; None if there is none."""
        start, count = time.perf_counter(), len(expected)
        try:
            buffers = self._copies(self.length - count // len(ids) + ids.shape[1])
            shapes = [buffer.shape for buffer in buffers]
            options = {"position_ids": self.inputs.get("position_ids"), **self._options(ids.shape[1])}
            capture = Capture(self.model, options, shapes, ids.shape[1])
            got = capture(ids, positions, buffers)[:count]
            error = (got - expected).abs().max() / expected.abs().max()
            if not error <= TOLERANCE.get(expected.dtype, HALF_TOLERANCE):
                raise Uncapturable(f"the captured step is off by {float(error):.1e}")
        except Exception as error:  # a trace can fail in any way that the model's code can
            explain(self.model, str(error).partition("\n")[0])
            return None
        log.info("captured a step of %s in %.1f s", type(self.model).__name__, time.perf_counter() - start)
        return capture
