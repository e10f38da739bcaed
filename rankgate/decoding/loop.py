"""The fast loop: `model.generate(..., custom_generate=rankgate.decoding.decode)`.

generate() prepares everything that is policy (logits processors, stopping criteria, defaults) and hands over; this loop
replaces only its token-by-token part, and returns the same tokens. What it saves is Python:

    prompt      the model's ordinary forward, into a cache that grows by doubling
    each token  a captured step (`capture`): a flat list of tensor operations, no modules, on a GPU one CUDA graph;
                the next one runs while Python still sees to this token

Not covered, and left to the model's own methods: steps that cannot be captured, more than 64 sequences, beams, padding
on the right, encoder-decoders, caches other than the plain dynamic one, dictionaries as results, models on several
devices. Each model that falls back says why, once. (A loop over `forward` alone would gain nothing over generate(): its
own loop is cheap, the modules are not.)
How long a capture lasts, and what it sees, is said in `steps`.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import FloatTensor, LongTensor, Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GENERATION_MODES_MAPPING

from rankgate.attention.attend import selection_of
from rankgate.decoding.batch import Batch, Text
from rankgate.decoding.begun import Begun
from rankgate.decoding.held import HeldSteps
from rankgate.decoding.positions import forget_longest_, scaled_from
from rankgate.decoding.steps import Steps, explain, failed
from rankgate.errors import RankgateError
from rankgate.ops.gpu import has_triton

SEQUENCES = 64  # at once: what kernels for a few tokens take


def decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: BaseStreamer | None = None,
    *,
    batch: Batch | None = None,
    generator: torch.Generator | None = None,
    **model_kwargs: Any,
) -> Any:
    """What generate() calls in place of its own loop; see there for the arguments. Returns what it would.

    transformers does not hand its `streamer` to a custom loop: use `fast_generate`.
    batch: read one text together with those of other threads. generator: where samples are drawn from, on the model's
    device; without it torch's global one.

    Raises RankgateError in generation modes other than greedy, sampling and beams, and for beams with a streamer.
    """
    mode = generation_config.get_generation_mode()
    method = GENERATION_MODES_MAPPING[mode]
    if method not in {"_sample", "_beam_search"}:
        raise RankgateError(f"the fast loop has no {mode.value}: call generate() without custom_generate")
    if streamer is not None and method != "_sample":
        raise RankgateError("a streamer cannot follow several beams: leave out streamer, or num_beams")
    known = batch is not None and bool(batch.captures)
    selection = selection_of(model)
    alone = len(input_ids) > 1 or selection is not None or (not known and scaled_from(model) < math.inf)
    if batch is not None and alone:
        given = model, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer
        with batch.alone():
            return decode(*given, generator=generator, **model_kwargs)
    forget_longest_(model)
    reason = unsupported(model, input_ids, generation_config, model_kwargs, known=known)
    if method != "_sample" or synced_gpus or reason is not None:
        if reason is not None:
            explain(model, reason)
        own = getattr(type(model), method)
        with contextlib.nullcontext() if batch is None else batch.alone():
            if generator is not None:
                torch.manual_seed(generator.initial_seed())
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
            if selection is not None:
                steps: Steps = HeldSteps(selection, model, input_ids, model_kwargs)
            elif batch is not None:
                steps = Text(batch, model, input_ids, model_kwargs)
            else:
                steps = Steps(model, input_ids, model_kwargs)
            input_ids = _loop(
                steps,
                input_ids,
                logits_processor,
                stopping_criteria,
                _Sampler(generator) if generation_config.do_sample else _largest,
                cast(Any, generation_config)._pad_token_tensor,
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
    choose: Callable[[Tensor], Tensor],
    padding: Tensor | None,
    streamer: BaseStreamer | None,
) -> Tensor:
    """The prompts `ids` (sequences, tokens) and what follows them; `padding` follows what ends before others do."""
    step = Begun(steps.prompt)
    unfinished = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    fills = padding is not None and len(ids) > 1 and any(hasattr(criterion, "eos_token_id") for criterion in stop)
    try:
        while True:
            scores = process(cast(LongTensor, ids), cast(FloatTensor, step.result().to(torch.float32)))
            token = choose(scores)
            if fills:
                token = torch.where(unfinished[:, None], token, cast(Tensor, padding).to(token.device))
            if not token.is_cuda:  # where others go on with it while this thread sees to what follows
                step = steps.begin(token)
            ids = torch.cat([ids, token], dim=-1)
            unfinished = unfinished & ~stop(ids, None)
            news = _News(token, unfinished)
            if token.is_cuda:  # which does one thing after the other
                step = steps.begin(token)
            token, going_on = news.read()
            if streamer is not None:
                streamer.put(token[:, 0])
            if not going_on.any():
                return ids
    finally:
        step.cancel()


def _largest(scores: Tensor) -> Tensor:
    """`argmax` of the last dimension, kept; on a CPU NumPy's, which is ten times as fast as torch's."""
    if scores.device.type == "cpu":
        return torch.from_numpy(scores.numpy().argmax(axis=-1, keepdims=True))
    return scores.argmax(dim=-1, keepdim=True)


class _Sampler:
    """Draws from scores, by a generator or the global one."""

    def __init__(self, generator: torch.Generator | None) -> None:
        self.generator = generator

    def __call__(self, scores: Tensor) -> Tensor:
        """On a GPU what torch.multinomial would draw, without its wait for the GPU to check the probabilities."""
        probabilities = torch.softmax(scores, dim=-1)
        if probabilities.device.type == "cpu":
            return torch.multinomial(probabilities, num_samples=1, generator=self.generator)
        times = torch.empty_like(probabilities).exponential_(1, generator=self.generator)
        return (probabilities / times).argmax(dim=-1, keepdim=True)


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


def _fills_left(mask: Tensor, ids: Tensor) -> bool:
    """Whether a mask says that every sequence ends with what is its own, and begins with filling if it is shorter."""
    whole = mask.shape == ids.shape and bool(((mask == 0) | (mask == 1)).all())
    return whole and bool((mask.diff(dim=1) >= 0).all()) and bool((mask[:, -1] == 1).all())


def _counts(positions: Tensor, mask: Tensor) -> bool:
    """Whether positions count the tokens of each sequence, of those that are none of its own whatever."""
    own = mask.to(torch.int64).cumsum(dim=1) - 1
    return positions.shape[1] == mask.shape[1] and bool(((positions == own) | (mask == 0)).all())


# of generate(), for one greedy text, whatever the model's own generation_config asks for
ONE_GREEDY = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False}


def fast_generate(
    model: PreTrainedModel, input_ids: Tensor, *, loop: Callable[..., Any] = decode, **kwargs: Any
) -> Any:
    """`model.generate(input_ids, **kwargs)` with the fast loop or another one, streamers included."""
    custom = functools.partial(loop, streamer=kwargs.get("streamer"))
    return cast(Any, model).generate(input_ids, custom_generate=custom, **kwargs)


def is_empty(layer: Any) -> bool:
    """Whether a layer of a cache is a plain or a windowed one without any token: ours take its place."""
    return type(layer) in {DynamicLayer, DynamicSlidingWindowLayer} and not layer.get_seq_length()


def unsupported(
    model: PreTrainedModel, input_ids: Tensor, config: GenerationConfig, kwargs: dict[str, Any], *, known: bool = False
) -> str | None:
    """Why this call is left to the model, or None. known: whether this model has been found to be supported."""
    cache = kwargs.get("past_key_values")
    given = {name for name, value in kwargs.items() if value is not None}
    positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    reasons = {
        **({} if known else _unsupported_model(model, config)),
        "an input elsewhere": input_ids.device != model.device,
        "too many sequences": input_ids.shape[0] > SEQUENCES,
        "attention to fewer keys of several sequences": input_ids.shape[0] > 1 and selection_of(model) is not None,
        "padding that is not on the left": mask is not None and not _fills_left(mask, input_ids),
        "a dictionary as result": config.return_dict_in_generate,
        "a prompt read in chunks": config.prefill_chunk_size is not None,
        "a cache other than a plain, empty, dynamic one": type(cache) is not DynamicCache
        or not cache.layers
        or not all(is_empty(layer) for layer in cache.layers)
        or cache.offloading
        or getattr(cache, "_is_user_defined", False)
        or not kwargs.get("use_cache"),
        "arguments of its own": not given
        <= {"past_key_values", "position_ids", "use_cache", "logits_to_keep", "attention_mask"},
        "positions of its own": positions is not None
        and not _counts(positions, torch.ones_like(input_ids) if mask is None else mask),
        "a step that could not be captured before": not known and failed(model, len(input_ids)),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _unsupported_model(model: PreTrainedModel, config: GenerationConfig) -> dict[str, bool]:
    own: Any = type(model)
    device, update = model.device, "_update_model_kwargs_for_generation"
    selection = selection_of(model)
    hooks = set() if selection is None else selection.hooks
    return {
        "an encoder": model.config.is_encoder_decoder,
        "a device without kernels": device.type != "cpu" and not has_triton(device),
        "several devices": any(t.device != device for t in (*model.parameters(), *model.buffers())),
        "training mode": model.training,
        "hooks on its modules": any({*m._forward_hooks, *m._forward_pre_hooks} - hooks for m in model.modules()),
        "attention to representatives of its states": selection is not None and selection.config.heads is None,
        "its own preparation of arguments": getattr(own, update) is not getattr(GenerationMixin, update)
        or not _prepares_as_usual(model),
        "positions that are scaled anew within the text": (config.max_length or math.inf) > scaled_from(model),
    }


def _prepares_as_usual(model: PreTrainedModel) -> bool:
    """Whether the model's arguments are those that generate() prepares for any: for a prompt, and for a token after.

    Phi-3 has a preparation of its own for texts that outgrow its first positions, see `scaled_from`.
    """
    kind: Any = type(model)
    own = kind.prepare_inputs_for_generation
    usual: Any = GenerationMixin.prepare_inputs_for_generation
    if own is usual:
        return True
    ids = torch.ones(1, 3, dtype=torch.int64, device=model.device)
    for first in (True, False):
        given = {"attention_mask": torch.ones_like(ids), "use_cache": True, "logits_to_keep": 1}
        cache = DynamicCache(config=model.config)
        a, b = (
            prepare(model, ids, past_key_values=cache, is_first_iteration=first, **given) for prepare in (own, usual)
        )
        if a.keys() != b.keys() or not all(_alike(a[name], b[name]) for name in a):
            return False
    return True


def _alike(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)
