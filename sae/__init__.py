"""Text to tokens, hook points, the activation harvester, training and metrics.

The names below are the public calls of this package. Each loads its module on first use, so that
importing the package costs nothing. No module has the name of a call: importing a submodule binds
its name in the package, which would hide the call.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saesteer.sae.config import HarvestConfig as HarvestConfig
    from saesteer.sae.config import MetricsConfig as MetricsConfig
    from saesteer.sae.config import TextConfig as TextConfig
    from saesteer.sae.config import TrainConfig as TrainConfig
    from saesteer.sae.measuring.ground_truth import score_truth as score_truth
    from saesteer.sae.model.generation import generate as generate
    from saesteer.sae.model.language_model import LanguageModel as LanguageModel
    from saesteer.sae.model.language_model import load_model as load_model
    from saesteer.sae.model.language_model import wrap_model as wrap_model
    from saesteer.sae.reading.config import LatentsConfig as LatentsConfig
    from saesteer.sae.reading.describe import Describer as Describer
    from saesteer.sae.reading.site import save_latents as save_latents
    from saesteer.sae.synthetic.config import SyntheticConfig as SyntheticConfig
    from saesteer.sae.verbs.doctor import doctor as doctor
    from saesteer.sae.verbs.harvest import harvest as harvest
    from saesteer.sae.verbs.latents import latents as latents
    from saesteer.sae.verbs.metrics import metrics as metrics
    from saesteer.sae.verbs.reproduce import reproduce as reproduce
    from saesteer.sae.verbs.synthesise import synthesise as synthesise
    from saesteer.sae.verbs.train import train as train

_MODULES = {
    "Describer": "reading.describe",
    "HarvestConfig": "config",
    "LatentsConfig": "reading.config",
    "MetricsConfig": "config",
    "SyntheticConfig": "synthetic.config",
    "TextConfig": "config",
    "TrainConfig": "config",
    "doctor": "verbs.doctor",
    "generate": "model.generation",
    "harvest": "verbs.harvest",
    "latents": "verbs.latents",
    "metrics": "verbs.metrics",
    "LanguageModel": "model.language_model",
    "load_model": "model.language_model",
    "wrap_model": "model.language_model",
    "reproduce": "verbs.reproduce",
    "save_latents": "reading.site",
    "score_truth": "measuring.ground_truth",
    "synthesise": "verbs.synthesise",
    "train": "verbs.train",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
