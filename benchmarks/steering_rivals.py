"""Adding one vector to one block during `generate`, with other projects' own, unmodified code.

A rival that is not installed raises ImportError. Each gives a function that generates once and
returns the sequences. The time in their hooks is measured like ours (see `HookClock`); where a
project has no hook of its own that could be timed, `clocked` is False.
"""

import contextlib
import copy
import importlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from saesteer.sae.model.language_model import LanguageModel


@dataclass
class HookClock:
    """Adds up the time spent in forward hooks that are registered while `watching` is open."""

    seconds: float = 0.0
    calls: int = 0
    _names: tuple[str, ...] = field(
        default=("register_forward_hook", "register_forward_pre_hook"), repr=False
    )

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Time the forward hooks registered inside the block."""
        originals = {name: getattr(nn.Module, name) for name in self._names}

        def registering(original: Callable[..., Any]) -> Callable[..., Any]:
            def register(module: nn.Module, hook: Callable[..., Any], **options: Any) -> Any:
                return original(module, self.timed(hook), **options)

            return register

        for name, original in originals.items():
            setattr(nn.Module, name, registering(original))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(nn.Module, name, original)

    def timed(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """A hook whose time is added to `seconds`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return hook(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - started
                self.calls += 1

        return call


@dataclass(frozen=True)
class Steering:
    """The generation that every rival runs."""

    lm: LanguageModel
    layer: int
    vector: Tensor
    ids: Tensor
    mask: Tensor
    options: dict[str, Any]
    """Further arguments of `generate`."""
    clock: HookClock

    def generate(self, model: Any) -> Tensor:
        """Generate once with a model, `[batch, prompt + new tokens]`."""
        with torch.inference_mode():
            sequences: Tensor = model.generate(
                input_ids=self.ids, attention_mask=self.mask, **self.options
            )
        return sequences


@dataclass(frozen=True)
class Rival:
    """A prepared contender: a function that generates once, and what it was given."""

    run: Callable[[], Tensor]
    given: str
    clocked: bool = True


def steering_vectors(job: Steering) -> Rival:
    from steering_vectors import SteeringVector

    vector = SteeringVector({job.layer: job.vector}, "decoder_block")

    def run() -> Tensor:
        with job.clock.watching(), vector.apply(job.lm.model):
            return job.generate(job.lm.model)

    return Rival(run, f"steering-vectors {version('steering-vectors')}, every position, pads too")


def repsteer(job: Steering) -> Rival:
    import repsteer as rs

    model = rs.models.from_model(job.lm.model, job.lm.tokenizer)
    site = rs.sites.resid_post(layer=job.layer)
    metadata = rs.ArtifactMetadata(model_id=model.name_or_path, site=site)
    control = rs.Intervention(
        artifact=rs.DirectionArtifact(metadata, job.vector),
        operator=rs.operators.Add(),
        positions=rs.positions.AllTokens(),
        strength=rs.schedules.Constant(1.0),
    )

    def run() -> Tensor:
        with job.clock.watching(), model.steer(control, compatibility="dimension"):
            sequences: Tensor = model.generate(
                input_ids=job.ids, attention_mask=job.mask, **job.options
            ).token_ids
            return sequences

    return Rival(run, f"repsteer {version('repsteer')}, every position; decodes the text too")


def repeng(job: Steering) -> Rival:
    control = _control_module()
    wrapped = control.ControlModel(job.lm.model, [job.layer])
    wrapped.set_raw_control({job.layer: job.vector})
    block = control.model_layer_list(job.lm.model)[job.layer]
    layers = control.model_layer_list(job.lm.model)
    layers[job.layer] = block.block  # not active while the others have their turn
    whole, inner = block.forward, block.block.forward

    def timed_block(*args: Any, **kwargs: Any) -> Any:
        # The block's own time is within what is timed, and is subtracted again.
        started = time.perf_counter()
        try:
            return inner(*args, **kwargs)
        finally:
            job.clock.seconds -= time.perf_counter() - started

    def run() -> Tensor:
        layers[job.layer] = block
        block.forward, block.block.forward = job.clock.timed(whole), timed_block
        try:
            return job.generate(wrapped)
        finally:
            layers[job.layer] = block.block
            del block.forward, block.block.forward

    return Rival(run, f"repeng {version('repeng')}, every position but left padding")


def _control_module() -> ModuleType:
    """`repeng.control` without the rest of the package, which asks for NumPy 1."""
    spec = importlib.util.find_spec("repeng")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("repeng")
    package = ModuleType("repeng")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["repeng"] = package
    return importlib.import_module("repeng.control")


def nnsight(job: Steering) -> Rival:
    from nnsight import LanguageModel as Traced

    # nnsight permanently changes every module of the model that it is given.
    traced = Traced(copy.deepcopy(job.lm.model), tokenizer=job.lm.tokenizer)
    block = traced
    for part in f"{job.lm.blocks_path}.{job.layer}".split("."):
        block = block[int(part)] if part.isdigit() else getattr(block, part)
    inputs = {"input_ids": job.ids, "attention_mask": job.mask}

    tokens = job.options["max_new_tokens"]

    def run() -> Tensor:
        # Its source is read and run again by the tracer: no more than it documents.
        with traced.generate(inputs, **job.options) as tracer:
            for _ in tracer.iter[:tokens]:
                block.output = block.output + job.vector
            sequences = tracer.result.save()
        return sequences  # type: ignore[no-any-return]

    given = f"nnsight {version('nnsight')}, every position, pads too; traced again each time"
    return Rival(run, given, clocked=False)


RIVALS: dict[str, Callable[[Steering], Rival]] = {
    "steering-vectors": steering_vectors,
    "repsteer": repsteer,
    "repeng": repeng,
    "nnsight": nnsight,
}
