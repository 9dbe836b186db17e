"""The choice of a recipe per layer against all choices there are, and its bound."""

from itertools import product

import numpy as np
import pytest

from awq_pycuda.analysis.knapsack import cheapest


def everything(costs, sizes, room):
    """The least cost of all choices that fit, by trying each."""
    layers = range(costs.shape[1])
    fitting = [
        sum(costs[one, layer] for one, layer in zip(choice, layers, strict=True))
        for choice in product(range(len(costs)), repeat=costs.shape[1])
        if sum(sizes[one, layer] for one, layer in zip(choice, layers, strict=True)) <= room
    ]
    return min(fitting)


@pytest.mark.parametrize("seed", range(12))
def test_no_choice_is_below_the_bound_and_the_chosen_one_is_near_it(seed):
    rng = np.random.default_rng(seed)
    weights = rng.integers(1, 5, 6) * 64
    bits = np.array([3.25, 4.25, 8.03])
    sizes = bits[:, None] * weights
    costs = rng.random(6) * 4.0 ** -bits[:, None] * rng.uniform(0.5, 1.5, (3, 6))
    room = float(weights.sum() * rng.uniform(3.3, 7.5))
    found = cheapest(costs, sizes, room)
    layers = np.arange(6)
    assert found.size == pytest.approx(sizes[found.choice, layers].sum(), rel=1e-12)
    assert found.cost == pytest.approx(costs[found.choice, layers].sum(), rel=1e-12)
    assert found.size <= room
    best = everything(costs, sizes, room)
    assert found.bound <= best * (1 + 1e-12)
    assert best <= found.cost * (1 + 1e-12)
    # What a step that does not fit leaves is at most one layer's.
    assert found.cost - found.bound <= costs.max(axis=0).max()


def test_where_every_layer_is_alike_in_size_the_plan_is_the_best_there_is():
    costs = np.array([[9.0, 4.0, 1.0, 7.0], [1.0, 1.0, 0.5, 6.5]])
    sizes = np.array([[3.0] * 4, [4.0] * 4])
    found = cheapest(costs, sizes, 14)
    assert found.choice.tolist() == [1, 1, 0, 0]
    assert (found.cost, found.size, found.bound) == (10.0, 14.0, 10.0)


def test_a_choice_that_costs_more_for_more_size_is_never_taken():
    costs = np.array([[1.0], [3.0], [0.9]])
    sizes = np.array([[3.0], [4.0], [9.0]])
    assert cheapest(costs, sizes, 5).choice.tolist() == [0]
    assert cheapest(costs, sizes, 9).choice.tolist() == [2]


def test_a_layer_whose_step_does_not_fit_leaves_room_for_others():
    costs = np.array([[10.0, 1.0], [0.0, 0.5]])
    sizes = np.array([[10.0, 1.0], [20.0, 2.0]])
    found = cheapest(costs, sizes, 12)
    assert found.choice.tolist() == [0, 1]
    assert found.bound == 10 + 1 - 1.0  # one tenth of the step of the first
    with pytest.raises(ValueError, match="smallest"):
        cheapest(costs, sizes, 10)


def test_equal_sizes_take_the_cheaper_and_the_same_choice_whatever_runs_before():
    costs = np.array([[2.0, 1.0], [1.0, 2.0]])
    sizes = np.ones((2, 2))
    assert cheapest(costs, sizes, 2).choice.tolist() == [1, 0]
