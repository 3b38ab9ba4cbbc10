"""N-pad: industrial visual anomaly detection from defect-free images."""

from npad import _native, ops

_native.register()

__all__ = ["ops"]
