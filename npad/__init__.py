"""N-pad: industrial visual anomaly detection from defect-free images.

>>> from npad import NPad
>>> model = NPad("resnet18").fit("bottle/train/good")
>>> result = model.predict("bottle/test")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from npad._version import __version__

__all__ = ["NPad", "Prediction", "__version__", "info", "ops"]

if TYPE_CHECKING:
    from npad import ops
    from npad.detector import NPad, Prediction
    from npad.environment import info
else:
    # Importing PyTorch takes seconds, so a name is looked up where it lives when it is first used.
    _HOME = {"NPad": "npad.detector", "Prediction": "npad.detector", "info": "npad.environment"}

    def __getattr__(name: str) -> Any:
        if name == "ops":
            return import_module("npad.ops")
        if name not in _HOME:
            raise AttributeError(f"module 'npad' has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_HOME[name]), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
