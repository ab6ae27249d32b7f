"""The watch on the loss: no step follows a loss that diverged, and no diverged number is ever saved."""

import collections

import torch

from utils import DivergenceError

LOOK_EVERY = 50  # batches between looks at the loss where a look waits for the device
RUNAWAY_WARNING, RUNAWAY_STOP = 1e5, 1e9  # size of a loss term to warn of, and one that has diverged
LAST_GOOD = 3  # batches before the first diverged one whose loss terms the message names


class Watch:
    """Raises DivergenceError when a loss is NaN, infinite or beyond RUNAWAY_STOP; warns once before."""

    def __init__(self, optimizer, device, say, save_to):
        self.optimizer, self.say, self.save_to = optimizer, say, save_to
        self.look_every = 1 if device.type == "cpu" else LOOK_EVERY
        self.recent = collections.deque(maxlen=LOOK_EVERY + LAST_GOOD)  # (loss terms, epoch, batch)
        # Whether a loss was NaN, or ran away: known to the device at once, to the host when it looks.
        self.diverged = torch.zeros((), dtype=torch.bool, device=device)
        self.warned = False

    def see(self, terms, epoch, batch):
        """Judge the loss terms of a batch before its step.

        Reading a loss waits for a GPU, so there the run ends at the next look, one in LOOK_EVERY batches, or
        before a save; until then an optimiser with `fused` leaves the weights as they were. The first batch
        that is seen is looked at too: a first step that does nothing would leave the momentum undefined.
        """
        terms = {name: value.clone() for name, value in terms.items()}  # a CUDA graph overwrites its results
        first = not self.recent
        self.recent.append((terms, epoch, batch))
        largest = torch.stack([value.abs() for value in terms.values()]).max()
        self.diverged = self.diverged | ~(largest <= RUNAWAY_STOP)  # so written, NaN is larger than anything
        if all(group.get("fused") for group in self.optimizer.param_groups):
            self.optimizer.found_inf = self.diverged.float()  # where it is 1, a fused step does nothing
        if first or batch % self.look_every == 0:
            if self.diverged:
                raise self.divergence()
            if not self.warned and largest > RUNAWAY_WARNING:
                self.warned = True
                self.say(f"warning: a loss term is running away: {in_words(*self.recent[-1])}")

    def check(self, tensors):
        """Raise DivergenceError when a loss diverged, or one of `tensors` holds NaN or Inf."""
        values = torch.cat([tensor.flatten() for tensor in tensors if tensor.is_floating_point()])
        if self.diverged or not values.isfinite().all():
            raise self.divergence()

    def divergence(self):
        """The error that names the first diverged batch, and the last good ones before it."""
        good = [all(abs(term.item()) <= RUNAWAY_STOP for term in terms.values()) for terms, *_ in self.recent]
        lost = [*good, False].index(False)
        recent = [in_words(*entry) for entry in self.recent]
        what = (*recent[lost : lost + 1], "a weight or a loss is NaN or Inf")[0]
        before = " | ".join(recent[max(0, lost - LAST_GOOD) : lost]) or "none since the start"
        return DivergenceError(
            f"diverged: {what}; the last good batches: {before}; lower --lr or the loss weights; "
            f"{self.save_to} is as it was last saved"
        )


def in_words(terms, epoch, batch):
    values = ", ".join(f"{name} {value.item():.4g}" for name, value in terms.items())
    return f"epoch {epoch + 1}, batch {batch + 1}: {values}"
