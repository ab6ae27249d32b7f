"""The pull of the Prototype Conformity Loss: features towards the prototype of their own class."""

import torch
import torch.nn.functional as F
from torch import nn

import utils


class Proximity(nn.Module):
    """Mean over the batch of ||f_i - w_{y_i}||^2, the first term of Eq. 5 (Mustafa et al., ICCV 2019).

    centers: the prototypes w, a parameter, num_classes x feat_dim, drawn from N(0, 1).
    squared: squared distances, as released and as in the journal version; False gives Eq. 5's plain ones.
    """

    def __init__(self, num_classes, feat_dim, squared=True):
        super().__init__()
        if num_classes < 1 or feat_dim < 1:
            raise ValueError(f"{num_classes} classes of {feat_dim} features: both must be from 1 up")
        self.squared = squared
        self.centers = nn.Parameter(torch.randn(num_classes, feat_dim))

    def forward(self, features, labels):
        """The loss, a float32 scalar, of `features`, N x feat_dim, and `labels`, N, in [0, num_classes).

        Computed in float32, also under autocast; in float64 for features of float64. Raises ValueError for
        other shapes and, on a CPU, for other labels.
        """
        utils.check_features(features, labels, self.centers)
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(torch.promote_types(features.dtype, torch.float32))
            # An embedding, not centers[labels]: the gradient of an index adds in whatever order threads come.
            # (So does that of a compiled embedding.)
            own = F.embedding(labels.long(), self.centers).to(features.dtype)
            if self.squared:
                return F.mse_loss(features, own, reduction="sum") / len(labels)
            return torch.linalg.vector_norm(features - own, dim=1).mean()  # its gradient at 0 is 0

    def distances(self, features):
        """The distance, squared or plain, of each feature to each prototype: N x num_classes."""
        return utils.distances(features, self.centers, self.squared)
