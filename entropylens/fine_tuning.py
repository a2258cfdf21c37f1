"""Which parameters to fine-tune, by the singular values of their matrices."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import inf, isnan
from statistics import fmean
from typing import Final

from torch import nn

from entropylens.capture.head import unwrapped
from entropylens.capture.matrices import Matrix, matrices_of
from entropylens.diagnostics._spectra import (
    Summary,
    null_entropy_deficit,
    null_log_kappa,
    singular_values,
    summarise,
)
from entropylens.errors import unknown_name

__all__ = ["HEADS", "Selection", "select_tensors"]

HEADS: Final = ("lm_head.*", "*.lm_head.*", "head.*", "*.head.*", "embed_out.*", "*.embed_out.*")
"""Names of output heads that are not tied to the embeddings."""

_FEW: Final = 3
_NOT_A_NUMBER: Final = "its score is not a number: it holds NaN or infinity, or only zeros"


def _log_kappa(summary: Summary) -> float:
    known = summary.kappa if summary.is_kappa_known else summary.kappa_floor
    return float(known.log())


def _deficit(summary: Summary) -> float:
    deficit = float(summary.entropy_deficit)
    return deficit if summary.is_volume_known or isnan(deficit) else inf


_RULES: Final[Mapping[str, Callable[[Summary, int, int], float]]] = {
    "kappa_to_null": lambda summary, m, n: _log_kappa(summary) - null_log_kappa(m, n),
    "entropy_deficit": lambda summary, m, n: _deficit(summary) - null_entropy_deficit(m, n),
    "kappa": lambda summary, m, n: float(summary.sigma_max / summary.sigma_min),
}


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Parameters to fine-tune, and why these."""

    names: tuple[str, ...]
    """Of the chosen ones, in order of rank."""
    always: tuple[str, ...]
    """Of those that are trained beside them, without having been ranked."""
    scores: Mapping[str, float]
    """Of all that were ranked, lowest first, chosen or not."""
    left_out: Mapping[str, str]
    """Of every other parameter: why."""
    by: str
    """What was ranked by."""
    parameters: int
    """How many numbers ``names`` and ``always`` hold."""
    share: float
    """Of all the model's parameters."""

    def apply(self, model: nn.Module) -> None:
        """Let these parameters be trained, and no others.

        Sets ``requires_grad`` of every parameter of the model: true for ``names`` and ``always``,
        false for all others, whatever it was before. Make the optimiser afterwards.

        Args:
            model: The one that was selected from, or another with the same names.

        Raises:
            ValueError: The model lacks one of the names.
        """
        chosen, found = {*self.names, *self.always}, dict(unwrapped(model).named_parameters())
        for name in sorted(chosen - found.keys()):
            raise ValueError(unknown_name("Selection.apply", "parameter of the model", name, found))
        for name, parameter in found.items():
            parameter.requires_grad_(name in chosen)


def select_tensors(
    model: nn.Module,
    budget: float | int,
    *,
    by: str | Mapping[str, float] = "kappa_to_null",
    skip: Sequence[str] = HEADS,
    always: Sequence[str] = (),
) -> Selection:
    """Which weight matrices have the most even singular values, as many as a budget allows?

    KappaTune fine-tunes those of low condition number, kappa = sigma_max / sigma_min, so that less
    be forgotten. In our own experiment (a character model of 1.07 M parameters, code then prose, 3
    seeds, benchmarks/kappa_selection.py) no rule beat a random choice of the same size beyond
    noise. At 10 % of the parameters and equal loss on prose, nats forgotten of code less those of
    the random choice, where above 0 is worse: ``"kappa_to_null"`` +0.016 +- 0.014,
    ``"entropy_deficit"`` +0.033 +- 0.010, ``"kappa"`` as released +0.001 +- 0.003.

    A fresh random matrix has a kappa that its shape alone decides (3 at 256 x 1024, about 1,300 at
    512 x 512), so a ranking by kappa puts rectangular matrices before square ones, trained or not.
    Here each is compared with a random matrix of its own shape, by ``by``:

    - ``"kappa_to_null"``: ``log kappa - E log kappa`` of Gaussian entries, nats.
    - ``"entropy_deficit"``: ``(k/2) log(||W||_F^2 / k) - sum_i log sigma_i``, less its mean for
      Gaussian entries, nats: the whole spectrum, where kappa sees its two ends. It is a sum over
      the k singular values: large matrices can have more of it.
    - ``"kappa"``: as released, without regard to shape.
    - scores of your own by parameter name; what is not named is left out.

    The lowest come first, equal ones by name. Going down, each is taken that still fits the budget.
    Where storage hides the smallest singular value, the least kappa that is certain counts for
    ``"kappa_to_null"``; where it hides the deficit, as in a matrix of lower rank, the score is
    infinite for ``"entropy_deficit"``. A stack of experts has the mean of its matrices' scores.

    The released code differs: it takes the singular values of tensors of more than two axes in
    batches and then drops these tensors by an exception that is only logged; its LoRA variant draws
    twice as many and keeps an arbitrary half, the order of a set, so that the ranking is lost;
    it computes singular vectors, which it does not use; PEFT's selector adds 1e-8 to sigma_min,
    a different number for each scale of the weights. Both count tensors, here their entries count.

    Embeddings are left out, and with them a head that is tied to one; so are ``skip``, biases,
    norms and all else that is no matrix, a LoRA adapter's factors (select before adding one) and
    what cannot be read (quantised, sharded, on the meta device). A head that is new needs
    ``always``.

    Args:
        model: Any module; nothing of it is changed.
        budget: A share of all parameters in 0..1 as a float, or so many of them as an int: 1.0 is
            all, 1 is a single one. ``always`` does not count.
        by: What to rank by.
        skip: Patterns, with ``*`` and ``?``, of parameters to leave out.
        always: Patterns of parameters to train in any case, such as ``"score.*"`` or ``"*norm*"``;
            they are not ranked.

    Returns:
        The selection; `Selection.apply` sets ``requires_grad`` by it.

    Raises:
        ValueError: The budget is no share or count, or below the smallest matrix; ``by`` is not
            known; a pattern of ``always`` matches nothing; nothing can be ranked.

    Device: the weights'; waits for it once a matrix.
    Cost: the singular values of every matrix that is ranked, one at a time in memory.
    Source: Ludwig (2025), KappaTune, arXiv 2506.16289; the correction for shape is ours.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        >>> _ = nn.init.eye_(model[1].weight)
        >>> found = select_tensors(model, 0.5)
        >>> found.names, found.share
        (('1.weight',), 0.4)
        >>> found.apply(model)
        >>> [name for name, value in model.named_parameters() if value.requires_grad]
        ['1.weight']
    """
    model = unwrapped(model)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    allowed = _allowed(budget, sum(sizes.values()))
    for pattern in (one for one in always if not _matching(sizes, [one])):
        raise ValueError(unknown_name("select_tensors", "parameter or pattern", pattern, sizes))
    trained = _matching(sizes, always)
    if isinstance(by, str):
        left_out = _not_ranked(model, skip)
        ranked, unread = _ranked(model, by, {*left_out, *trained})
        left_out |= unread
    else:
        ranked, left_out = _by_own_scores(sizes, by, trained)
    if not ranked:
        reasons = left_out | dict.fromkeys(trained, "matches always")
        raise ValueError(
            f"select_tensors: expected a matrix that can be ranked, got {_in_words(reasons)}"
        )
    names = _within(allowed, ranked, sizes)
    left_out |= dict.fromkeys(ranked, "beyond the budget")
    if not names:
        smallest = min(sizes[name] for name in ranked)
        raise ValueError(
            f"select_tensors: expected a budget of at least {smallest} parameters, the smallest "
            f"matrix, got {budget}"
        )
    chosen = [*names, *trained]
    count = sum(sizes[name] for name in chosen)
    return Selection(
        names=tuple(names),
        always=tuple(trained),
        scores=ranked,
        left_out={name: left_out[name] for name in sizes if name not in chosen},
        by=by if isinstance(by, str) else "scores",
        parameters=count,
        share=count / sum(sizes.values()),
    )


def _allowed(budget: float | int, total: int) -> int:
    is_share = isinstance(budget, float) and 0 < budget <= 1
    is_count = isinstance(budget, int) and not isinstance(budget, bool) and 0 < budget <= total
    if not is_share and not is_count:
        raise ValueError(
            f"select_tensors: expected a budget as a float in 0..1, or as an int of 1 to {total} "
            f"parameters, got {budget!r}"
        )
    return int(budget * total) if is_share else int(budget)


def _within(allowed: int, ranked: Iterable[str], sizes: Mapping[str, int]) -> list[str]:
    """Going down the ranking, each that still fits."""
    names = []
    for name in ranked:
        if sizes[name] <= allowed:
            names.append(name)
            allowed -= sizes[name]
    return names


def _matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _not_ranked(model: nn.Module, skip: Sequence[str]) -> dict[str, str]:
    """Why a parameter is left out, where its place tells."""
    tables = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for parameter in module.parameters(recurse=False)
    }
    found = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in tables:
            found[name] = "an embedding"
        elif _matching([name], skip):
            found[name] = "matches skip"
        elif ".lora_" in name:
            found[name] = "a factor of an adapter"
    return found


def _ranked(
    model: nn.Module, by: str, known: Collection[str]
) -> tuple[dict[str, float], dict[str, str]]:
    """Scores of what is not known, lowest first, and why the rest has none."""
    if by not in _RULES:
        raise ValueError(unknown_name("select_tensors", "score", by, _RULES))
    found = matrices_of(model)
    parts = defaultdict[str, list[float]](list)
    for matrix in found.matrices:
        if len(matrix.parameters) == 1 and matrix.parameters[0] not in known:
            parts[matrix.parameters[0]].append(_score(matrix, by))
    means = {name: fmean(scores) for name, scores in parts.items()}
    left_out = {name: "no matrix" for name, _ in model.named_parameters() if name not in means}
    left_out |= found.refused
    left_out |= dict.fromkeys(filter(lambda name: isnan(means[name]), means), _NOT_A_NUMBER)
    return _sorted(means), {name: why for name, why in left_out.items() if name not in known}


def _by_own_scores(
    names: Collection[str], scores: Mapping[str, float], trained: Collection[str]
) -> tuple[dict[str, float], dict[str, str]]:
    for name in (one for one in scores if one not in names):
        raise ValueError(unknown_name("select_tensors", "parameter of the model", name, names))
    left_out = {name: _NOT_A_NUMBER if name in scores else "it has no score" for name in names}
    return _sorted({name: scores[name] for name in scores if name not in trained}), left_out


def _in_words(left_out: Mapping[str, str]) -> str:
    """Why each was left out, the same reason once."""
    names = defaultdict[str, list[str]](list)
    for name, why in left_out.items():
        names[why].append(name)
    said = (
        f"{', '.join(some[:_FEW])}{f' and {len(some) - _FEW} more' if some[_FEW:] else ''} ({why})"
        for why, some in names.items()
    )
    return "; ".join(said) or "a model without parameters"


def _sorted(scores: Mapping[str, float]) -> dict[str, float]:
    numbers = {name: score for name, score in scores.items() if not isnan(score)}
    return dict(sorted(numbers.items(), key=lambda item: (item[1], item[0])))


def _score(matrix: Matrix, by: str) -> float:
    values = singular_values(matrix.read())
    return _RULES[by](summarise(values, matrix.shape, matrix.stored), *matrix.shape)
