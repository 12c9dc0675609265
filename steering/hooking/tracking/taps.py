"""What lies on a model while it is steered: on its `generate`, on what that makes, on its name."""

import asyncio
import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

from saesteer.checkpoints.errors import UserError

Listener = Callable[[tuple[Any, ...], dict[str, Any]], contextlib.AbstractContextManager[None]]


class _Tap:
    """`model.generate` with listeners that see its arguments and are told when it ends."""

    def __init__(self, model: Any) -> None:
        self.original: Callable[..., Any] = model.generate
        self.before = vars(model).get("generate")
        self.listeners: list[Listener] = []
        functools.update_wrapper(self, self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for listener in self.listeners:
                stack.enter_context(listener(args, kwargs))
            return self.original(*args, **kwargs)


@contextlib.contextmanager
def tapped(model: Any, listener: Listener) -> Iterator[None]:
    """Let a listener see every call of `model.generate`.

    The tap lies on the instance, is shared by nested contexts, and goes with the last of them.
    """
    tap = vars(model).get("generate")
    if not isinstance(tap, _Tap):
        tap = _Tap(model)
        model.generate = tap
    tap.listeners.append(listener)
    try:
        yield
    finally:
        tap.listeners.remove(listener)
        if not tap.listeners and vars(model).get("generate") is tap:
            if tap.before is None:
                del model.generate
            else:
                model.generate = tap.before


@contextlib.contextmanager
def _replaced(model: Any, name: str, value: Any) -> Iterator[None]:
    """Another method on one model for as long as the context is open."""
    before = vars(model).get(name)
    setattr(model, name, value)
    try:
        yield
    finally:
        if before is None:
            vars(model).pop(name, None)
        else:
            setattr(model, name, before)


_PACKING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


@contextlib.contextmanager
def unpacked(model: Any) -> Iterator[None]:
    """Refuse what packs several requests into one row, where no position can be told."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise UserError(
            "generate_batch packs several requests into one row, whose positions steering cannot "
            "tell apart: give generate the padded batch instead"
        )

    with contextlib.ExitStack() as stack:
        for name in _PACKING:
            if hasattr(model, name):
                stack.enter_context(_replaced(model, name, refuse))
        yield


class _Unsteered:
    """A model that is called without being steered, and is itself in everything else."""

    def __init__(
        self, model: Any, leaving_alone: Callable[[], contextlib.AbstractContextManager[None]]
    ) -> None:
        self._model, self._leaving_alone = model, leaving_alone

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._leaving_alone():
            return self._model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


@contextlib.contextmanager
def guided(
    model: Any, leaving_alone: Callable[[], contextlib.AbstractContextManager[None]]
) -> Iterator[None]:
    """Classifier-free guidance runs the model on the negative prompt: those passes are left alone.

    The processor that makes them is one of those that `generate` prepares for itself.
    """
    prepare = getattr(model, "_get_logits_processor", None)
    if prepare is None:
        yield
        return

    def prepared(*args: Any, **kwargs: Any) -> Any:
        processors = prepare(*args, **kwargs)
        for processor in processors:
            if getattr(processor, "model", None) is model:
                processor.model = _Unsteered(model, leaving_alone)
        return processors

    with _replaced(model, "_get_logits_processor", prepared):
        yield


_STEERING: dict[int, list[tuple[int, int]]] = {}
"""By model: who opened the contexts that steer it now, as thread and task."""
_STEERING_LOCK = threading.Lock()


def _who() -> tuple[int, int]:
    """The thread, and the task of asyncio in it."""
    task = None
    with contextlib.suppress(RuntimeError):  # no loop runs in this thread
        task = asyncio.current_task()
    return threading.get_ident(), 0 if task is None else id(task)


@contextlib.contextmanager
def steered_by_this_thread(model: Any, name: str) -> Iterator[None]:
    """Refuse a second context of another thread or task: each would edit what the other runs."""
    ours = _who()
    with _STEERING_LOCK:
        open_now = _STEERING.setdefault(id(model), [])
        if any(theirs != ours for theirs in open_now):
            raise UserError(
                f"{name} is being steered by another thread or task: open one steer(...) around "
                "all of them (a ByRow gives each prompt its own plan), or wait until it ends"
            )
        open_now.append(ours)
    try:
        yield
    finally:
        with _STEERING_LOCK:
            open_now.remove(ours)
            if not open_now:
                _STEERING.pop(id(model), None)
