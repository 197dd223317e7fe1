"""The Mixture-of-Experts toolkit for the Hugging Face stack. Importing it costs nothing."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# what users reach from the top, and the room that it lives in; imported when first asked for
_PUBLIC = {
    "open_model": "expertly.models.loading",
    "save_model": "expertly.models.loading",
    "attach": "expertly.models.attach",
    "Policy": "expertly.moe.policy",
    "ExpertlyError": "expertly.errors",
}
__all__ = ["ExpertlyError", "Policy", "attach", "open_model", "save_model"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'expertly' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
