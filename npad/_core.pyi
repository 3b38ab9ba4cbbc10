from collections.abc import Callable
from typing import Any

class FloatType:
    float32: FloatType
    float16: FloatType
    bfloat16: FloatType

# Functions, whose arguments are those of csrc/kernels.h: addresses as int, None for null.
def __getattr__(name: str) -> Callable[..., Any]: ...
