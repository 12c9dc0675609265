"""Everything that touches a disk or a hub: SAE files, activation shards, run state, model files.

The names below are loaded when first used, so that importing this package stays cheap.
"""

from typing import TYPE_CHECKING, Any

from saesteer.checkpoints.errors import UserError

if TYPE_CHECKING:
    from saesteer.checkpoints.conversion import convert
    from saesteer.checkpoints.hub import from_pretrained, push
    from saesteer.checkpoints.sae_file import SAE, SAESpec, load_sae, save_sae

__all__ = [
    "SAE",
    "SAESpec",
    "UserError",
    "convert",
    "from_pretrained",
    "load_sae",
    "push",
    "save_sae",
]


def __getattr__(name: str) -> Any:
    if name in {"SAE", "SAESpec", "load_sae", "save_sae"}:
        from saesteer.checkpoints import sae_file

        return getattr(sae_file, name)
    if name in {"from_pretrained", "push"}:
        from saesteer.checkpoints import hub

        return getattr(hub, name)
    if name == "convert":
        from saesteer.checkpoints import conversion

        return conversion.convert
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
