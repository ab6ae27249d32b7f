"""What the four training scripts share: `fit` trains, saves, logs and resumes; `loop.py` shows the step."""

# ruff: noqa: F401  # the imported names are the package's own

from .config import RunConfig
from .files import claim
from .loop import accuracy, fit, make_forward, make_steps, train_epoch
from .run import Run
from .seeds import each_seed
from .start import load, start_from
