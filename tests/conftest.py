"""What all tests share: the repository root on the import path, and one thread, in processes begun here too.

Networks are tiny in tests, and sums over threads depend on how many there are: two runs compared bit for bit
must have as many. A test that is about threads asks for more with `two_threads`.
"""

import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

torch.set_num_threads(1)


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The checkpoint of an uninterrupted run of each script, nothing compiled."""
    from runs import SCRIPTS, options, train

    folder, paths = tmp_path_factory.mktemp("whole"), {}
    for script in SCRIPTS:
        paths[script] = folder / script / "run.pth.tar"
        train(script, *options(script, paths[script], paths.get("softmax_training")))
    return paths
