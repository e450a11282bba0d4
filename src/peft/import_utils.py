"""Which optional libraries can be used here. Nothing is imported to find out, and every answer is kept."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from functools import lru_cache
from importlib.machinery import PathFinder

import torch
from packaging.version import Version


def _present(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _asks(name: str, library: str) -> Callable[[], bool]:
    """A function that tells whether a package can be imported."""

    @lru_cache
    def is_available() -> bool:
        return _present(name)

    is_available.__doc__ = f"Whether {library} is installed."
    return is_available


is_aqlm_available = _asks("aqlm", "AQLM")
is_bnb_available = _asks("bitsandbytes", "bitsandbytes")
is_diffusers_available = _asks("diffusers", "diffusers")
is_eetq_available = _asks("eetq", "EETQ")
is_hqq_available = _asks("hqq", "HQQ")
is_inc_available = _asks("neural_compressor", "Intel Neural Compressor")
is_optimum_available = _asks("optimum", "optimum")
is_te_available = _asks("transformer_engine", "TransformerEngine")


def _require(name: str, minimum: str, needed_for: str | None = None) -> None:
    """Raise ``ImportError`` if the distribution is missing or older than ``minimum``."""
    for_what = f", which {needed_for} needs" if needed_for else ""
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(
            f"{name} >= {minimum}{for_what}, is not installed; install it with `pip install '{name}>={minimum}'`"
        ) from None
    if Version(found) < Version(minimum):
        raise ImportError(
            f"{name} {found} is too old: {minimum} or above is supported{for_what}; "
            f"upgrade it with `pip install '{name}>={minimum}'`, or uninstall it"
        )


@lru_cache
def is_bnb_4bit_available() -> bool:
    """Whether bitsandbytes is installed with 4-bit layers, i.e. in version 0.39 or above."""
    return is_bnb_available() and Version(importlib.metadata.version("bitsandbytes")) >= Version("0.39.0")


@lru_cache
def is_gptqmodel_available() -> bool:
    """Whether GPTQModel is installed.

    Raises:
        ImportError: if it is, but older than 7.0, or without optimum 1.24 or above.
    """
    if not _present("gptqmodel"):
        return False
    _require("gptqmodel", "7.0.0")
    _require("optimum", "1.24.0", needed_for="gptqmodel")
    return True


@lru_cache
def is_te_pytorch_available() -> bool:
    """Whether TransformerEngine is installed with its PyTorch part."""
    spec = importlib.util.find_spec("transformer_engine")
    if spec is None or spec.submodule_search_locations is None:
        return False
    # `find_spec("transformer_engine.pytorch")` would import the parent.
    return PathFinder.find_spec("transformer_engine.pytorch", list(spec.submodule_search_locations)) is not None


@lru_cache
def is_torchao_available() -> bool:
    """Whether torchao is installed.

    Raises:
        ImportError: if it is, but older than 0.16.
    """
    if not _present("torchao"):
        return False
    _require("torchao", "0.16.0")
    return True


@lru_cache
def is_torchao_ge_v0_18_0() -> bool:
    """Whether torchao is installed in version 0.18 or above."""
    return is_torchao_available() and Version(importlib.metadata.version("torchao")) >= Version("0.18.0")


def _transformers_is(minimum: str) -> bool:
    return Version(importlib.metadata.version("transformers")) >= Version(minimum)


is_transformers_ge_v5 = _transformers_is("5.0.0.dev0")
is_transformers_ge_v5_1_0 = _transformers_is("5.1.0")
is_transformers_ge_v5_4_0 = _transformers_is("5.4.0")
is_transformers_ge_v5_6_0 = _transformers_is("5.6.0")
is_transformers_ge_v5_13_0 = _transformers_is("5.13.0")
is_transformers_ge_v5_17_0 = _transformers_is("5.17.0")
is_transformers_le_4_53 = not _transformers_is("4.54.0.dev0")
is_transformers_dtensor_tp = is_transformers_ge_v5_17_0
"""Whether transformers shards tensors as ``DTensor`` for tensor parallelism."""


@lru_cache
def is_torch_tpu_available(check_device: bool = True) -> bool:
    """Whether torch_xla is installed, and with ``check_device`` also finds an XLA device."""
    if not _present("torch_xla"):
        return False
    if check_device:
        try:
            import torch_xla.core.xla_model as xla_model

            xla_model.xla_device()
        except (ImportError, RuntimeError):
            return False
    return True


@lru_cache
def is_xpu_available(check_device: bool = False) -> bool:
    """Whether torch sees an Intel XPU, and with ``check_device`` also counts at least one."""
    available = hasattr(torch, "xpu") and torch.xpu.is_available()
    return available and (not check_device or torch.xpu.device_count() > 0)
