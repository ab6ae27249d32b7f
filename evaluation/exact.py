"""How evaluation computes: in float32, reproducibly, and in the memory order that is fastest."""

import contextlib

import torch

# Where PyTorch may trade precision for speed. This is its new interface. The old one, `allow_tf32`, raises an
# error once both were used.
PLACES = (
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,
    torch.backends.mkldnn.matmul,
    torch.backends.mkldnn.conv,
)


@contextlib.contextmanager
def exact_float32():
    """Within it nothing computes in less than float32, and CUDA convolutions are deterministic."""
    cudnn, precisions = torch.backends.cudnn, [place.fp32_precision for place in PLACES]
    modes = cudnn.enabled, cudnn.benchmark, cudnn.deterministic
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        for place in PLACES:
            place.fp32_precision = "ieee"
        cudnn.enabled, cudnn.benchmark, cudnn.deterministic = True, False, True
        with torch.autocast("cpu", enabled=False), torch.autocast(device, enabled=False):
            yield
    finally:
        for place, precision in zip(PLACES, precisions, strict=True):
            place.fp32_precision = precision
        cudnn.enabled, cudnn.benchmark, cudnn.deterministic = modes


def memory_format(device):
    """Return the memory order of images and weights in which float32 convolutions are fast.

    On a CPU that is channels-last. cuDNN has its fast float32 kernels for the plain order.
    """
    return torch.contiguous_format if torch.device(device).type == "cuda" else torch.channels_last
