"""N-pad: industrial visual anomaly detection from defect-free images.

>>> from npad import NPad
>>> model = NPad("resnet18").fit("bottle/train/good")
>>> result = model.predict("bottle/test")
"""

from npad import _native, ops
from npad._version import __version__
from npad.detector import NPad, Prediction
from npad.environment import info

_native.register()

__all__ = ["NPad", "Prediction", "__version__", "info", "ops"]
