"""Text to tokens, hook points, the activation harvester, training and metrics.

The names below are the public calls of this room. Each loads its module on first use, so importing
the package costs nothing. No module bears the name of a call: importing a submodule binds its name
in the package, and would hide the call.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saesteer.sae.config import HarvestConfig as HarvestConfig
    from saesteer.sae.config import MetricsConfig as MetricsConfig
    from saesteer.sae.config import TextConfig as TextConfig
    from saesteer.sae.config import TrainConfig as TrainConfig
    from saesteer.sae.diagnosis import doctor as doctor
    from saesteer.sae.generation import generate as generate
    from saesteer.sae.harvester import harvest as harvest
    from saesteer.sae.measurement import metrics as metrics
    from saesteer.sae.models import LanguageModel as LanguageModel
    from saesteer.sae.models import load_model as load_model
    from saesteer.sae.models import wrap_model as wrap_model
    from saesteer.sae.reproduction import reproduce as reproduce
    from saesteer.sae.training import train as train

_HOME = {
    "HarvestConfig": "config",
    "MetricsConfig": "config",
    "TextConfig": "config",
    "TrainConfig": "config",
    "doctor": "diagnosis",
    "generate": "generation",
    "harvest": "harvester",
    "metrics": "measurement",
    "LanguageModel": "models",
    "load_model": "models",
    "wrap_model": "models",
    "reproduce": "reproduction",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
