"""The kernels for an NVIDIA GPU."""

from shared.engine.kernels import Kernels, plain


def gpu_kernels() -> Kernels:
    """Flash Attention for prompts, Triton for decodes. Triton has to be there (`find_device`)."""
    from shared.engine.kernels.triton_decode import paged_decode
    from shared.engine.kernels.varlen_prefill import paged_prefill

    return Kernels(decode=paged_decode, prefill=paged_prefill, put=plain.put)
