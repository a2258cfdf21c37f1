"""How many nats do two variables share, and is the estimate to be trusted?

Neural estimates of mutual information overfit: they come out too high on few samples, say nothing
of it, and cannot exceed the logarithm of the batch. Here each estimate is read off where it is best
on held-out rows, repeated on ever smaller parts of the sample, and extrapolated to infinitely many
rows; what does not hold on the way is said in words (Abdelaleem, Martini and Nemenman 2025, arXiv
2506.00330, and their library NeuralMI). For analysis after a run: it trains many small networks.
"""

from entropylens.mutual_information.bounds import infonce, smile
from entropylens.mutual_information.estimate import Estimate, estimate_mutual_information
from entropylens.mutual_information.extrapolation import Extrapolation, Row, extrapolate

__all__ = [
    "Estimate",
    "Extrapolation",
    "Row",
    "estimate_mutual_information",
    "extrapolate",
    "infonce",
    "smile",
]
