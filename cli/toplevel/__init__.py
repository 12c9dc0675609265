"""saesteer: sparse autoencoders from raw text to a steered language model.

The main calls, in the order in which a project needs them:

    model = saesteer.load_model("smollm2-135m-instruct")   # a language model and its tokenizer
    saesteer.harvest(...)                                   # text to stored activations
    saesteer.train(...)                                     # activations to SAEs
    sae = saesteer.load_sae("runs/sae")                     # an SAE in any supported format
    saesteer.metrics(...)                                   # how good it is
    saesteer.latents(sae, model)[4]                         # what its latents are, as cards
    saesteer.rank(...)                                      # which latents carry an instruction
    plan = saesteer.load_plan("runs/plan")                  # what is written where
    with saesteer.steer(model, plan): ...                   # while the model generates
    saesteer.evaluate(...)                                  # how well it steers
    saesteer.convert(...)                                   # to other tools' files

Each loads its module on first use; the rest is in `saesteer.sae`, `saesteer.steering`,
`saesteer.mechanisms` and `saesteer.checkpoints`. This folder is the package `saesteer` itself: what
`import saesteer` gives.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saesteer.checkpoints.conversion import convert as convert
    from saesteer.checkpoints.sae_file import load_sae as load_sae
    from saesteer.sae.model.language_model import load_model as load_model
    from saesteer.sae.verbs.harvest import harvest as harvest
    from saesteer.sae.verbs.latents import latents as latents
    from saesteer.sae.verbs.metrics import metrics as metrics
    from saesteer.sae.verbs.train import train as train
    from saesteer.steering.evaluation.arms import evaluate as evaluate
    from saesteer.steering.hooking.hook import steer as steer
    from saesteer.steering.plans.plan_file import load_plan as load_plan
    from saesteer.steering.ranking.rank import rank as rank

_HERE = os.path.dirname(os.path.abspath(__file__))
if os.path.basename(_HERE) == "toplevel":
    # A checkout, where the rooms lie two folders up. An editable install maps each of them, but not
    # kernels/, which is no regular package.
    __path__.append(os.path.dirname(os.path.dirname(_HERE)))

_ROOMS = {
    "load_model": "sae",
    "harvest": "sae",
    "train": "sae",
    "load_sae": "checkpoints",
    "metrics": "sae",
    "latents": "sae",
    "rank": "steering",
    "load_plan": "steering",
    "steer": "steering",
    "evaluate": "steering",
    "convert": "checkpoints",
}
"""Each call, and the room that offers it."""


_OPEN = ("sae", "steering", "mechanisms", "checkpoints")
"""The rooms with public calls."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("saesteer")
    if name in _OPEN:
        return import_module(f"{__name__}.{name}")
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    # What there is to call, not what this file needs.
    own = {name for name in globals() if name.startswith("__") and name.endswith("__")}
    return sorted({*own, "__version__", *_ROOMS, *_OPEN})
