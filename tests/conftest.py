"""For all tests."""

import torch

# One thread, whatever the machine: figures repeat, and two OpenMP teams on two busy cores are far slower than one.
torch.set_num_threads(1)
