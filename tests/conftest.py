"""Shared set-up of the tests: one thread, no network, a fixed seed."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch  # noqa: E402


torch.set_num_threads(1)

try:  # bitsandbytes computes otherwise, and less exactly, on CPUs with AVX512-BF16: tests are of what all CPUs do
    import bitsandbytes.nn.modules as _bnb  # noqa: E402
except ImportError:
    pass
else:
    _bnb.has_avx512bf16 = lambda: False


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same state of torch's generator."""
    torch.manual_seed(0)
    return 0
