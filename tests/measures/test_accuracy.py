import math

import pytest
import torch
from torch import nn

from smelt.core.data import Batches
from smelt.core.errors import DataError, ModelError
from smelt.measures.accuracy import METRICS, evaluate, higher_is_better, unit_of

LOGITS = torch.tensor([[2.0, 1, 0], [0, 2, 1], [0, 1, 2], [2, 1, 0], [0, 1, 2]])
LABELS = torch.tensor([0, 1, 2, 1, 0])


def test_built_in_metrics_by_hand_over_uneven_batches():
    loader = Batches(LOGITS, LABELS, batch_size=2)
    model = nn.Identity()
    assert evaluate(model, loader, "accuracy") == pytest.approx(60)
    assert evaluate(model, loader, "top5") == pytest.approx(100)
    z = math.log(math.e**2 + math.e + 1)
    loss = (3 * (z - 2) + (z - 1) + z) / 5
    assert evaluate(model, loader, "loss") == pytest.approx(loss, rel=1e-6)
    assert evaluate(model, loader, "perplexity") == pytest.approx(math.exp(loss), rel=1e-6)
    assert evaluate(model, [(torch.zeros(1, 2), torch.tensor([0])), (LOGITS, LABELS)], "accuracy") == pytest.approx(
        100 * 4 / 6
    )


def test_top5_of_many():
    logits = torch.arange(10.0).repeat(4, 1)
    assert evaluate(nn.Identity(), [(logits, torch.tensor([9, 5, 4, 0]))], "top5") == 50


def test_regression():
    loader = [(torch.tensor([[1.0], [2.0]]), torch.tensor([2.0, 4.0])), (torch.tensor([[0.0]]), torch.tensor([[3.0]]))]
    assert evaluate(nn.Identity(), loader, "mse") == pytest.approx((1 + 4 + 9) / 3)
    assert evaluate(nn.Identity(), loader, "mae") == pytest.approx((1 + 2 + 3) / 3)


def test_tokens_pixels_and_ignored_labels():
    tokens = LOGITS[None]
    labels = torch.tensor([[0, 1, -100, -100, 0]])
    assert evaluate(nn.Identity(), [(tokens, labels)], "accuracy") == pytest.approx(100 * 2 / 3)
    pixels = LOGITS[:4].t().reshape(1, 3, 2, 2)
    assert evaluate(nn.Identity(), [(pixels, LABELS[:4].reshape(1, 2, 2))], "accuracy") == pytest.approx(75)
    assert evaluate(nn.Identity(), [(LOGITS, LABELS[:, None])], "accuracy") == pytest.approx(60)


def test_dicts_and_outputs_with_logits():
    class Model(nn.Module):
        def forward(self, a, b):
            return {"logits": a + b, "loss": None}

    item = {"a": LOGITS, "b": torch.zeros(5, 3), "labels": LABELS}
    assert evaluate(Model(), [item], "accuracy") == pytest.approx(60)


def test_a_callable_is_averaged_by_samples():
    def mean(outputs, labels):
        return outputs.mean()

    loader = [(torch.full((3, 1), 1.0), None), (torch.full((1, 1), 5.0), None)]
    assert evaluate(nn.Identity(), loader, mean) == pytest.approx(2)
    assert evaluate(nn.Identity(), loader, lambda outputs, labels: 7) == 7


def test_a_callable_of_model_and_loader_is_whole():
    def whole(model, loader, extra=1):
        assert not model.training and not torch.is_grad_enabled()
        return len(list(loader)) + extra

    model = nn.Identity()
    assert evaluate(model, [1, 2, 3], whole) == 4 and model.training
    with pytest.raises(DataError, match="'nan' on the split 'valid' is NaN"):

        def nan(model, loader):
            return math.nan

        evaluate(model, [], nan, split="valid")


def test_a_whole_metric_that_fails_is_one_line():
    def broken(model, loader):
        raise KeyError("key\nmore")

    with pytest.raises(DataError, match="'broken' on the split 'test' fails: KeyError") as caught:
        evaluate(nn.Identity(), [], broken)
    assert "\n" not in str(caught.value)


def test_modes_are_restored_and_used():
    model = nn.Sequential(nn.Dropout(0.9), nn.Sequential(nn.Dropout(0.9)))
    model[1].training = False
    assert evaluate(model, Batches(LOGITS, LABELS), "accuracy") == pytest.approx(60)
    assert [m.training for m in model.modules()] == [True, True, False, True]


def test_units_and_directions():
    assert unit_of("accuracy") == "%" and higher_is_better("top5") is True and higher_is_better("mse") is False
    assert set(METRICS) == {"accuracy", "top5", "loss", "perplexity", "mse", "mae"}
    assert higher_is_better(len) is None and unit_of(len) == ""
    for function in (unit_of, higher_is_better):
        with pytest.raises(DataError, match="did you mean 'accuracy'"):
            function("acuracy")


def test_nan_names_metric_split_and_batch():
    bad = LOGITS.clone()
    bad[3, 1] = math.nan
    for metric in ("accuracy", "loss", "top5"):
        with pytest.raises(DataError, match=f"'{metric}' on batch 2 of the split 'valid' is NaN"):
            evaluate(nn.Identity(), Batches(bad, LABELS, 3), metric, split="valid")
    with pytest.raises(DataError, match="'mean' on batch 2 of the split 'test' is NaN"):

        def mean(outputs, labels):
            return outputs.mean()

        evaluate(nn.Identity(), Batches(bad, LABELS, 3), mean)


def test_a_forward_that_fails_is_one_line():
    with pytest.raises(
        ModelError, match=r"batch 1 of the split 'test', given float32 \[5, 3\]: mat1 and mat2"
    ) as caught:
        evaluate(nn.Linear(4, 2), Batches(LOGITS, LABELS), "accuracy")
    assert "\n" not in str(caught.value)

    class Text(nn.Module):
        def forward(self, x):
            return "text"

    with pytest.raises(ModelError, match="returns a str"):
        evaluate(Text(), Batches(LOGITS, LABELS), "accuracy")


@pytest.mark.parametrize(
    ("loader", "metric", "said"),
    [
        ([], "accuracy", "'test' has no batches"),
        ([(LOGITS[:0], LABELS[:0])], "accuracy", "at least one sample"),
        ([(LOGITS, torch.full((5,), -100))], "loss", "nothing in them that counts"),
        ([LOGITS], "accuracy", "needs labels as a tensor, and there is none"),
        ([(LOGITS, "abc")], "accuracy", "there is a str"),
        ([(LOGITS, LABELS[:4])], "accuracy", r"outputs \[5, 3\] and labels \[4\]"),
        ([(LOGITS, LABELS + 1)], "accuracy", "run from 1 to 3, outputs have 3 classes"),
        ([(LOGITS, LABELS - 1)], "loss", "run from -1"),
        ([(LOGITS, LABELS.float())], "accuracy", "whole numbers"),
        ([(LOGITS[:, :1], LABELS)], "accuracy", "two outputs or more"),
        ([(LOGITS, LABELS.float())], "mse", "differ in their shape"),
        ([(LOGITS, LABELS)], lambda outputs, labels: outputs, "must give one number"),
        ([(LOGITS, LABELS)], lambda outputs, labels: outputs.nothing, "AttributeError"),
        ([(LOGITS, LABELS)], lambda outputs: 1.0, "TypeError"),
        ([(LOGITS, LABELS)], "los", "no metric 'los'; did you mean 'loss'"),
    ],
)
def test_refused(loader, metric, said):
    with pytest.raises(DataError, match=said) as caught:
        evaluate(nn.Identity(), loader, metric)
    assert "\n" not in str(caught.value)
