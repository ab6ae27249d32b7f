"""The joint loss: cross-entropy, and the pull and the push of the PCL on each feature."""

import torch
import torch.nn.functional as F
from torch import nn

import data
import utils
from contrastive_proximity import ContrastiveProximity
from proximity import Proximity

MEANS_BATCH = 1000  # images at a time when class means are taken


def output(outputs, name):
    """Return the network's output that is called `name`: an entry of a dict, or a field."""
    return outputs[name] if isinstance(outputs, dict) else getattr(outputs, name)


class PrototypeConformityLoss(nn.Module):
    """Cross-entropy + the sum over layers of weight_prox * pull - weight_conprox * push (Eq. 5 and 9).

    feat_dims: the supervised features, shallow to deep: fields of the network's outputs, and their widths.
        Without any it is cross-entropy alone, stage 1's criterion.
    weight_prox, weight_conprox: from 0 up; 0 switches the term off.
    squared, shared, separation: squared distances, the same prototypes for pull and push, and prototypes that
        repel each other. The defaults are as released; `squared=False, shared=True, separation=True` is Eq. 5
        as printed.
    Any network will do whose outputs, in a dict or in fields, have the named features, N x width, and
    `logits`, N x num_classes.
    """

    def __init__(
        self, num_classes, feat_dims, weight_prox=0.0, weight_conprox=0.0, *,
        squared=True, shared=False, separation=False
    ):  # fmt: skip
        super().__init__()
        self.weight_prox, self.weight_conprox = weight_prox, weight_conprox
        # A buffer: numbers would be constants of a compiled step, and another weight would compile it anew.
        self.register_buffer("weights", torch.tensor([weight_prox, weight_conprox]).float(), persistent=False)
        self.proximity, self.contrastive = nn.ModuleDict(), nn.ModuleDict()
        for layer, width in feat_dims.items():
            if weight_prox:
                self.proximity[layer] = Proximity(num_classes, width, squared)
            if weight_conprox:
                self.contrastive[layer] = ContrastiveProximity(num_classes, width, squared, separation)
            if shared and weight_prox and weight_conprox:
                self.contrastive[layer].centers = self.proximity[layer].centers
        used = {"cross_entropy": True, "proximity": self.proximity, "contrastive": self.contrastive}
        self.terms = tuple(name for name in used if used[name])

    def forward(self, outputs, labels):
        """Return (loss, its terms before weighting, detached), means over the N images of a batch."""
        logits = output(outputs, "logits")
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(logits, labels)
        parts = {"cross_entropy": loss.detach()}
        if self.proximity:
            pull = sum(term(output(outputs, layer), labels) for layer, term in self.proximity.items())
            loss = loss + self.weights[0] * pull
            parts["proximity"] = pull.detach()
        if self.contrastive:
            push = sum(term(output(outputs, layer), labels) for layer, term in self.contrastive.items())
            loss = loss - self.weights[1] * push
            parts["contrastive"] = push.detach()
        return loss, parts

    def per_image(self, outputs, labels):
        """The joint loss of each image, (N,), without the term between prototypes: no image changes that."""
        loss = F.cross_entropy(output(outputs, "logits").float(), labels, reduction="none")
        for layer, term in self.proximity.items():
            distances = term.distances(output(outputs, layer).float())
            loss = loss + self.weight_prox * distances.gather(1, labels[:, None])[:, 0]
        for layer, term in self.contrastive.items():
            distances = term.distances(output(outputs, layer).float())
            others = distances.scatter(1, labels[:, None], 0.0).sum(1) / (len(term.centers) - 1)
            loss = loss - self.weight_conprox * others
        return loss

    def nearest(self, outputs):
        """Minus the distance of the deepest pulled feature to each prototype (Eq. 6), N x num_classes.

        Their argmax is the class of the nearest prototype. Needs a pull.
        """
        layer, term = list(self.proximity.items())[-1]
        return -term.distances(output(outputs, layer).float())

    def approach(self, outputs, labels):
        """Return how far the features are past the border to each other class's prototype, N x num_classes.

        The border lies half-way between two prototypes. The signed distance from it, below 0 on the own side,
        is (||f - w_own||^2 - ||f - w_j||^2) / (2 ||w_own - w_j||). Its unit is half the mean distance between
        prototypes. It is summed over the pulled layers, and -inf for the own class. Needs a pull.
        """
        total = 0.0
        for layer, term in self.proximity.items():
            features = output(outputs, layer)
            features = features.to(torch.promote_types(features.dtype, torch.float32))
            squares = utils.distances(features, term.centers, True)
            gaps = utils.distances(term.centers, term.centers, False).to(squares.dtype)
            mean = gaps.sum() / (len(gaps) * (len(gaps) - 1))
            beyond = squares.gather(1, labels[:, None]) - squares
            total = total + beyond / (gaps[labels] * mean).clamp(min=1e-12)
        return total.scatter(1, labels[:, None], -torch.inf)

    def param_groups(self, lr_prox, lr_conprox):
        """Return the prototypes' optimiser groups: plain SGD on the unweighted terms.

        The released scripts divide a prototype's gradient by its loss weight before the step; for SGD without
        momentum that is a learning rate divided by the weight. Shared prototypes are in the pull's group.
        """
        pull = list(self.proximity.parameters())
        push = [p for p in self.contrastive.parameters() if not any(p is other for other in pull)]
        plain = {"momentum": 0.0, "weight_decay": 0.0}
        groups = [(pull, lr_prox, self.weight_prox), (push, lr_conprox, self.weight_conprox)]
        return [{"params": params, "lr": lr / weight, **plain} for params, lr, weight in groups if params]

    @torch.no_grad()
    def init_class_means(self, model, split):
        """Move every prototype to the mean of its class's features on `split`, the model in eval mode.

        The prototype of a class without images stays as it was drawn.
        """
        terms = [*self.proximity.items(), *self.contrastive.items()]
        if not terms:
            return
        sums = {layer: torch.zeros_like(term.centers) for layer, term in terms}
        with utils.evaluating(model):
            for _, images, labels in data.epoch_batches(split, MEANS_BATCH):
                outputs = model(data.to_float(images))
                for layer, total in sums.items():
                    total.index_add_(0, labels, output(outputs, layer).float())
        counts = torch.bincount(split.labels, minlength=len(terms[0][1].centers))[:, None]
        for layer, term in terms:
            term.centers.copy_(torch.where(counts > 0, sums[layer] / counts, term.centers))


def from_checkpoint(state, config):
    """The frozen joint loss that a checkpoint was trained with; None where it was trained without prototypes.

    state: the loss's state_dict. config: the settings of the training.
    """
    centers = {key.split(".")[1]: value for key, value in state.items() if key.endswith(".centers")}
    if not centers or "weight_prox" not in config:
        return None
    num_classes = len(next(iter(centers.values())))
    widths = {layer: value.shape[1] for layer, value in centers.items()}
    weights = config["weight_prox"], config["weight_conprox"]
    squared, shared = config.get("distance", "squared") == "squared", config.get("shared_prototypes", False)
    criterion = PrototypeConformityLoss(num_classes, widths, *weights, squared=squared, shared=shared)
    criterion.load_state_dict(state)
    return criterion.requires_grad_(False).eval()
