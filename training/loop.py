"""The training loop: `train_epoch` holds the step, `fit` is what a training script calls."""

import torch

import data
import distributed
import utils
from models import folded
from prototype_conformity import output

from .compiling import choose
from .run import Run

EVAL_BATCH = 1000  # images at a time when only accuracy is asked for


def fit(config, dataset, model, criterion, optimizer, scheduler, adversary=None):
    """Train to `config.epochs`; log a row and save a checkpoint each epoch; resume where `config` says so.

    `adversary(model_fn, images, labels, generator) -> images`, if given, doubles each batch with adversarial
    images; `model_fn` is the network as it stands, images to logits, frozen and in eval mode. Raises
    Interrupted after a saved stop (by a signal, or by --max-minutes), DivergenceError, and the faults of
    `utils`.
    """
    with utils.hold(config.save_to), utils.hold(config.log_path):
        run = Run(config, dataset, model, criterion, optimizer, scheduler)
        if not run.open():
            return
        with utils.StopSignals() as stop:
            forward, attack = make_steps(run, adversary, stop)
            while not run.finished:
                train_epoch(run, forward, attack, stop)
                run.end_epoch(accuracy(model, dataset.test) if run.measures_now else None)
                run.save_or_leave(stop)
    if not distributed.rank:
        utils.say(f"finished: {config.save_to}, sha256 {utils.sha256(config.save_to)}")
    (signum,) = distributed.agree(stop.received or 0)
    if signum:
        raise utils.Interrupted(signum, f"told to stop in its last epoch; {config.save_to} is finished")


def train_epoch(run, forward, attack, stop):
    """Train from the batch that the run is at to the end of the epoch."""
    config, progress, kind = run.config, run.progress, run.dataset.kind
    order = utils.generator(config.seed, "order", progress.epoch)
    batches = data.epoch_batches(run.dataset.train, config.batch_size, order, start_batch=progress.batch)
    run.begin_epoch()
    run.model.train()
    for index, images, labels in utils.progress(
        batches, run.batches, f"epoch {progress.epoch + 1}", progress.batch
    ):
        # First, since in a CUDA graph gradients lie in memory that the next pass takes.
        run.optimizer.zero_grad(set_to_none=True)
        count = len(labels)
        drawn = utils.generator(config.seed, "augment", progress.epoch, index)
        images = data.augment(images, drawn, kind.padding, kind.flip)
        images, labels = distributed.part(images), distributed.part(labels)
        images = data.to_float(images).contiguous(memory_format=torch.channels_last)
        if attack is not None:
            draws = utils.generator(config.seed, "attack", progress.epoch, index)
            attacked = attack(images, labels, distributed.part_of(draws, count))
            images, labels, count = torch.cat([images, attacked]), torch.cat([labels, labels]), 2 * count

        loss, parts, correct = forward(images, labels)
        terms = {"loss": loss.detach(), **parts}
        run.watch.see(terms, progress.epoch, index)  # raises DivergenceError: no step follows NaN

        loss.backward()
        run.optimizer.step()

        progress.count(terms, correct, count)
        progress.batch = index + 1
        if progress.batch < run.batches:
            run.save_or_leave(stop)


def make_steps(run, adversary, stop):
    """Return (forward, attack), compiled if asked for and possible; without an adversary, attack is None.

    With several ranks nothing is compiled. Each rank takes its part of a batch, and forward returns the terms
    of the whole batch.
    """

    if distributed.world > 1:
        from .parallel import parallel  # it imports torch.distributed

        forward = parallel(make_forward(run), run)  # first: it may replace batch norms
        return forward, adversary and make_attack(run, adversary, lambda network: network)

    def steps(compiled):
        return compiled(make_forward(run)), adversary and make_attack(run, adversary, compiled)

    return choose(run, steps, stop)


def make_forward(run):
    """Return the function of a batch: forward(images, labels) -> (loss, its terms, how many are right)."""

    def forward(images, labels):
        with run.autocast():
            outputs = run.model(images)
        loss, parts = run.criterion(outputs, labels)
        return loss, parts, (outputs.logits.detach().argmax(1) == labels).sum()

    return forward


def make_attack(run, adversary, compiled):
    """Return attack(images, labels, generator) -> images: the adversary's, of the network as it stands.

    The adversary gets a frozen copy of the network, in eval mode and in the training precision, as
    `compiled(network)` returns it.
    """
    frozen = folded(run.model, run.dtype)
    model_fn = compiled(frozen)

    def attack(images, labels, generator):
        frozen.refresh()
        with run.autocast():
            attacked = adversary(model_fn, images, labels, generator)
        return attacked.contiguous(memory_format=torch.channels_last)

    return attack


@torch.no_grad()
def accuracy(model, split):
    """Return the accuracy in percent on `split`: float32 (TF32 on a GPU), eval mode, argmax of the logits."""
    correct = torch.zeros((), dtype=torch.int64, device=split.labels.device)
    # Without synchronised batch norm ranks have statistics of their own.
    distributed.take_over(model.buffers())
    with utils.evaluating(model):
        for _, images, labels in data.epoch_batches(split, EVAL_BATCH):
            images, labels = distributed.part(images), distributed.part(labels)
            images = data.to_float(images).contiguous(memory_format=torch.channels_last)
            correct += (output(model(images), "logits").argmax(1) == labels).sum()
    return 100 * distributed.total(correct).item() / len(split)
