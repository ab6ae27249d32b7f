"""What all tests share: the repository root on the import path, and no more threads than there are cores."""

import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(min(2, len(os.sched_getaffinity(0))))
