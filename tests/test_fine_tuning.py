import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import entropylens as el
from entropylens.fine_tuning import Selection, select_tensors

RULES = ("kappa_to_null", "entropy_deficit", "kappa")


def with_spectrum(*sigma: float, columns: int | None = None, seed: int = 0) -> Tensor:
    """A matrix with these singular values."""
    drawn = torch.Generator().manual_seed(seed)
    k, n = len(sigma), columns or len(sigma)
    left = torch.linalg.qr(torch.randn(k, k, generator=drawn))[0]
    right = torch.linalg.qr(torch.randn(n, n, generator=drawn))[0]
    return left @ torch.diag(torch.tensor(sigma)) @ right[:k]


def model_of(weights: Mapping[str, Tensor], bias: bool = False) -> nn.Module:
    model = nn.Module()
    for name, value in weights.items():
        linear = nn.Linear(value.shape[1], value.shape[0], bias=bias)
        linear.weight.data.copy_(value)
        model.add_module(name, linear)
    return model


class Block(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width // 4, bias=False)
        self.up = nn.Linear(width, 4 * width)


class Transformer(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(40, 16)
        self.positions = nn.Parameter(torch.randn(1, 8, 16))
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.conv = nn.Conv1d(16, 8, 3)
        self.lm_head = nn.Linear(16, 40, bias=False)
        if tied:
            self.lm_head.weight = self.tokens.weight


def trained(model: nn.Module) -> set[str]:
    return {name for name, value in model.named_parameters() if value.requires_grad}


# -- scores ---------------------------------------------------------------------------------------


def test_scores_are_those_of_numpy_less_what_random_matrices_of_the_shape_have() -> None:
    torch.manual_seed(1)
    model = Transformer()
    scores = {by: select_tensors(model, 1.0, by=by).scores for by in RULES}
    drawn = np.random.default_rng(0)
    for name, parameter in model.named_parameters():
        if name not in scores["kappa"]:
            continue
        rows = parameter.shape[1 if name == "positions" else 0]
        matrix = parameter.detach().double().numpy().reshape(rows, -1)
        sigma = np.linalg.svd(matrix, compute_uv=False)
        random = np.linalg.svd(drawn.standard_normal((400, *matrix.shape)), compute_uv=False)
        chance = np.log(random[:, 0] / random[:, -1])
        assert scores["kappa"][name] == pytest.approx(sigma[0] / sigma[-1], rel=1e-5)
        expected = np.log(sigma[0] / sigma[-1]) - chance.mean()
        error = 4 * chance.std() / 20 + 0.1  # what the null is off by at such small shapes
        assert scores["kappa_to_null"][name] == pytest.approx(expected, abs=error)
        deficits = np.log((random**2).mean(1)) * len(sigma) / 2 - np.log(random).sum(1)
        own = np.log((sigma**2).mean()) * len(sigma) / 2 - np.log(sigma).sum()
        error = 4 * deficits.std() / 20
        assert scores["entropy_deficit"][name] == pytest.approx(own - deficits.mean(), abs=error)


def test_a_ranking_by_kappa_sorts_by_shape_and_the_corrected_ones_do_not() -> None:
    drawn = torch.Generator().manual_seed(0)
    weights = {}
    for at in range(12):
        weights[f"square{at}"] = torch.randn(24, 24, generator=drawn)
        weights[f"wide{at}"] = torch.randn(24, 96, generator=drawn)
    model = model_of(weights)

    def wide_in_half(by: str) -> int:
        return sum("wide" in name for name in [*select_tensors(model, 1.0, by=by).scores][:12])

    assert wide_in_half("kappa") == 12
    assert 2 <= wide_in_half("kappa_to_null") <= 10
    assert 2 <= wide_in_half("entropy_deficit") <= 10


def test_the_deficit_sees_what_the_two_ends_do_not() -> None:
    ends = with_spectrum(4.0, 1.9, 2.0, 2.1, 2.0, 2.0, 2.0, 1.0)
    whole = with_spectrum(4.0, 4.0, 4.0, 4.0, 1.1, 1.1, 1.1, 1.1)
    model = model_of({"ends": ends, "whole": whole})
    assert [*select_tensors(model, 1.0, by="kappa").scores] == ["whole.weight", "ends.weight"]
    assert [*select_tensors(model, 1.0, by="entropy_deficit").scores] == [
        "ends.weight",
        "whole.weight",
    ]


@pytest.mark.parametrize("by", RULES)
def test_scale_and_orientation_change_no_score(by: str) -> None:
    weight = with_spectrum(5.0, 3.0, 2.0, 1.0, columns=9)
    found = select_tensors(model_of({"a": weight, "b": 300 * weight, "c": weight.T}), 1.0, by=by)
    assert np.ptp([*found.scores.values()]) < 1e-4 * abs(found.scores["a.weight"])


def test_equal_scores_are_in_the_order_of_names() -> None:
    weight = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    model = model_of(dict.fromkeys("cadb", weight))
    for by in RULES:
        wanted = tuple(f"{name}.weight" for name in "abcd")
        assert select_tensors(model, 1.0, by=by).names == wanted


def test_a_matrix_of_lower_rank_comes_last_and_storage_bounds_its_score() -> None:
    drawn = torch.Generator().manual_seed(0)
    thin = torch.randn(16, 2, generator=drawn) @ torch.randn(2, 16, generator=drawn)
    weights = {"thin": thin, "full": torch.randn(16, 16, generator=drawn)}
    exact = select_tensors(model_of(weights), 1.0).scores
    coarse = select_tensors(model_of(weights).bfloat16(), 1.0).scores
    assert [*exact] == [*coarse] == ["full.weight", "thin.weight"]
    assert coarse["thin.weight"] < exact["thin.weight"] - 5
    in_numbers = select_tensors(model_of(weights).bfloat16().float(), 1.0).scores
    assert coarse["thin.weight"] < in_numbers["thin.weight"] - 0.3
    assert coarse["full.weight"] == pytest.approx(in_numbers["full.weight"])
    zero = select_tensors(model_of({"a": torch.diag(torch.tensor([1.0, 0.0]))}), 1.0, by="kappa")
    assert zero.scores == {"a.weight": math.inf}


def test_a_deficit_that_storage_hides_comes_last_and_a_matrix_without_one_is_left_out() -> None:
    drawn = torch.Generator().manual_seed(0)
    thin = torch.randn(16, 2, generator=drawn) @ torch.randn(2, 16, generator=drawn)
    steep = with_spectrum(*[10.0 ** (-at / 2) for at in range(16)])
    weights = {"thin": thin, "zero": torch.zeros(16, 16), "steep": steep.double()}
    weights["full"] = torch.randn(16, 16, generator=drawn)
    model = model_of(weights)
    model.thin.to(torch.bfloat16)
    found = select_tensors(model, 1.0, by="entropy_deficit")
    assert found.names == ("full.weight", "steep.weight", "thin.weight")
    assert found.scores["thin.weight"] == math.inf
    assert math.isfinite(found.scores["steep.weight"])
    assert [*found.left_out] == ["zero.weight"]


def test_experts_in_one_parameter_have_the_mean_of_their_scores() -> None:
    one, other = (with_spectrum(*values) for values in ((3.0, 2.0, 1.0), (9.0, 2.0, 1.0)))
    model = nn.Module()
    model.experts = nn.ParameterDict({"up": nn.Parameter(torch.stack([one, other]))})
    assert select_tensors(model, 1.0, by="kappa").scores["experts.up"] == pytest.approx(6, 1e-4)


# -- the budget -----------------------------------------------------------------------------------


def ranked_model() -> nn.Module:
    """Matrices of 16, 64, 16 and 4 entries, best conditioned first; 100 of 100 parameters."""
    return model_of(
        {
            "a": with_spectrum(1.0, 1.0, 1.0, 1.0),
            "b": with_spectrum(*[1.1] * 7, 1.0),
            "c": with_spectrum(9.0, 1.0, 1.0, 1.0),
            "d": with_spectrum(99.0, 1.0),
        }
    )


@pytest.mark.parametrize(
    ("budget", "names"),
    [
        (1.0, "abcd"),
        (0.99, "abc"),
        (0.95, "abd"),
        (0.8, "ab"),
        (0.36, "acd"),
        (0.2, "ad"),
        (0.04, "d"),
        (80, "ab"),
        (79, "acd"),
        (100, "abcd"),
        (4, "d"),
    ],
)
def test_going_down_the_ranking_each_that_still_fits_is_taken(
    budget: float | int, names: str
) -> None:
    model = ranked_model()
    found = select_tensors(model, budget, by="kappa")
    assert found.names == tuple(f"{name}.weight" for name in names)
    sizes = {name: value.numel() for name, value in model.named_parameters()}
    assert found.parameters == sum(sizes[name] for name in found.names)
    assert found.share == found.parameters / 100
    assert found.left_out == {
        name: "beyond the budget" for name in sizes if name not in found.names
    }
    assert [*found.scores] == [f"{name}.weight" for name in "abcd"]
    assert found.by == "kappa"


@pytest.mark.parametrize("budget", [0.0, -0.1, 1.01, 0, -3, 101, True, "10%", float("nan")])
def test_what_is_no_budget_is_refused(budget: Any) -> None:
    message = (
        f"expected a budget as a float in 0..1, or as an int of 1 to 100 parameters, got {budget!r}"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        select_tensors(ranked_model(), budget)


def test_a_budget_below_the_smallest_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 4 parameters, the smallest matrix, got 0\.03"):
        select_tensors(ranked_model(), 0.03)


# -- what is left out -----------------------------------------------------------------------------


def test_embeddings_heads_vectors_and_what_cannot_be_read_are_left_out_with_the_reason() -> None:
    model = Transformer()
    model.bad = nn.Linear(4, 4, bias=False)
    model.bad.weight.data[1, 1] = math.nan
    model.zero = nn.Linear(4, 4, bias=False)
    nn.init.zeros_(model.zero.weight)
    model.meta = nn.Linear(4, 4, bias=False, device="meta")
    model.integer = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    found = select_tensors(model, 1.0)
    matrices = {f"blocks.{at}.{name}.weight" for at in (0, 1) for name in ("q", "k", "up")}
    assert {*found.names} == {*found.scores} == matrices | {"positions", "conv.weight"}
    named = dict(model.named_parameters())
    assert found.left_out.keys() == named.keys() - {*found.names}
    reasons = {
        "tokens.weight": "an embedding",
        "lm_head.weight": "matches skip",
        "blocks.0.norm.weight": "no matrix",
        "blocks.1.up.bias": "no matrix",
        "bad.weight": "its score is not a number: it holds NaN or infinity, or only zeros",
        "zero.weight": "its score is not a number: it holds NaN or infinity, or only zeros",
        "meta.weight": "it is on the meta device, without values",
        "integer": "it is quantised (int8)",
    }
    assert {name: found.left_out[name] for name in reasons} == reasons


def test_a_tied_head_is_left_out_with_its_embedding_and_counts_once() -> None:
    found = select_tensors(Transformer(tied=True), 1.0, skip=())
    assert found.left_out["tokens.weight"] == "an embedding"
    assert not any("lm_head" in name for name in found.scores)
    parameters = {id(one): one.numel() for one in Transformer(tied=True).parameters()}
    assert found.share == pytest.approx(found.parameters / (sum(parameters.values())))
    assert "lm_head.weight" in select_tensors(Transformer(), 1.0, skip=()).scores


def test_patterns_leave_out_and_train_in_any_case() -> None:
    model = Transformer()
    found = select_tensors(model, 0.1, skip=("*.q.*",), always=("*norm*", "lm_head.weight"))
    assert found.always == tuple(
        name for name, _ in model.named_parameters() if "norm" in name or "lm_head" in name
    )
    assert not any(".q." in name for name in found.scores)
    assert found.left_out["blocks.0.q.weight"] == "matches skip"
    assert "lm_head.weight" not in found.left_out
    sizes = {name: value.numel() for name, value in model.named_parameters()}
    assert sum(sizes[name] for name in found.names) <= 0.1 * sum(sizes.values())
    assert found.parameters == sum(sizes[name] for name in (*found.names, *found.always))
    found.apply(model)
    assert trained(model) == {*found.names, *found.always}
    matrix = select_tensors(model, 1.0, always=("blocks.0.q.weight", "tokens.weight"))
    assert not {*matrix.always} & matrix.left_out.keys()
    assert "blocks.0.q.weight" not in matrix.scores
    assert "blocks.0.q.weight" not in matrix.names


def test_factors_of_an_adapter_are_left_out() -> None:
    config = LoraConfig(r=2, target_modules=["q", "up"])
    adapted: Any = get_peft_model(Transformer(), config)
    found = select_tensors(adapted, 1.0)
    factors = {name for name, _ in adapted.named_parameters() if ".lora_" in name}
    assert len(factors) == 8
    assert {found.left_out[name] for name in factors} == {"a factor of an adapter"}
    assert "base_model.model.blocks.0.q.base_layer.weight" in found.scores


# -- scores of one's own, applying ----------------------------------------------------------------


def test_own_scores_rank_what_they_name_and_nothing_else() -> None:
    model = ranked_model()
    found = select_tensors(model, 1.0, by={"d.weight": -1.0, "a.weight": 2.0, "c.weight": math.nan})
    assert found.names == ("d.weight", "a.weight")
    assert found.scores == {"d.weight": -1.0, "a.weight": 2.0}
    assert found.by == "scores"
    assert found.left_out["b.weight"] == "it has no score"
    assert found.left_out["c.weight"].startswith("its score is not a number")
    best_last = {name: -score for name, score in select_tensors(model, 1.0).scores.items()}
    assert [*select_tensors(model, 1.0, by=best_last).scores] == [*best_last][::-1]


def test_what_is_always_trained_is_not_ranked_by_own_scores_and_counts_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    own = {"0.weight": 1.0, "1.weight": 2.0}
    found = select_tensors(model, 0.5, by=own, always=["0.*"])
    assert (found.names, found.always) == (("1.weight",), ("0.weight", "0.bias"))
    assert found.scores == {"1.weight": 2.0}
    assert (found.parameters, found.share) == (36, 0.9)
    assert [*found.left_out] == ["1.bias"]


def test_where_nothing_can_be_ranked_the_reasons_are_told() -> None:
    model = nn.Sequential(nn.Embedding(4, 3), *[nn.LayerNorm(3) for _ in range(3)])
    who = "select_tensors: expected a matrix that can be ranked, got "
    vectors = "1.weight, 1.bias, 2.weight and 3 more (no matrix)"
    with pytest.raises(ValueError, match=re.escape(f"{who}0.weight (an embedding); {vectors}")):
        select_tensors(model, 1.0)
    linear = nn.Linear(2, 2)
    told = f"{who}bias (no matrix); weight (matches always)"
    with pytest.raises(ValueError, match=re.escape(told)):
        select_tensors(linear, 1.0, always=["weight"])
    with pytest.raises(ValueError, match=r"got weight, bias \(it has no score\)"):
        select_tensors(linear, 1.0, by={})
    with pytest.raises(ValueError, match="got a model without parameters"):
        select_tensors(nn.Module(), 1.0)


def test_unknown_names_are_answered_with_the_nearest() -> None:
    model = ranked_model()
    with pytest.raises(ValueError, match=r"expected a score .* got 'kapa'; did you mean 'kappa'"):
        select_tensors(model, 1.0, by="kapa")
    with pytest.raises(ValueError, match=r"got 'a\.wait'; did you mean 'a\.weight'"):
        select_tensors(model, 1.0, by={"a.wait": 1.0})
    with pytest.raises(ValueError, match=r"expected a parameter or pattern .* got 'norms\*'"):
        select_tensors(model, 1.0, always=("norms*",))
    with pytest.raises(ValueError, match=r"Selection\.apply: expected a parameter of the model"):
        select_tensors(Transformer(), 1.0).apply(model)


def test_applying_trains_the_chosen_and_no_others_and_selecting_changes_nothing() -> None:
    model = ranked_model()
    model.get_parameter("a.weight").requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = el.select_tensors(model, 0.36, by="kappa")
    assert isinstance(found, el.Selection)
    assert trained(model) == {"b.weight", "c.weight", "d.weight"}
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    found.apply(model)
    assert trained(model) == {"a.weight", "c.weight", "d.weight"}
    other = ranked_model()
    found.apply(other)
    assert trained(other) == trained(model)


def test_a_refused_apply_changes_nothing() -> None:
    model = ranked_model()
    found = Selection(
        names=("a.weight", "z.weight"),
        always=(),
        scores={},
        left_out={},
        by="kappa",
        parameters=1,
        share=0.1,
    )
    with pytest.raises(ValueError, match=r"z\.weight"):
        found.apply(model)
    assert len(trained(model)) == 4


def test_selecting_draws_no_random_numbers() -> None:
    model = Transformer()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    select_tensors(model, 0.5)
    assert torch.get_rng_state().equal(state)


def test_a_wrapped_model_has_the_names_of_the_one_within() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    wrapped = nn.DataParallel(model)
    chosen = select_tensors(wrapped, 0.5)
    assert chosen.names == select_tensors(model, 0.5).names
    chosen.apply(wrapped)
    assert sum(p.requires_grad for p in model.parameters()) == 1
