"""Products of matrices for the kernels, by the faster of the two libraries that torch carries for processors.

torch multiplies float32 matrices by MKL, which chooses its code by the maker of the processor. On AMD's, oneDNN takes
5 to 20 % less time for large products and up to 40 % less for thin ones, unless it is r that is summed over. On
Intel's it takes 2 to 30 % more for large ones, and up to four times as long for thin ones. It sums in another order:
what a layer gives differs from the base layer's W x as that does between two numbers of threads.
Torch's own switch, ``torch.backends.mkldnn.enabled = False``, leaves all products to MKL.
"""

from __future__ import annotations

import torch


LARGE = 2**21  # multiplications; for fewer, a call of oneDNN costs more than it gains


def product(a: torch.Tensor, b: torch.Tensor, scale: float = 1.0, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``a b``, ``[n, m]``, for ``[n, k]`` and ``[k, m]`` of one dtype; it is scaled, or has a bias ``[m]`` added."""
    if _for_onednn(a, b):
        y = torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
        return y if scale == 1 else y.mul_(scale)
    if bias is not None:
        return torch.addmm(bias, a, b)
    if scale == 1:
        return torch.mm(a, b)
    key = a.dtype, a.device
    if key not in _NOTHING:
        _NOTHING[key] = torch.zeros((), dtype=a.dtype, device=a.device)
    return torch.addmm(_NOTHING[key], a, b, beta=0, alpha=scale)  # one call


_NOTHING: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}


def plus_product(y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``y + a b``, in the place of y where that is faster: y must not be used any more."""
    if _for_onednn(a, b):
        return torch.ops.mkldnn._linear_pointwise.binary(a, y, b.t(), None, "add")
    return accumulate(y, a, b, 1.0)


def accumulate(y: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """``y += scale * a b``, in place; y may be narrower than a and b."""
    if a.dtype == y.dtype:
        return y.addmm_(a, b, alpha=scale)
    return y.add_(torch.mm(a, b), alpha=scale)


def _for_onednn(a: torch.Tensor, b: torch.Tensor) -> bool:
    if not _BY_OTHER_MAKER or a.dtype is not torch.float32 or a.shape[0] * a.shape[1] * b.shape[1] < LARGE:
        return False
    # its operation has no gradient of its own, and what counts or records operations does not know it
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    return a.is_cpu and torch._C._get_mkldnn_enabled()


def _by_other_maker() -> bool:
    """Whether torch multiplies by MKL on a processor whose maker is not MKL's, as far as torch tells."""
    ask = getattr(torch.cpu, "get_capabilities", None)
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return both and ask is not None and "AMD" in ask().get("cpu_name", "")


_BY_OTHER_MAKER = _by_other_maker()
