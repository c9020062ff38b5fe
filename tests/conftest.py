import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the project's files, from wherever pytest is started
torch.set_num_threads(2)
