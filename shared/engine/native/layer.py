"""The structs that `layer.cpp` reads, field by field as they stand there. Addresses do not keep memory alive."""

import ctypes
from ctypes import c_float, c_int, c_long, c_void_p


class Norm(ctypes.Structure):
    """An RMSNorm; all zeros where there is none."""

    _fields_ = [("weight", c_void_p), ("size", c_long), ("eps", c_float), ("kind", c_int)]


class Linear(ctypes.Structure):
    """A packed linear; `scales` and `sums` are those of 8-bit weights."""

    _fields_ = [
        *((name, c_void_p) for name in ("packed", "bias", "scales", "sums")),
        *((name, c_long) for name in ("in_features", "out_features")),
    ]


class Layer(ctypes.Structure):
    """A decoder layer.

    A window or a soft cap of 0 is none; `residual` multiplies what is added to what came in; `activation` is a number
    of `gated.GATES`.
    """

    _fields_ = [
        *((f"{where}_{what}", Norm) for what in ("attention", "mlp") for where in ("before", "after")),
        *((name, Norm) for name in ("query_norm", "key_norm")),
        *((name, Linear) for name in ("query", "key", "value", "output", "gate", "up", "down")),
        *((name, c_long) for name in ("num_heads", "num_kv_heads", "key_dim", "value_dim", "window")),
        *((name, c_float) for name in ("scale", "softcap", "residual")),
        *((name, c_int) for name in ("activation", "rotates", "is_last", "num_threads")),
    ]


class Span(ctypes.Structure):
    """A prefill chunk: its rows, the position of the first, and the request's blocks, int32."""

    _fields_ = [*((name, c_long) for name in ("start", "stop", "first")), ("table", c_void_p)]


class Step(ctypes.Structure):
    """What all layers of a step have in common; tensors are those of `Batch`."""

    _fields_ = [
        *((name, c_void_p) for name in ("blocks", "offsets", "tables", "lengths", "sampled", "spans")),
        *((name, c_long) for name in ("num_rows", "num_decodes", "num_spans", "num_sampled")),
        *((name, c_long) for name in ("table_stride", "block_size")),
    ]
