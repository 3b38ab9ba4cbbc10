"""N-pad: industrial visual anomaly detection from defect-free images."""

from npad import _native, ops
from npad._version import __version__

_native.register()

__all__ = ["__version__", "ops"]
