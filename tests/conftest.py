"""Shared set-up of the tests: one thread, no network, a fixed seed."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import older  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from peft.kernels import few  # noqa: E402


torch.set_num_threads(1)

try:  # bitsandbytes computes otherwise, and less exactly, on CPUs with AVX512-BF16: tests are of what all CPUs do
    import bitsandbytes.nn.modules as _bnb  # noqa: E402
except ImportError:
    pass
else:
    _bnb.has_avx512bf16 = lambda: False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what an older release, which the package allows, cannot do."""
    for item in items:
        if why := older.reason(item.nodeid.removeprefix("tests/")):
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same state of torch's generator."""
    torch.manual_seed(0)
    return 0


@pytest.fixture(autouse=True)
def fused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels are what tests are of, however small their inputs; those of users' flows compute as users' do."""
    if request.node.get_closest_marker("few") is None and "clients" not in request.path.parts:
        monkeypatch.setattr(few, "ENTRIES", 0)
