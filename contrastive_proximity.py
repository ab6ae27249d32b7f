"""The push of the Prototype Conformity Loss: features away from the prototypes of the other classes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ContrastiveProximity(nn.Module):
    """Mean over the batch and the other classes j of ||f_i - v_j||^2 (Eq. 5 of Mustafa et al., ICCV 2019).

    The value is positive and has no upper bound: the joint loss subtracts it.

    centers: the prototypes v, a parameter, num_classes x feat_dim, drawn from N(0, 1). In Eq. 5 they are
        those of the pull; as released they are others.
    squared: squared distances, as released and as in the journal version; False gives Eq. 5's plain ones.
    separation: adds ||v_{y_i} - v_j||, squared or plain as the rest, to each distance: the last term of Eq.
        5, which the released code lacks.
    """

    def __init__(self, num_classes: int, feat_dim: int, squared: bool = True, separation: bool = False):
        super().__init__()
        if num_classes < 2 or feat_dim < 1:
            raise ValueError(f"{num_classes} classes of {feat_dim} features: must be from 2 and from 1 up")
        self.squared, self.separation = squared, separation
        self.centers = nn.Parameter(torch.randn(num_classes, feat_dim))

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """The loss, a float32 scalar, of `features`, N x feat_dim, and `labels`, N, in [0, num_classes).

        Raises ValueError for other shapes and, on the CPU, for other labels (elsewhere a look would cost a
        synchronisation). Features of float64 keep their precision; autocast has no say.
        """
        _check(features, labels, self.centers)
        num_classes = len(self.centers)
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(torch.promote_types(features.dtype, torch.float32))
            distances = self._distances(features)
            if self.separation:
                distances = distances + F.embedding(labels.long(), self._distances(self.centers))
            own = labels[:, None] == torch.arange(num_classes, device=labels.device)
            return distances.masked_fill(own, 0).sum() / (len(labels) * (num_classes - 1))

    def _distances(self, points: Tensor) -> Tensor:
        """Distance of each point, M x feat_dim, to each prototype: M x num_classes."""
        # By default cdist expands the square, |f|^2 + |v|^2 - 2fv, which cancels to noise for features far
        # from the origin. In this mode it subtracts, and keeps no difference for the backward; its gradient
        # at distance 0 is 0.
        centers = self.centers.to(points.dtype)
        distances = torch.cdist(points, centers, compute_mode="donot_use_mm_for_euclid_dist")
        return distances.square() if self.squared else distances

    def extra_repr(self) -> str:
        num_classes, feat_dim = self.centers.shape
        options = f"squared={self.squared}, separation={self.separation}"
        return f"num_classes={num_classes}, feat_dim={feat_dim}, {options}"


def _check(features: Tensor, labels: Tensor, centers: Tensor) -> None:
    num_classes, feat_dim = centers.shape
    if features.ndim != 2 or features.shape[1] != feat_dim or not len(features):
        raise ValueError(f"features are {tuple(features.shape)}: must be (N, {feat_dim}), N from 1 up")
    if labels.shape != features.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"labels are {labels.dtype} {tuple(labels.shape)}: must be ({len(features)},), whole"
        )
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = labels.min(), labels.max()
        if low < 0 or high >= num_classes:
            raise ValueError(f"labels lie in [{low}, {high}]: must lie in [0, {num_classes - 1}]")
