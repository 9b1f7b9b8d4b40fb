"""For all tests."""

import pytest
import torch

from trainers.data import IdSet, load_id

# One thread, whatever the machine: figures repeat, and two OpenMP teams on two busy cores are far slower than one.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits() -> IdSet:
    """The embedded demo's ID set at 32 px; no test writes into its arrays."""
    return load_id("demo")
