"""One thread: the tests' matrices are too small for more, and other processes may share the cores."""

import torch

torch.set_num_threads(1)
