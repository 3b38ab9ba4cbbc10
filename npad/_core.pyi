from collections.abc import Callable
from typing import Any

class DataType:
    float32: DataType
    float16: DataType
    bfloat16: DataType
    int8: DataType

# Functions, whose arguments are those of csrc/kernels.h: addresses as int, None for null.
def __getattr__(name: str) -> Callable[..., Any]: ...
