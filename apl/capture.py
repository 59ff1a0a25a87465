"""A step recorded once as a CUDA graph and replayed, so that nothing waits for its launches.

On a fast GPU the paper's small networks are done with a kernel sooner than Python has launched the
next. A graph launches all kernels of a step at once. It repeats exactly what was recorded: the same
kernels, on the same memory, with the same numbers. So whatever changes from step to step must be in
a tensor (the batch, the weights, the learning rate), and nothing may be read on the host.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["Graph", "Replayed", "known"]

WARM = 3
"""So many steps are launched one by one first: libraries set themselves up, memory is found."""

_KNOWN = ("apl", "torch", "torchvision")
_HOOKS = (
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
    "_post_accumulate_grad_hooks",
)


def known(*parts: object) -> bool:
    """Whether all of it is modules of torch, torchvision or apl, whose steps are all alike.

    Another's may count its calls or toss Python's coins, and a hook may keep what it sees: a graph
    would repeat the numbers of the recorded step, and call no Python.

    >>> import apl
    >>> known(apl.models.digits_net(), apl.CE()), known(lambda logits, target: logits.sum())
    (True, False)
    """
    if not all(isinstance(part, nn.Module) for part in parts):
        return False
    modules = [module for part in parts for module in part.modules()]  # type: ignore[attr-defined]
    watched = [*modules, *(weight for module in modules for weight in module.parameters(False))]
    return all(type(m).__module__.partition(".")[0] in _KNOWN for m in modules) and not any(
        getattr(one, name, None) for one in watched for name in _HOOKS
    )


class Graph:
    """A CUDA graph, and the stream on which it is recorded."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graph = torch.cuda.CUDAGraph()
        self._stream = torch.cuda.Stream(device)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Work on the stream of the graph, between what is before and what is after."""
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            yield
        here.wait_stream(self._stream)

    def record(self, work: Callable[[], None], generators: Iterable[torch.Generator]) -> None:
        """Record what work launches, without doing it; draws of the generators will go on."""
        for generator in generators:
            self._graph.register_generator_state(generator)
        here = torch.cuda.current_stream(self._device)
        # The outer context puts the stream back where recording fails; torch then does not.
        with torch.cuda.stream(here), torch.cuda.graph(self._graph, stream=self._stream):
            work()

    def replay(self) -> None:
        """Do what was recorded."""
        self._graph.replay()


class Replayed:
    """A step that changes tensors in place, called with tensors: launched at first, then replayed.

    Inputs of another shape than the first ones', as the smaller rest of an epoch, are always
    launched. A step that cannot be recorded is named in a warning, and launched every time.

    Parameters
    ----------
    step
        what is done with the inputs; it returns nothing
    loss
        whose random generators, if it has any, go on drawing
    device
        a GPU
    """

    def __init__(self, step: Callable[..., None], loss: object, device: torch.device) -> None:
        self._step, self._loss = step, loss
        self._graph: Graph | None = Graph(device)
        self._warm = WARM
        self._shapes: list[torch.Size] = []
        self._inputs: list[Tensor] = []

    def __call__(self, *inputs: Tensor) -> None:
        """Do the step."""
        shapes = [given.shape for given in inputs]
        self._shapes = self._shapes or shapes
        if self._graph is None or shapes != self._shapes:
            return self._step(*inputs)
        if self._warm:
            self._warm -= 1
            with self._graph.aside():
                return self._step(*inputs)
        if not self._inputs and not self._record(self._graph, inputs):
            return self._step(*inputs)
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._graph.replay()
        return None

    def _record(self, graph: Graph, inputs: Iterable[Tensor]) -> bool:
        own = [given.clone() for given in inputs]
        try:
            graph.record(lambda: self._step(*own), _generators(self._loss))
        except RuntimeError as error:
            what = str(error).partition("\n")[0]
            warnings.warn(
                f"the training step cannot be recorded as a CUDA graph, and is slower: {what}",
                stacklevel=4,
            )
            self._graph = None
            return False
        self._inputs = own
        return True


def _generators(loss: object) -> Iterator[torch.Generator]:
    """The random generators that modules keep, by themselves or by device."""
    for module in loss.modules() if isinstance(loss, nn.Module) else ():
        for value in vars(module).values():
            kept = value.values() if isinstance(value, dict) else (value,)
            yield from (one for one in kept if isinstance(one, torch.Generator))
