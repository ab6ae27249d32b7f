"""The push of the Prototype Conformity Loss: features away from the prototypes of the other classes."""

import torch
import torch.nn.functional as F
from torch import nn

import utils


class ContrastiveProximity(nn.Module):
    """Mean over the batch and the other classes j of ||f_i - v_j||^2 (Eq. 5 of Mustafa et al., ICCV 2019).

    The value is positive and has no upper bound: the joint loss subtracts it.

    centers: the prototypes v, a parameter, num_classes x feat_dim, drawn from N(0, 1). In Eq. 5 they are
        those of the pull; as released they are others.
    squared: squared distances, as released and as in the journal version; False gives Eq. 5's plain ones.
    separation: adds ||v_{y_i} - v_j||, squared or plain as the rest, to each distance: the last term of Eq.
        5, which the released code lacks.
    """

    def __init__(self, num_classes, feat_dim, squared=True, separation=False):
        super().__init__()
        if num_classes < 2 or feat_dim < 1:
            raise ValueError(f"{num_classes} classes of {feat_dim} features: must be from 2 and from 1 up")
        self.squared, self.separation = squared, separation
        self.centers = nn.Parameter(torch.randn(num_classes, feat_dim))

    def forward(self, features, labels):
        """The loss, a float32 scalar, of `features`, N x feat_dim, and `labels`, N, in [0, num_classes).

        Computed in float32, also under autocast; in float64 for features of float64. Raises ValueError for
        other shapes and, on a CPU, for other labels.
        """
        utils.check_features(features, labels, self.centers)
        num_classes = len(self.centers)
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(torch.promote_types(features.dtype, torch.float32))
            distances = self.distances(features)
            if self.separation:
                distances = distances + F.embedding(labels.long(), self.distances(self.centers))
            own = labels[:, None] == torch.arange(num_classes, device=labels.device)
            return distances.masked_fill(own, 0).sum() / (len(labels) * (num_classes - 1))

    def distances(self, features):
        """The distance, squared or plain, of each feature to each prototype: N x num_classes."""
        return utils.distances(features, self.centers, self.squared)
