"""The device that a model is computed on: `cpu`, `cuda` or `cuda:N`."""

from importlib.util import find_spec

import torch

from shared.errors import SettingsInvalid


def find_device(name: str) -> torch.device:
    """The device of this name, `cuda` being the first GPU.

    Raises:
        SettingsInvalid: torch has none of this name; with the reason.
    """
    kind, _, number = name.partition(":")
    if name == "cpu":
        return torch.device("cpu")
    if kind != "cuda" or not (number.isdecimal() or name == "cuda"):
        raise SettingsInvalid(
            f"PDSERVE_DEVICE={name!r} cannot be used: it is cpu, cuda, or cuda:N for the GPU number N"
        )
    problem = _problem(int(number or 0))
    if problem:
        raise SettingsInvalid(f"PDSERVE_DEVICE={name!r} cannot be used: {problem}, or set PDSERVE_DEVICE=cpu")
    return torch.device("cuda", int(number or 0))


def _problem(number: int) -> str | None:
    """Why torch has no GPU of this number, and what to do."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} here is built without CUDA; install its CUDA build"
    if not torch.cuda.is_available():
        return "torch finds no NVIDIA GPU; check the driver (nvidia-smi)"
    if number >= torch.cuda.device_count():
        return f"torch finds {torch.cuda.device_count()} GPUs, counted from 0; choose one of them"
    if find_spec("triton") is None:
        return "Triton is not installed, which comes with torch's CUDA build; install that (pip install triton)"
    return None
