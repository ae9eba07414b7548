"""Averages of weights: torch's and timm's rules, over parameters and statistics alike."""

from __future__ import annotations

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

from src.average import WeightAverage, between, copied, load, mean

INTEGERS, STATISTICS = {"1.num_batches_tracked"}, {"1.running_mean", "1.running_var"}


def network(seed: int = 0) -> nn.Module:
    """Parameters, floating statistics and a whole-number buffer."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def states(n: int, net: nn.Module | None = None):
    """`n` moments of a network that moves: its state, after each step the same tensors with new values."""
    net, generator = net or network(), torch.Generator().manual_seed(1)
    for _ in range(n):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
            net(torch.randn(8, 3, generator=generator) + 2)  # moves the statistics, counts a batch
        yield net


def in_float64(net: nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.double().numpy().copy() for name, tensor in net.state_dict().items()}


@pytest.mark.parametrize(("decay", "capped_from"), [(0.5, 8), (0.99, 10**6)])
def test_exponential_average_is_a_loop(decay, capped_from):
    """d = min(decay, (1 + n) / (10 + n)): with a decay of one half the cap is met at n = 8."""
    net = network()
    average, expected = WeightAverage(net.state_dict(), decay), in_float64(net)
    for n, moved in enumerate(states(20, net)):
        average.update()
        d = min(decay, (1 + n) / (10 + n))
        assert (d == decay) == (n >= capped_from)
        for name, value in in_float64(moved).items():
            expected[name] = value if name in INTEGERS else d * expected[name] + (1 - d) * value
            np.testing.assert_allclose(average.state[name].numpy(), expected[name], rtol=1e-5, atol=1e-6)
    assert average.n_updates == 20
    assert not torch.equal(average.state["0.weight"], net.state_dict()["0.weight"])


def test_exponential_average_is_timm_s():
    """timm's warm-up with γ = 9 and power 1 is 1 - 9 / (10 + n), the same curve."""
    net = network()
    ours = WeightAverage(net.state_dict(), 0.7)
    theirs = ModelEmaV3(net, decay=0.7, use_warmup=True, warmup_gamma=9, warmup_power=1)
    for n, moved in enumerate(states(30, net)):
        ours.update()
        theirs.update(moved, step=n + 2)
    for name, value in theirs.module.state_dict().items():
        torch.testing.assert_close(ours.state[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_uniform_average_is_torch_s_and_the_mean():
    net = network()
    ours, theirs = WeightAverage(net.state_dict()), AveragedModel(net, use_buffers=True)
    seen = []
    for moved in states(7, net):
        ours.update()
        theirs.update_parameters(moved)
        seen.append(copied(moved.state_dict()))
    for name, value in theirs.module.state_dict().items():
        if name in INTEGERS:
            assert torch.equal(ours.state[name], net.state_dict()[name])
            continue
        torch.testing.assert_close(ours.state[name], value, rtol=1e-6, atol=1e-7, msg=name)
        expected = np.mean([state[name].double().numpy() for state in seen], axis=0)
        np.testing.assert_allclose(ours.state[name].numpy(), expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(mean(seen)[name].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_uniform_average_forgets_what_was_there_before_the_first_update():
    net = network()
    with torch.no_grad():
        net[0].weight.fill_(1e6)
    average = WeightAverage(net.state_dict())
    with torch.no_grad():
        net[0].weight.fill_(2.0)
    average.update()
    assert torch.equal(average.state["0.weight"], torch.full((4, 3), 2.0))


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_statistics_are_averaged_and_whole_numbers_copied(decay):
    net = network()
    average, seen = WeightAverage(net.state_dict(), decay), []
    for moved in states(5, net):
        average.update()
        seen.append(copied(moved.state_dict()))
    for name in STATISTICS:
        values = torch.stack([state[name] for state in seen])
        assert not torch.equal(average.state[name], values[-1])
        assert (average.state[name] <= values.amax(0)).all()
    assert average.state["1.num_batches_tracked"].item() == 5
    assert average.state["1.num_batches_tracked"].dtype == torch.int64


@settings(deadline=None, max_examples=30)
@given(
    decay=st.sampled_from([0.0, 0.3, 0.999]),
    values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=12),
)
def test_an_average_lies_among_what_it_has_seen(decay, values):
    live = {"w": torch.tensor([values[0]])}
    average = WeightAverage(live, decay)
    for value in values:
        live["w"].fill_(value)
        average.update()
    low, high = min(values), max(values)
    slack = 1e-4 * max(abs(low), abs(high), 1)
    assert low - slack <= average.state["w"].item() <= high + slack


# ------------------------------------------------------------------------------------------- in place


def moved_average(decay: float = 0.9) -> tuple[nn.Module, WeightAverage]:
    net = network()
    average = WeightAverage(net.state_dict(), decay)
    for _ in states(3, net):
        average.update()
    return net, average


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_in_place_lends_the_average_and_gives_the_own_weights_back(error):
    net, average = moved_average()
    own, averaged = copied(net.state_dict()), copied(average.state)
    addresses = {name: tensor.data_ptr() for name, tensor in net.state_dict().items()}
    x = torch.randn(6, 3)
    reference = copy.deepcopy(net)
    reference.load_state_dict(averaged)

    def use():
        with average.in_place():
            assert same(net.state_dict(), averaged) and not same(averaged, own)
            assert torch.equal(net.eval()(x), reference.eval()(x))
            if error:
                raise error

    if error:
        with pytest.raises(error):
            use()
    else:
        use()
    assert same(net.state_dict(), own) and same(average.state, averaged)
    assert addresses == {name: tensor.data_ptr() for name, tensor in net.state_dict().items()}


def test_what_happens_to_the_model_inside_does_not_reach_the_average():
    net, average = moved_average()
    own, averaged = copied(net.state_dict()), copied(average.state)
    with average.in_place(), torch.no_grad():
        net[0].weight.zero_()
    assert same(average.state, averaged) and same(net.state_dict(), own)


# ------------------------------------------------------------------------------------------ save, load


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_a_restored_average_goes_on_as_the_saved_one(tmp_path, decay):
    """Through a file, into an average that was made from other weights."""
    whole, cut = network(), network()
    average = WeightAverage(whole.state_dict(), decay)
    for n, _ in enumerate(states(9, whole)):
        average.update()
        if n == 3:
            torch.save(average.payload(), tmp_path / "average.pt")
    restored = WeightAverage(cut.state_dict(), decay)
    with torch.no_grad():
        cut[2].weight.fill_(7.0)
    restored.restore(torch.load(tmp_path / "average.pt", weights_only=True))
    assert restored.n_updates == 4
    again = network()
    for n, moved in enumerate(states(9, again)):
        if n > 3:
            load(cut.state_dict(), moved.state_dict())
            restored.update()
    assert same(restored.state, average.state) and restored.n_updates == 9


def test_a_restored_average_is_apart_from_the_payload():
    net, average = moved_average()
    payload = copy.deepcopy(average.payload())
    kept = copied(payload["state"])
    average.restore(payload)
    average.update()
    assert same(payload["state"], kept) and not same(average.state, kept)


def test_a_copy_is_apart_from_the_model():
    net = network()
    state = copied(net.state_dict(keep_vars=True))
    before = {name: tensor.clone() for name, tensor in state.items()}
    for _ in states(1, net):
        pass
    assert same(state, before) and not same(state, net.state_dict())
    assert not any(tensor.requires_grad for tensor in state.values())


def test_load_writes_into_the_tensors_that_are_there():
    """An optimizer holds them; and a part of a state is enough."""
    net, other = network(0), copied(network(1).state_dict())
    weight, bias = net[0].weight, net[0].bias.detach().clone()
    load(net.state_dict(), {"0.weight": other["0.weight"]})
    assert net[0].weight is weight and torch.equal(weight, other["0.weight"])
    assert torch.equal(net[0].bias, bias)
    load(dict(net.named_parameters()), {"0.bias": other["0.bias"]})  # leaves that require a gradient
    assert torch.equal(net[0].bias, other["0.bias"])
    with pytest.raises(KeyError):
        load(net.state_dict(), {"9.weight": other["0.weight"]})


# --------------------------------------------------------------------------------- lines between states


def test_between_is_a_line_from_start_to_end():
    start, end = (copied(next(states(n, network(n))).state_dict()) for n in (1, 2))
    end["1.num_batches_tracked"] += 5
    assert same(between(start, end, 0.0) | {"1.num_batches_tracked": start["1.num_batches_tracked"]}, start)
    assert same(between(start, end, 1.0), end)
    for share in (0.1, 0.5, 0.9):
        for name, value in between(start, end, share).items():
            if name in INTEGERS:
                assert torch.equal(value, end[name])
                continue
            a, b = start[name].double().numpy(), end[name].double().numpy()
            np.testing.assert_allclose(value.numpy(), (1 - share) * a + share * b, rtol=1e-5, atol=1e-6)


def test_the_line_goes_one_way():
    start, end = {"w": torch.zeros(1)}, {"w": torch.ones(1)}
    values = [between(start, end, share / 10)["w"].item() for share in range(11)]
    assert all(a < b for a, b in pairwise(values))


def test_mean_of_states_takes_whole_numbers_from_the_first():
    three = [copied(moved.state_dict()) for moved in states(3)]
    result = mean(three)
    assert result["1.num_batches_tracked"].item() == 1
    assert result.keys() == three[0].keys()
    assert same(mean(three[:1]), three[0])
