"""Attacks as pure functions: `attack(model_fn, images, labels, epsilon, ...) -> images`.

`model_fn` maps images to logits, N x K, or to a tuple with a field `logits`. `images` are float, in [0, 1],
N x C x H x W; `labels` are int64, (N,); `epsilon`, in [0, 1], is the radius of the L-infinity ball in pixel
units. An attack returns new detached images in [0, 1], each within `epsilon` of its original, also in float
arithmetic. Only `cw` is not bound by epsilon. An `epsilon` of 0 or no steps return the images bit for bit.

No argument, mode, parameter or `.grad` changes, except the state of a generator that is passed; the caller
sets the modes. Images do not influence each other: losses are summed, never averaged, and each image has its
own stream of random numbers. These are the same whatever device the images are on. They depend on `generator`
alone; None means a new one with seed 0.

A `loss` maps the model's outputs and the labels to one value per image, (N,), which the attack raises.
`trace(step, gradient)` is called with every gradient; steps count from 0 in each restart.

Images or labels of wrong shapes or types raise ValueError. So do pixels outside [0, 1] on a CPU; on another
device that check would make the host wait in every batch. The ranges of options are checked by the command
line, not here.
"""

# ruff: noqa: F401  # the imported names are the package's own

from .gradient import (
    ZeroGradients,
    bim,
    cross_entropy,
    dlr,
    fgsm,
    margin,
    mim,
    misclassified,
    nearest_prototype,
    pgd,
    scores,
)
from .strong import apgd, cw, noise, square
