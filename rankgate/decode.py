"""The fast loop for one sequence: `model.generate(..., custom_generate=rankgate.decode.decode)`.

generate() prepares everything that is policy (logits processors, stopping criteria, defaults) and hands over; this loop
replaces only its token-by-token part, and returns the same tokens. What it saves is Python:

    prompt      the model's ordinary forward, into a cache that grows by doubling
    each token  a captured step (`rankgate.capture`): a flat list of tensor operations, no modules; on a GPU one CUDA
                graph, and the next token's is launched before this one's is known to the CPU

Not covered, and left to the model's own methods: steps that cannot be captured, batches, beams, padding,
encoder-decoders, caches other than the plain dynamic one, dictionaries as results, models on several devices. Each
model that falls back says why, once. (A loop over `forward` alone would gain nothing over generate(): its own loop is
cheap, the modules are not.)
A capture is made on the first call and kept with the model. It sees weights that change in place, and is made again
when modules or parameters were replaced; a Python number that a module keeps (an ε, a flag) is frozen in it.
"""

from __future__ import annotations

import functools
import logging
import time
import warnings
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import FloatTensor, LongTensor, Tensor, nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache, DynamicLayer
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GENERATION_MODES_MAPPING

from rankgate.capture import Capture, CountedLayer, Step, Uncapturable
from rankgate.errors import RankgateError
from rankgate.ops import has_triton

CAPACITY = 256  # tokens that a new cache has room for
TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-6}  # of a capture's first logits, as a share of the largest
HALF_TOLERANCE = 0.1  # the same in other dtypes
log = logging.getLogger(__name__)


class GrowingLayer(CountedLayer):
    """Keys and values (1, heads, capacity, width) of one layer, of which the first `length` are filled."""

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
            capacity = max(CAPACITY, 1 << (length - 1).bit_length())
            self.keys, self.values = (self._moved(old, capacity) for old in (self.keys, self.values))

    def _moved(self, old: Tensor, capacity: int) -> Tensor:
        new = old.new_zeros((*old.shape[:2], capacity, old.shape[3]))
        new[:, :, : old.shape[2]] = old
        return new

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[2]
        self.reserve(self.length)
        assert self.keys is not None and self.values is not None
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


def decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> Any:
    """What generate() calls in place of its own loop; see there for the arguments. Returns what it would.

    transformers does not hand its `streamer` to a custom loop: use `fast_generate`.

    Raises RankgateError in generation modes other than greedy, sampling and beams, and for beams with a streamer.
    """
    mode = generation_config.get_generation_mode()
    method = GENERATION_MODES_MAPPING[mode]
    if method not in {"_sample", "_beam_search"}:
        raise RankgateError(f"the fast loop has no {mode.value}: call generate() without custom_generate")
    if streamer is not None and method != "_sample":
        raise RankgateError("a streamer cannot follow several beams: leave out streamer, or num_beams")
    reason = unsupported(model, input_ids, generation_config, model_kwargs)
    if method != "_sample" or synced_gpus or reason is not None:
        if reason is not None:
            _explain(model, reason)
        own = getattr(type(model), method)
        return own(
            model,
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **model_kwargs,
        )
    threads = torch.get_num_threads()
    try:
        with torch.no_grad():
            input_ids = _loop(
                Steps(model, input_ids, model_kwargs),
                input_ids,
                logits_processor,
                stopping_criteria,
                bool(generation_config.do_sample),
                streamer,
            )
    finally:
        torch.set_num_threads(threads)
    if streamer is not None:
        streamer.end()
    return input_ids


def _loop(
    steps: Steps,
    ids: Tensor,
    process: LogitsProcessorList,
    stop: StoppingCriteriaList,
    sample: bool,
    streamer: BaseStreamer | None,
) -> Tensor:
    """The prompt `ids` (1, tokens) and what follows it."""
    logits: Tensor | None = steps.prompt()
    while True:
        logits = steps.next(ids[:, -1:]) if logits is None else logits
        scores = process(cast(LongTensor, ids), cast(FloatTensor, logits.to(torch.float32, copy=True)))
        token = _sample(torch.softmax(scores, dim=-1)) if sample else scores.argmax(dim=-1, keepdim=True)
        ids = torch.cat([ids, token], dim=-1)
        news = _News(token, stop(ids, None))
        logits = steps.next(token) if steps.ahead else None
        token, done = news.read()
        if streamer is not None:
            streamer.put(token[0])
        if bool(done.all()):
            return ids


def _sample(probabilities: Tensor) -> Tensor:
    """What torch.multinomial draws for one sample, without its wait for the GPU to check the probabilities."""
    if probabilities.device.type == "cpu":
        return torch.multinomial(probabilities, num_samples=1)
    return (probabilities / torch.empty_like(probabilities).exponential_(1)).argmax(dim=-1, keepdim=True)


class _News:
    """Tensors on their way to the CPU, while the device goes on."""

    def __init__(self, *tensors: Tensor) -> None:
        self.event = torch.cuda.Event() if tensors[0].is_cuda else None
        self.tensors = [t.to("cpu", non_blocking=True) for t in tensors]
        if self.event is not None:
            self.event.record()

    def read(self) -> list[Tensor]:
        if self.event is not None:
            self.event.synchronize()
        return self.tensors


def fast_generate(
    model: PreTrainedModel, input_ids: Tensor, *, loop: Callable[..., Any] = decode, **kwargs: Any
) -> Any:
    """`model.generate(input_ids, **kwargs)` with the fast loop or another one, streamers included."""
    custom = functools.partial(loop, streamer=kwargs.get("streamer"))
    return cast(Any, model).generate(input_ids, custom_generate=custom, **kwargs)


def unsupported(
    model: PreTrainedModel, input_ids: Tensor, config: GenerationConfig, kwargs: dict[str, Any]
) -> str | None:
    """Why this call is left to the model, or None."""
    cache = kwargs.get("past_key_values")
    given = {name for name, value in kwargs.items() if value is not None}
    positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    own = {"prepare_inputs_for_generation", "_update_model_kwargs_for_generation"}
    reasons = {
        "more than one sequence": input_ids.shape[0] != 1,
        "padding": mask is not None and (mask.shape != input_ids.shape or not bool((mask == 1).all())),
        "an encoder": model.config.is_encoder_decoder,
        "a device without kernels": model.device.type != "cpu" and not has_triton(model.device),
        "several devices": any(t.device != model.device for t in (*model.parameters(), *model.buffers(), input_ids)),
        "training mode": model.training,
        "a dictionary as result": config.return_dict_in_generate,
        "a prompt read in chunks": config.prefill_chunk_size is not None,
        "a cache other than a plain, empty, dynamic one": type(cache) is not DynamicCache
        or not cache.layers
        or any(type(layer) is not DynamicLayer or layer.get_seq_length() for layer in cache.layers)
        or cache.offloading
        or getattr(cache, "_is_user_defined", False)
        or not kwargs.get("use_cache"),
        "arguments of its own": not given
        <= {"past_key_values", "position_ids", "use_cache", "logits_to_keep", "attention_mask"},
        "positions of its own": positions is not None
        and not torch.equal(positions, torch.arange(input_ids.shape[1], device=positions.device)[None]),
        "a step that could not be captured before": _failed(model),
        "hooks on its modules": any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()),
        "its own preparation of arguments": any(
            getattr(type(model), name) is not getattr(GenerationMixin, name) for name in own
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


_explained: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_captures: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Capture | None]] = weakref.WeakKeyDictionary()


def _explain(model: nn.Module, reason: str) -> None:
    """Warn, once per model."""
    if model not in _explained:
        _explained.add(model)
        warnings.warn(f"{type(model).__name__} generates without the fast path: {reason}", stacklevel=2)


def _fingerprint(model: nn.Module) -> Any:
    """Equal as long as a capture of the model holds: the same modules, with the same tensors of the same dtypes."""
    modules = [(weakref.ref(m), id(vars(m).get("forward"))) for m in model.modules()]
    tensors = [
        (id(t), t.dtype)
        for m in model.modules()
        for t in (*m._parameters.values(), *m._buffers.values())
        if t is not None
    ]
    return modules, tensors


def _failed(model: nn.Module) -> bool:
    key, capture = _captures.get(model, (None, None))
    return key is not None and capture is None and bool(key[0] == _fingerprint(model))


class Steps:
    """The prompt, then one token after the other, of one sequence: logits (1, vocabulary) each."""

    def __init__(self, model: PreTrainedModel, input_ids: Tensor, kwargs: dict[str, Any]) -> None:
        self.model = model
        self.layers = [GrowingLayer() for _ in kwargs["past_key_values"].layers]
        kwargs = {**kwargs, "past_key_values": Cache(layers=list(self.layers)), "attention_mask": None}
        self.inputs = cast(Any, model).prepare_inputs_for_generation(input_ids, is_first_iteration=True, **kwargs)
        self.inputs["return_dict"] = True
        self.length = input_ids.shape[1]  # tokens in the cache after the current call
        self.position = torch.tensor([[self.length - 1]], device=input_ids.device)
        self.decided = False  # between capture and forward
        self.capture: Capture | None = None
        self.step: Step | None = None
        self.capacity = 0  # of the cache that `step` was bound to

    @property
    def ahead(self) -> bool:
        """Whether steps return before they are through, so that one may be begun that turns out not to be needed."""
        return self.capture is not None and self.position.is_cuda

    def prompt(self) -> Tensor:
        """Logits after the prompt."""
        logits = self._forward(self.inputs["input_ids"])
        if self.inputs.get("position_ids") is not None:
            self.inputs["position_ids"] = self.position
        return logits

    def next(self, token: Tensor) -> Tensor:
        """Logits after one more token (1, 1)."""
        self.position += 1
        self.length += 1
        if not self.decided:
            self.decided = True
            options = {
                k: v for k, v in self.inputs.items() if k not in {"input_ids", "past_key_values", "position_ids"}
            }
            key = _fingerprint(self.model), options
            known = _captures.get(self.model)
            if known is None or known[0] != key:
                logits = self._forward(token)
                self.capture = self._checked(token, logits)
                _captures[self.model] = key, self.capture
                return logits
            self.capture = known[1]
        return self._forward(token) if self.capture is None else self._replay(token, self.capture)

    def read(self, ids: Tensor) -> None:
        """Several more tokens (1, tokens) at once, by the model's own forward."""
        for layer in self.layers:
            layer.length = self.length
        start, self.length = self.length, self.length + ids.shape[1]
        place = {}
        if self.inputs.get("position_ids") is not None:
            place["position_ids"] = torch.arange(start, self.length, device=ids.device)[None]
        self.model(**{**self.inputs, **place, "input_ids": ids})
        self.position.fill_(self.length - 1)

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self.length = length
        self.position.fill_(length - 1)
        for layer in self.layers:
            layer.length = length

    def _forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(**{**self.inputs, "input_ids": ids}).logits[:, -1]
        return logits

    def _replay(self, token: Tensor, capture: Capture) -> Tensor:
        if self.step is None or self.length > self.capacity:
            for layer in self.layers:
                layer.length = self.length - 1
                layer.reserve(self.length)
            buffers = self._buffers()
            self.step, self.capacity = capture.bind(buffers), buffers[0].shape[2]
        if capture.threaded:  # their threads and torch's, which wait by spinning, would share the cores
            torch.set_num_threads(1)
        with torch.inference_mode():
            return self.step(token, self.position)

    def _buffers(self) -> list[Tensor]:
        pairs = [(layer.keys, layer.values) for layer in self.layers]
        return [buffer for pair in pairs for buffer in pair if buffer is not None]

    def _checked(self, token: Tensor, expected: Tensor) -> Capture | None:
        """A capture that gave the expected logits for a token that is in the cache already; None if there is none."""
        start = time.perf_counter()
        try:
            buffers = [buffer.clone() for buffer in self._buffers()]
            capture = Capture(self.model, self.inputs, [buffer.shape for buffer in buffers])
            error = (capture(token, self.position, buffers) - expected).abs().max() / expected.abs().max()
            if not error <= TOLERANCE.get(expected.dtype, HALF_TOLERANCE):
                raise Uncapturable(f"the captured step is off by {float(error):.1e}")
        except Exception as error:  # a trace can fail in any way that the model's code can
            _explain(self.model, str(error).partition("\n")[0])
            return None
        log.info("captured a step of %s in %.1f s", type(self.model).__name__, time.perf_counter() - start)
        return capture
