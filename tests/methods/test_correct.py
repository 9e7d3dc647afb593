import pytest
import torch
from torch import nn

import smelt
from smelt.compress import Result
from smelt.core.errors import DataError, RuleError
from smelt.core.store import check_fresh

QUANTIZE = {"quantize.affine": {"bits": 2, "per": "tensor"}}
X = torch.randn(256, 2, 6, 6, generator=torch.Generator().manual_seed(1)) + 0.5


def net(norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    middle: list[nn.Module] = [nn.BatchNorm2d(6)] if norm else []
    model = nn.Sequential(nn.Conv2d(2, 6, 3, bias=not norm), *middle, nn.ReLU(), nn.Flatten(), nn.Linear(96, 5))
    for _ in range(30 if norm else 0):
        model.train()(X)
    return model.eval()


def run(model: nn.Module, *steps: object) -> Result:
    data = smelt.Data(train=[(X[:128], None), (X[128:], None)])
    return smelt.compress(model, list(steps), smelt.Job(data=data, latency=False))


def outputs(model: nn.Module) -> list[torch.Tensor]:
    """Of the first layer and of the last, over samples and places."""
    with torch.no_grad():
        return [model[0](X).transpose(0, 1).flatten(1).mean(1), model(X).mean(0)]


def test_the_means_of_all_layers_are_those_of_the_original() -> None:
    model = net()
    moved, corrected = (run(model, *steps).model for steps in ([QUANTIZE], [QUANTIZE, "swap.correct"]))
    for wanted, before, after in zip(outputs(model), outputs(moved), outputs(corrected), strict=True):
        assert float((before - wanted).abs().max()) > 0.05
        torch.testing.assert_close(after, wanted, atol=1e-5, rtol=1e-4)
    assert torch.equal(corrected[0].weight, moved[0].weight)
    check_fresh(corrected)


def test_quantized_inputs_are_made_up_for_too() -> None:
    model = net()
    coarse = {"quantize.affine": {"bits": 2, "at": "input", "dynamic": False}}
    corrected = run(model, QUANTIZE, coarse, "swap.correct").model
    for wanted, after in zip(outputs(model), outputs(corrected), strict=True):
        torch.testing.assert_close(after, wanted, atol=1e-5, rtol=1e-4)


def test_activations_that_work_in_place_change_nothing() -> None:
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        layers = [m for _ in range(4) for m in (nn.Conv2d(2, 2, 3, padding=1), nn.ReLU6(inplace))]
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(72, 5)).eval()
        found.append(run(model, QUANTIZE, "swap.correct").model.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value)


def test_batch_norms_take_the_statistics_of_what_they_see_now() -> None:
    model = net(norm=True)
    found = run(model, QUANTIZE, "swap.correct")
    with torch.no_grad():
        seen = found.model[0](X).transpose(0, 1).flatten(1)
    torch.testing.assert_close(found.model[1].running_mean, seen.mean(1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.model[1].running_var, seen.var(1), atol=1e-5, rtol=1e-4)
    assert any("0.weight as it is: its layer has no bias" in note for note in found.report.notes)
    kept = run(model, QUANTIZE, {"swap.correct": {"norms": False}}).model
    assert torch.equal(kept[1].running_mean, model[1].running_mean)
    only = run(model, QUANTIZE, {"swap.correct": {"norms": False, "on": "0"}}).model
    assert torch.equal(only[-1].bias, model[-1].bias)


def test_it_compares_with_the_model_as_it_was_when_nothing_was_stored() -> None:
    model = net()
    steps = [{"train": {"epochs": 1, "lr": 0.1, "with": [{"distill.logits": {"alpha": 0}}]}}]
    teacher = net()
    with torch.no_grad():
        teacher[-1].bias += torch.arange(5.0)
    job = smelt.Job(data=smelt.Data(train=[(X, None)]), teacher=teacher, latency=False)
    trained = smelt.compress(model, steps, job).model
    corrected = smelt.compress(model, [*steps, QUANTIZE, "swap.correct"], job).model
    for wanted, after, first in zip(outputs(trained), outputs(corrected), outputs(model), strict=True):
        torch.testing.assert_close(after, wanted, atol=1e-5, rtol=1e-4)
        assert float((first - wanted).abs().max()) > 1e-3


def test_refusals() -> None:
    assert any("nothing of the model is stored yet" in note for note in run(net(), "swap.correct").report.notes)
    stored = run(net(), QUANTIZE).model
    with pytest.raises(RuleError, match="outside of train"), smelt.training(stored, ["swap.correct"]):
        pass
    with pytest.raises(DataError, match="needs data"):
        smelt.compress(net(), [QUANTIZE, "swap.correct"])
    found = run(net(), {"quantize.affine": {"on": ["0.*", "0.bias"]}}, "swap.correct")
    assert any("0.weight as it is: its bias is stored already" in note for note in found.report.notes)


def test_weights_are_fitted_to_coarse_inputs() -> None:
    model = net()
    coarse = {"quantize.affine": {"bits": 2, "at": "input", "dynamic": False, "range": "mse"}}
    errors = []
    for weights in (False, True):
        made = run(model, coarse, {"swap.correct": {"weights": weights}}).model
        with torch.no_grad():
            errors.append(float((made(X) - model(X)).square().mean()))
    assert errors[1] < 0.9 * errors[0]
    linear = run(model, coarse, {"swap.correct": {"weights": True, "on": "3"}}).model
    with torch.no_grad():
        seen, wanted = [], model(X).double()
        hook = linear[3].register_forward_hook(lambda m, args, out: seen.append(args[0].double()))
        linear(X)
        hook.remove()
        z = seen[0] - seen[0].mean(0)
        damp = 0.01 * z.square().sum(0).mean()
        missed = wanted - wanted.mean(0) - z @ model[3].weight.double().T
        expected = model[3].weight.double() + torch.linalg.solve(z.T @ z + damp * torch.eye(96), z.T @ missed).T
    torch.testing.assert_close(linear[3].weight.double(), expected, atol=1e-4, rtol=1e-3)
    assert torch.equal(linear[0].weight, model[0].weight)
    found = run(model, coarse, QUANTIZE, {"swap.correct": {"weights": True}})
    assert sum("weights: true comes before that" in note for note in found.report.notes) == 2
