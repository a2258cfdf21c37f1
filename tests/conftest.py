import os

import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: more threads than cores make tiny trainings many times slower.
    torch.set_num_threads(1)
