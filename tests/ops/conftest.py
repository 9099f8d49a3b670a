import pytest
import torch

from vmeanba_fx.ops import backward, compose, cpu


@pytest.fixture(autouse=True)
def poisoned_memory():
    """`torch.empty` gives NaN, so that an output or work space which is not fully written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def small_tiles(monkeypatch):
    """Budgets so small that every tensor is cut in every dim that can be cut."""
    monkeypatch.setattr(cpu, "_ROWS_BUDGET", 50)
    monkeypatch.setattr(cpu, "_STEPS_BUDGET", 300)
    monkeypatch.setattr(cpu, "_STEP_WIDTH", 40)
    monkeypatch.setattr(cpu, "_TRANSPOSED_BUDGET", 100)
    monkeypatch.setattr(backward, "_BUDGET", 50)
    monkeypatch.setattr(compose, "_BUDGET", 50)
    monkeypatch.setattr(compose, "_BACKWARD_BUDGET", 50)


@pytest.fixture(autouse=True)
def one_thread():
    """The tests are many small operations: with the other core busy, each would wait for a thread that is not running."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_threads(one_thread):
    torch.set_num_threads(2)
