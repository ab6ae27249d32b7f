"""Accuracy under attack: networks under test, attacks with their settings, and what each did to each image.

    from evaluation import classifier                  # a checkpoint as a plain nn.Module
    from evaluation import evaluate                    # print(evaluate(model, images, labels)), any network

A `Target` is a network under test, a `Trial` an attack with its settings, an `Outcome` what one did to the
other, image by image. `Results` holds all of them; `measure_all` fills it, block by block. `checks` tells
whether it is the network that withstands the attacks, and `report` writes tables and files.
"""

# ruff: noqa: F401  # the imported names are the package's own

from .exact import exact_float32
from .library import Evaluation, assemble, evaluate
from .measure import attack_block, check_result, check_scores, measure, measure_all
from .outcome import COLUMNS, Outcome
from .results import Results
from .settings import Settings
from .target import Target, classifier, load_target
from .trials import ATTACKS, Trial, in_255ths
