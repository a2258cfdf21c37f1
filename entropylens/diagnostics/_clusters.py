"""Clusters of inputs, which draw no random numbers."""

import numpy as np
import torch
from scipy.linalg import eigh, qr, svd
from torch import Tensor

from entropylens.diagnostics._diffusion import squared_distances

__all__ = ["spectral_clusters"]


def spectral_clusters(inputs: Tensor, clusters: int = 10, *, neighbours: int = 10) -> list[int]:
    """Which inputs belong together?

    Spectral clustering as the released DSMI asks scikit-learn for it: ``(C + C^T) / 2`` of the
    graph of nearest neighbours (each its own first one), eigenvectors of its normalised Laplacian,
    and assignment by a pivoted QR (Damle, Minden and Ying 2019), which draws no random numbers.

    Args:
        inputs: ``[N, ...]`` real numbers.
        clusters: How many, at most N.
        neighbours: Of each input, itself among them.

    Returns:
        N numbers in 0..clusters - 1.

    Raises:
        ValueError: There are fewer inputs than clusters.

    Device: the host's, once a run.
    Cost: O(N^2 D + N^3).
    """
    count = len(inputs)
    if count < clusters:
        raise ValueError(f"spectral_clusters: expected {clusters} inputs or more, got {count}")
    squared = squared_distances(inputs.flatten(1).cpu()).fill_diagonal_(-1.0)
    nearest = squared.topk(min(neighbours, count), largest=False).indices
    graph = torch.zeros_like(squared).scatter_(1, nearest, 1.0)
    graph = ((graph + graph.T) / 2).fill_diagonal_(0.0)
    scale = torch.where(graph.sum(1) > 0, graph.sum(1), 1.0).rsqrt().numpy()
    walk = graph.numpy() * scale * scale[:, None]
    _, vectors = eigh(walk, subset_by_index=(count - clusters, count - 1))
    vectors = vectors * scale[:, None]
    pivots = qr(vectors.T, mode="r", pivoting=True)[1][:clusters]
    left, _, right = svd(vectors[pivots].T)
    return np.abs(vectors @ (left @ right)).argmax(1).tolist()
