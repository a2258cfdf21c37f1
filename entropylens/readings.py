"""What a diagnostic may read: one class for each thing that a training shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "READINGS",
    "AttentionReading",
    "AttentionRows",
    "ControlReading",
    "GradientReading",
    "MatricesReading",
    "OptimizerReading",
    "PolicyReading",
    "PreferenceReading",
    "ProbeReading",
    "RepresentationReading",
    "RolloutReading",
    "RouterReading",
    "SampledReading",
    "StepReading",
    "TokenReading",
    "UpdateReading",
    "WeightReading",
]


@dataclass(frozen=True, kw_only=True)
class TokenReading:
    """Measured tokens of one optimiser step, all micro-batches together, ``n`` in number.

    Tokens are all scored ones, or a uniform sample without replacement of each micro-batch.
    """

    logprob: Tensor
    """``[n]`` log-probability of the target, nats."""
    entropy: Tensor
    """``[n]`` Shannon entropy of the predictive distribution, nats."""
    varentropy: Tensor | None = None
    """``[n]`` variance of the log-probability under it, nats squared."""
    max_probability: Tensor | None = None
    """``[n]`` probability of the most probable token."""
    sum_squared_probabilities: Tensor | None = None
    """``[n]`` sum_i p_i^2."""
    expected_discriminator: Tensor | None = None
    """``[n]`` N = E_p[S], S_i = p_i (log p_i + H), nats."""
    present: Tensor
    """``[n]`` bool: false where a slot holds no scored token."""
    weight: Tensor
    """``[n]`` scored tokens that each row stands for; 0 where not present."""
    position: Tensor
    """``[n]`` index among the scored tokens of its sequence, from 0."""
    sequence: Tensor
    """``[n]`` index into ``sequence_tokens`` and ``sample_ids``."""
    token_id: Tensor
    """``[n]`` the target."""
    distribution_weight: Tensor | None = None
    """``[n]`` scored tokens that each row stands for in the statistics above that may be None, 0
    where the row's whole distribution was not looked at: a fused head gives ``logprob`` and
    ``entropy`` of every token, the rest only a sample's. None is ``weight``."""
    key: Tensor
    """``[n]`` independent uniform numbers in 0..1, for whoever needs a uniform sub-sample: the
    smallest keys are one. Drawn from a generator of our own, never from the training's."""
    sequence_tokens: Tensor
    """``[sequences]`` scored tokens of every sequence of the step."""
    sample_ids: Sequence[str] | None = None
    """Identifier of each sequence, where the loop gave them."""
    vocabulary: int
    """Number of classes, V; 0 where it is not known."""
    grids: Sequence[tuple[int, int]] | None = None
    """``(rows, columns)`` of each micro-batch when every position is there in order, else None."""


@dataclass(frozen=True, kw_only=True)
class PolicyReading:
    """Tokens that a policy-gradient step learns from: ``n`` rows, those of ``tokens``.

    What stands in rows where ``tokens.present`` is false, or in sequences without a reward, means
    nothing.
    """

    tokens: TokenReading
    """The policy as this step's loss sees it, at its temperature; targets are what was sampled."""
    advantage: Tensor
    """``[n]`` A of each token, as the loss uses it."""
    old_logprob: Tensor | None = None
    """``[n]`` log-probability under the policy that the importance ratio is taken against, nats.
    None where that is this very policy: every ratio is exactly 1."""
    sampler_logprob: Tensor | None = None
    """``[n]`` log-probability that the engine which drew the token gave it, nats; NaN where it did
    not tell."""
    reference_logprob: Tensor | None = None
    """``[n]`` log-probability under the reference policy, nats."""
    reverse_kl: Tensor | None = None
    """``[n]`` KL(policy || teacher) of whole distributions, nats, where a teacher's are there."""
    forward_kl: Tensor | None = None
    """``[n]`` KL(teacher || policy) of whole distributions, nats."""
    clip: tuple[float, float] | None = None
    """``(low, high)``: the loss stops learning from a token whose ratio is below 1 - low with
    A < 0, or above 1 + high with A > 0. None is no clipping."""
    ratio_level: str = "token"
    """``token``, or where the loss takes one log-ratio a sequence: ``sequence`` if that is its
    tokens' mean (GSPO), ``product`` if it is their sum (RLOO)."""
    loss_weight: Tensor | None = None
    """``[n]`` factor by which the loss multiplies a token's term beside its ratio and advantage:
    0 where it leaves it out. None is 1 everywhere."""
    is_pull_known: bool = True
    """Whether ratio, advantage, clip and ``loss_weight`` are all that the loss takes of a token. If
    not, what would follow from its pull is not known."""
    answers: Tensor | None = None
    """``[n]`` bool: the token comes after the thinking delimiter; the delimiter is in neither."""
    thoughts: Tensor | None = None
    """``[n]`` bool: the token comes before it."""
    reward: Tensor | None = None
    """``[sequences]`` total reward; NaN where there is none."""
    correct: Tensor | None = None
    """``[sequences]`` 1 where the completion is right, else 0; NaN where that is not known."""
    pass_rate: Tensor | None = None
    """``[sequences]`` share of right completions in the sequence's whole group, 0..1; NaN where
    that is not known."""
    group: Tensor | None = None
    """``[sequences]`` index of the prompt that the sequence answers. A group may be here in part:
    trainers shuffle; what needs whole groups reads a `RolloutReading`."""
    prompts: Sequence[str] | None = None
    """Text of each sequence's prompt, where the run keeps text."""
    completions: Sequence[str] | None = None
    """Text of each sequence, where the run keeps text."""


@dataclass(frozen=True, kw_only=True)
class RolloutReading:
    """Completions of one generation, ``n`` in number, before anything shuffled them.

    Under several ranks a rank holds its own completions if its groups are whole; where groups cross
    ranks, rank 0 holds the rewards of all and the others None.
    """

    group: Tensor | None = None
    """``[n]`` long: index of the prompt, 0 .. groups - 1; members of a group stand together."""
    group_size: int | None = None
    """Completions of each prompt, G; ``n`` is a multiple of it. None where groups are not known, or
    not all of one size: what compares them is then absent."""
    reward: Tensor | None = None
    """``[n]`` total reward as the trainer weighs it; NaN where nothing could be scored."""
    rewards: Mapping[str, Tensor] = field(default_factory=dict)
    """By component, ``[n]``; NaN where it did not apply."""
    correct: Tensor | None = None
    """``[n]`` 1 where the completion is right, else 0; NaN where that is not known."""
    answer: Tensor | None = None
    """``[n]`` long: completions of one group with the same number are the same answer."""
    token_id: Tensor | None = None
    """``[m, T]`` tokens of this rank's own completions, ``m`` in number."""
    mask: Tensor | None = None
    """``[m, T]`` bool: true where a token belongs to the completion."""
    truncated: Tensor | None = None
    """``[m]`` bool: the completion reached the length limit without an end."""
    seconds: float | None = None
    """Wall time of generating and scoring."""


@dataclass(frozen=True, kw_only=True)
class PreferenceReading:
    """Sequences that one optimiser step learns a preference from, ``n`` in number.

    All micro-batches together; what one of them lacks is None.
    """

    chosen: Tensor
    """``[n]`` bool: the sequence is the preferred one, or a desirable one."""
    paired: bool
    """Rows are halves, the chosen and then the rejected ones: row i and row n/2 + i answer the same
    prompt."""
    logprob: Tensor | None = None
    """``[n]`` log-probability of the sequence, summed over its scored tokens, nats."""
    reference_logprob: Tensor | None = None
    """``[n]`` the same under the reference policy."""
    entropy: Tensor | None = None
    """``[n]`` entropies of its scored tokens, summed, nats."""
    tokens: Tensor | None = None
    """``[n]`` how many scored tokens it has."""
    reward: Tensor | None = None
    """``[n]`` what a reward model gives it."""


@dataclass(frozen=True, kw_only=True)
class SampledReading:
    """Tokens that this very policy drew, none left out by what they or their rewards are.

    ``n`` rows in the order of time within each sequence: all tokens, or a sample chosen without
    looking at them.
    """

    surprisal_gap: Tensor
    """``[n]`` Y = -log p(token) - H, nats."""
    varentropy: Tensor
    """``[n]`` Var_p(log p), nats squared."""
    cumulant: Tensor
    """``[len(exponents), n]`` psi(lam) = log E_p exp(lam Y), nats."""
    exponents: tuple[float, ...]
    """The lam."""
    present: Tensor
    """``[n]`` bool."""


@dataclass(frozen=True, kw_only=True)
class ProbeReading:
    """Distributions at ``m`` states before and after one update of the weights.

    The states are tokens of the step's own batch, chosen without looking at them.
    """

    before: Tensor
    """``[m, V]`` logits at the loss's temperature, float32."""
    after: Tensor
    """``[m, V]`` logits at the same states after the update."""
    direction: Tensor
    """``[m, V]`` derivative of the logits along the update: what they change by to first order."""
    is_exact: bool = True
    """Whether ``direction`` was differentiated, or taken from a finite difference."""
    weight: Tensor
    """``[m]`` scored tokens that each state stands for; 0 where there is none."""
    token_id: Tensor | None = None
    """``[m]`` what was sampled there, or is the target; None where that is not known."""
    position: Tensor
    """``[m]`` index among the scored tokens of its sequence."""
    sequence: Tensor
    """``[m]`` number of the sequence within the step."""
    sample_ids: Sequence[str] | None = None
    """Identifier of each sequence of the step, where the loop gave them."""
    advantage: Tensor | None = None
    """``[m]`` A, where the step is a policy's and its loss is known."""
    log_ratio: Tensor | None = None
    """``[m]`` log of the importance ratio as the loss takes it; None where the policy itself drew
    the tokens: every ratio is 1."""
    loss_weight: Tensor | None = None
    """``[m]`` as in `PolicyReading`."""
    clip: tuple[float, float] | None = None
    """As in `PolicyReading`."""


@dataclass(frozen=True, kw_only=True)
class RouterReading:
    """What the routers of a mixture of experts decided in one training forward."""

    logits: Mapping[str, Tensor]
    """By layer, ``[tokens, experts]``."""
    present: Tensor | None = None
    """``[tokens]`` bool: true where a token is not padding; None is everywhere."""
    experts_per_token: int | None = None
    """Experts that each token is sent to, where the model says."""


@dataclass(frozen=True, kw_only=True)
class GradientReading:
    """Gradients of one optimiser's parameters, of this rank, without a loss scale."""

    gradients: Mapping[str, Tensor]
    """By parameter name; a sharded one (DTensor) is this rank's part."""
    optimizer: str = ""
    """Which optimiser's, where there are several."""
    norm: Tensor
    """``[]`` Euclidean norm of all of them (`entropylens.diagnostics.gradient_norm.total_norm`)."""
    clipped: bool = True
    """As the optimiser uses them; false before clipping, where a trainer shows them so."""


@dataclass(frozen=True, kw_only=True)
class UpdateReading:
    """One optimiser's trainable parameters before and after its step."""

    before: Mapping[str, Tensor]
    after: Mapping[str, Tensor]
    optimizer: str = ""
    """Which optimiser's, where there are several."""
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    """By parameter name, as the optimiser used them, without a loss scale; empty where the step
    left none behind."""
    second_moments: Mapping[str, Tensor] = field(default_factory=dict)
    """``exp_avg_sq`` of Adam and its like after the step, of a parameter's shape; parameters whose
    optimiser keeps none, or keeps it quantised or factored, are left out."""
    bias_corrections: Mapping[str, Tensor | float] = field(default_factory=dict)
    """``[]`` 1 - beta_2^t by parameter name: what ``second_moments`` are divided by; a parameter
    that is left out here has none."""


@dataclass(frozen=True, kw_only=True)
class WeightReading:
    """One matrix of the model's weights after a step: each is shown in its turn."""

    name: str
    """Of the parameter; of one expert of a fused mixture ``NAME[i]``, of a LoRA adapter
    ``NAME.lora`` for the product B A with its scale and ``NAME+lora`` for the sum."""
    matrix: Tensor
    """``[out, in]``, any floating dtype; of a convolution ``[out, in * kernel]``."""
    stored: torch.dtype
    """Precision of what is stored, which may be less than the matrix's: what rounding it has."""
    rank: int | None = None
    """Largest rank by construction, of a LoRA product; None is what the shape allows."""
    matrices: int = 1
    """How many are shown in turn, products of thin factors left out."""


@dataclass(frozen=True, kw_only=True)
class MatricesReading:
    """All matrices of the trained weights after a step, as `WeightReading` names them."""

    matrices: Mapping[str, Tensor]
    """``[out, in]``, any floating dtype."""


@dataclass(frozen=True, kw_only=True)
class RepresentationReading:
    """Hidden states of some layers at the rows of a probe set that stays the same all run long.

    The model runs without gradients, in evaluation mode. Rows are entries of the batches that the
    probe set was made of, or, where each of them is a sequence that is scored at every position,
    positions drawn from them.
    """

    states: Mapping[str, Tensor]
    """By layer ``[N, D]``, float32; of layers with further axes the mean over them, padding left
    out."""
    labels: Sequence[int] | None = None
    """Class of each row, or its target token; None where that is not known."""
    input_clusters: Sequence[int] | None = None
    """Cluster of each row by the inputs alone, where they are real numbers."""
    are_tokens: bool = False
    """Whether rows are positions of sequences."""


@dataclass(frozen=True, kw_only=True)
class AttentionRows:
    """What a few queries of one attention layer attend to; m queries, H heads."""

    entropy: Tensor
    """``[m, H]`` Shannon entropy of each query's weights, nats."""
    reach: Tensor
    """``[m]`` keys that each query may attend to: t + 1 for position t under a causal mask."""
    largest_logit: Tensor
    """``[m, H]`` max_j of q k_j / sqrt(d), as the softmax gets it, masks applied."""
    log_partition: Tensor
    """``[m, H]`` log sum_j exp of the same, nats."""


@dataclass(frozen=True, kw_only=True)
class AttentionReading:
    """Attention of the model's layers at queries of a probe set that stays the same all run."""

    layers: Mapping[str, AttentionRows]
    """By the module that attends, in order."""


@dataclass(frozen=True, kw_only=True)
class OptimizerReading:
    """What one optimiser's step shows without looking at a tensor's content."""

    name: str = ""
    """Empty where the run has one optimiser."""
    loss: Tensor | float | None = None
    """``[]`` the loss that this optimiser alone follows, where each has its own."""
    learning_rates: Sequence[Tensor | float] = ()
    """One for each parameter group, as used by this step."""
    gradient_norm_before_clip: Tensor | float | None = None
    gradient_norm_after_clip: Tensor | None = None
    """In steps in which gradients are due; never of a rank's part alone."""
    skipped: Tensor | float | None = None
    """``[]`` 1 where the step was called off (a gradient scaler found an overflow), else 0."""


@dataclass(frozen=True, kw_only=True)
class ControlReading:
    """What a controller did to a step; numbers of the host."""

    step_scale: float
    """Factor that the step was made smaller by, or in shadow mode would have been; 1 is as it
    came, 0 no step."""
    looks: int
    """Steps looked at since the run, or its part since a resume, began."""
    interventions: int
    """Steps made smaller or left out since then."""


@dataclass(frozen=True, kw_only=True)
class StepReading:
    """What is known at the end of an optimiser step without looking at a tensor's content."""

    loss: Tensor | float | None = None
    """``[]`` mean loss of the step as the trainer defines it."""
    optimizers: Sequence[OptimizerReading] = ()
    tokens: Tensor | None = None
    """``[]`` scored tokens of this step on this rank."""
    tokens_seen: Tensor | None = None
    """``[]`` scored tokens since the first step of the run; None once a step was not counted."""
    seconds: float | None = None
    """Wall time of the step; evaluation and checkpoints between steps left out."""
    device_memory: int | None = None
    """Bytes allocated on the accelerator."""
    resident_memory: int | None = None
    """Bytes of this process in host memory."""
    overhead: float | None = None
    """Share of wall time that entropylens took since it was last written."""
    rows: int | None = None
    """Tokens measured a step at most, as the overhead budget has it now."""
    widening: int | None = None
    """Factor by which the overhead budget widens intervals now."""


READINGS: Final[Mapping[str, type]] = {
    "tokens": TokenReading,
    "policy": PolicyReading,
    "rollout": RolloutReading,
    "preference": PreferenceReading,
    "sampled": SampledReading,
    "probe": ProbeReading,
    "router": RouterReading,
    "gradients": GradientReading,
    "update": UpdateReading,
    "weight": WeightReading,
    "matrices": MatricesReading,
    "representation": RepresentationReading,
    "attention": AttentionReading,
    "step": StepReading,
    "control": ControlReading,
}
"""What a diagnostic may read, by the word it is declared with."""
