"""Runs of a model layer by layer: all texts through one decoder layer before the next, so that each is read once.

Of the calls of a forward pass only that of one layer is carried out, on the hidden states kept from the one before it;
the other layers hand on what they are given. So masks, positions and everything else around the layers stay the
model's own, and what is kept is the hidden states (tokens × width). Gradients go the same way back: each layer is run
once more, from what it read, and what its backward pass keeps is gone before the next.

A model takes part if that gives the same last hidden states, bit for bit, on a few tokens. Any other one (layers that
hand on more than hidden states, or that share modules) is run as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankgate.common.passes import backward_from_sampled_labels, evaluation_mode
from rankgate.common.progress import track

Run = Callable[[Tensor], Tensor]  # a layer, from hidden states to hidden states
Act = Callable[[int, Tensor, Run], Tensor]  # what layer i returns for x


@dataclass(frozen=True)
class Walk:
    """A model and its decoder layers in order, by name; none if it can only be run as a whole.

    outputs: length of the tuple that a layer returns, 0 for the hidden states alone.
    """

    model: PreTrainedModel
    layers: Sequence[tuple[str, nn.Module]]
    outputs: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Walk:
        """The walk through the longest list of modules that can be walked through. Runs the model on a few tokens."""
        ids = torch.arange(1, 5, device=model.device)[None]
        lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        name, layers = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()), default=("", []))
        found: list[Any] = []
        try:
            with torch.no_grad(), evaluation_mode(model):
                handle = layers[0].register_forward_hook(lambda _, args, y: found.append(y))
                try:
                    expected = model.base_model(input_ids=ids, use_cache=False)[0]
                finally:
                    handle.remove()
                outputs = len(found[0]) if isinstance(found[0], tuple) else 0
                walk = cls(model, [(f"{name}.{i}", layer) for i, layer in enumerate(layers)], outputs)
                hidden, got = None, expected
                for number in range(len(layers)):
                    hidden, got = walk._run(number, ids, hidden)
        except Exception:  # whatever layers, or what is around them, make of inputs that they do not expect
            return cls(model, [], 0)
        shared = len([*model.named_modules(remove_duplicate=False)]) > len([*model.modules()])
        return walk if torch.equal(got, expected) and not shared else cls(model, [], 0)

    def stages(self, groups: list[tuple[str, ...]]) -> list[list[tuple[str, ...]]]:
        """The groups whose inputs are right while each layer is run: those outside of layers with the last one."""
        found: list[list[tuple[str, ...]]] = [[] for _ in range(max(1, len(self.layers)))]
        for members in groups:
            inside = (i for i, (name, _) in enumerate(self.layers) if members[0].startswith(f"{name}."))
            found[next(inside, -1)].append(members)
        return found

    def step(self, number: int, ids: Tensor, hidden: Tensor | None) -> Tensor:
        """The hidden states after layer `number`, from those before it: None for the first layer.

        ids: (rows × tokens). Without layers the whole model is run.
        """
        return self._run(number, ids, hidden)[0]

    def backward(self, pieces: Sequence[Tensor], generator: torch.Generator, *, progress: bool = False) -> None:
        """Backpropagate the loss of every piece of text (1 × tokens): see `backward_from_sampled_labels`."""
        kept: list[list[Tensor | None]] = [[None] * len(pieces)]
        with torch.no_grad():
            for number in track(range(len(self.layers)), "reading", enabled=progress):
                kept.append([self.step(number, ids, x) for ids, x in zip(pieces, kept[-1], strict=True)])
        gradients = []
        last = kept.pop()
        for ids, x in zip(pieces, last, strict=True):
            leaf = None if x is None else x.requires_grad_()

            def act(_: int, x: Tensor, __: Run, leaf: Tensor | None = leaf) -> Tensor:
                return x if leaf is None else leaf

            with self._instead(act):
                backward_from_sampled_labels(self.model, ids, generator)
            gradients.append(None if leaf is None else leaf.grad)
        del last
        for number in track(range(len(self.layers))[::-1], "sensitivity", enabled=progress):
            inputs = kept.pop()
            for i, ids in enumerate(pieces):
                gradients[i] = self._back(number, ids, inputs[i], gradients[i])

    def _run(self, number: int, ids: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        """The hidden states after a layer, and what the model makes of them if it is the last one."""
        made: list[Tensor] = []

        def act(i: int, x: Tensor, run: Run) -> Tensor:
            if i == number:
                made.append(run(x if hidden is None else hidden))
            return made[0] if made else x

        with self._instead(act):
            y = self.model.base_model(input_ids=ids.to(self.model.device), use_cache=False)[0]
        return made[0] if self.layers else y, y

    def _back(self, number: int, ids: Tensor, hidden: Tensor | None, gradient: Tensor | None) -> Tensor | None:
        """The gradient at what layer `number` reads, from that at what it returns; on through what is before it all."""
        leaf = None if hidden is None else hidden.requires_grad_()

        def act(i: int, x: Tensor, run: Run) -> Tensor:
            if i == number:
                run(x if leaf is None else leaf).backward(gradient)
            return x.detach()

        with self._instead(act):
            self.model.base_model(input_ids=ids.to(self.model.device), use_cache=False)
        return None if leaf is None else leaf.grad

    @contextmanager
    def _instead(self, act: Act) -> Iterator[None]:
        """While open, layers return what `act` says."""

        def put(number: int, layer: nn.Module) -> None:
            own = layer.forward

            def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
                def run(hidden: Tensor) -> Tensor:
                    y: Any = own(hidden, *args, **kwargs)
                    return y[0] if self.outputs else y  # type: ignore[no-any-return]

                y = act(number, x, run)
                return (y, *[None] * (self.outputs - 1)) if self.outputs else y

            vars(layer)["forward"] = forward

        before = [vars(layer).get("forward") for _, layer in self.layers]
        try:
            for number, (_, layer) in enumerate(self.layers):
                put(number, layer)
            yield
        finally:
            for (_, layer), own in zip(self.layers, before, strict=True):
                vars(layer).pop("forward", None)
                if own is not None:
                    vars(layer)["forward"] = own


class Reading:
    """Texts (rows × tokens each) on their way through the layers of a walk."""

    def __init__(self, walk: Walk, batches: Sequence[Tensor]) -> None:
        self.walk, self.batches = walk, batches
        hidden: list[Tensor | None] = [None] * len(batches)
        self._before = self._after = (0, hidden)

    def up_to(self, number: int) -> None:
        """Run the layers before `number` that were not run yet."""
        while self._after[0] < number:
            self.run(self._after[0])

    def run(self, number: int) -> None:
        """Run layer `number` on all texts: once more, or as the next one."""
        state = self._after if self._after[0] == number else self._before
        assert state[0] == number
        made: list[Tensor | None] = [
            self.walk.step(number, ids, x) for ids, x in zip(self.batches, state[1], strict=True)
        ]
        self._before, self._after = state, (number + 1, made)
