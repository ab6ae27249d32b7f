"""Tiny trainings of every script in this process: whole ones, and ones that were told to stop."""

import contextlib
import itertools
import signal

import pytest
import soak

import cli
import pcl_training
import pcl_training_adversarial_fgsm
import pcl_training_adversarial_pgd
import softmax_training
import utils

SCRIPTS = {
    module.__name__: module
    for module in (
        *(softmax_training, pcl_training),
        *(pcl_training_adversarial_fgsm, pcl_training_adversarial_pgd),
    )
}
SIZE = {"limit": 12, "batch_size": 4, "epochs": 2, "eval_every": 2}  # 2 epochs of 3 batches


def options(script, path, stage_1=None, **more):
    steps = {"num_steps": 2} if script.endswith("pgd") else {}
    start = {} if script == "softmax_training" else {"init_from": stage_1}
    return soak.tiny(path, **{**SIZE, **start, **steps, **more})


def train(script, *arguments):
    """Run a script in this process."""
    SCRIPTS[script].main(cli.parse_config(SCRIPTS[script].Config, arguments))


class StopAt(contextlib.nullcontext):
    """Instead of signals: asks for a stop when it is looked at for the `count`-th time, and ever after."""

    def __init__(self, count):
        super().__init__(self)
        self.looks = itertools.count(-count)

    @property
    def received(self):
        return signal.SIGTERM if next(self.looks) >= 0 else None


def stop(script, *given, looks=0):
    """Run a script to the stop that it is asked for after so many looks; return what it raises."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(utils.Interrupted) as caught:
        patch.setattr(utils, "StopSignals", lambda: StopAt(looks))
        train(script, *given)
    assert caught.value.exit_status == 143
    return str(caught.value)


def stopped(path, script="softmax_training", batches=4, **more):
    """Leave the checkpoint of a run that was stopped after so many of its 6 batches."""
    stop(script, *options(script, path, **more), looks=batches - 1)
    return path
