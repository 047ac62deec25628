"""The compiled library as Python functions. Arguments are addresses, sizes and strides; callers have checked them."""

import ctypes
import functools
import logging
from ctypes import c_float, c_int, c_long, c_uint64, c_void_p
from typing import Any

import torch

from shared.engine.native.build import built_library

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_LINEAR = [c_void_p, c_long, c_void_p, c_void_p, c_void_p, c_long, c_long, c_int, c_int]
_LINEAR_INT8 = [c_void_p, c_long, *[c_void_p] * 5, c_long, c_long, c_int, c_void_p, c_void_p, c_int]
_RMS_NORM = [c_void_p, c_void_p, c_void_p, c_long, c_long, c_float, c_int, c_int]
_ROTATE = [c_void_p, c_void_p, c_void_p, *[c_long] * 5, c_int]
_PAGED = [c_void_p, *[c_long] * 4]
_DECODE = [
    *(c_void_p, c_long, c_long, *_PAGED, *_PAGED, c_void_p, c_long, c_void_p, c_void_p, c_void_p),
    *(c_long, c_long, c_long, c_long, c_float, c_float, c_long, c_int),
]
_PREFILL = [
    *(c_void_p, c_long, c_long, *_PAGED, *_PAGED, c_void_p, c_long, c_long, c_void_p, c_void_p),
    *(c_long, c_long, c_long, c_float, c_float, c_long, c_int),
]
_LAYER = [*[c_void_p] * 4, c_long, c_void_p, c_void_p, c_long, c_void_p, c_void_p]
_PUT = [c_void_p, c_long, c_long, c_void_p, c_long, c_long, c_void_p, c_void_p, c_long, c_long, c_long]
_ARGUMENTS = {
    "linear": _LINEAR,
    "linear_int8": _LINEAR_INT8,
    "rms_norm": _RMS_NORM,
    "rotate": _ROTATE,
    "decode": _DECODE,
    "prefill": _PREFILL,
    "put": _PUT,
    "layer": _LAYER,
}

log = logging.getLogger(__name__)


class Library:
    """The functions, by the type of the values they compute with."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        self._functions = {
            (name, dtype): _function(loaded, f"pd_{name}_{suffix}", arguments)
            for name, arguments in _ARGUMENTS.items()
            for dtype, suffix in DTYPES.items()
        }
        self.likeliest = _function(loaded, "pd_likeliest", [c_void_p, c_long, c_long, c_void_p])
        """Address, rows and columns of fp32 logits, address of an int64 per row for the likeliest token, or -1."""
        self.draw = _function(loaded, "pd_draw", [c_void_p, c_long, c_uint64])
        """Address and number of fp32 logits, key; returns the token."""
        self.draw.restype = c_long

    def function(self, name: str, dtype: torch.dtype) -> Any:
        """`pd_<name>_<dtype>` of the sources; KeyError where there is none for the type."""
        return self._functions[name, dtype]


@functools.cache
def native_library() -> Library | None:
    """The library, built and loaded at the first call; None where that cannot be."""
    path = built_library()
    if path is None:
        return None
    try:
        return Library(ctypes.CDLL(str(path)))
    except (OSError, AttributeError) as error:
        log.warning("native kernels cannot be loaded, so torch's own are used: %s", error)
        return None


def _function(loaded: ctypes.CDLL, name: str, arguments: list[Any]) -> Any:
    function = getattr(loaded, name)
    function.argtypes = arguments
    function.restype = None
    return function
