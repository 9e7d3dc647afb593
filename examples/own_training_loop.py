"""Your own training loop: prune gradually while distilling, then store the survivors in 16 shared values.

python examples/own_training_loop.py
"""

import copy

import torch
from torch.nn import functional as F

import smelt
from smelt.measures.accuracy import evaluate

data = smelt.open_data("digits")
torch.manual_seed(0)
model, *_ = smelt.open_model("lenet(size=8, kernel=3, padding=1)")


def train(epochs: int, pieces: list, teacher: torch.nn.Module | None = None) -> None:
    with smelt.training(model, pieces, steps=epochs * len(data.train), teacher=teacher) as t:
        optimizer = torch.optim.Adam(t.parameters(), lr=2e-3)  # t.parameters(), not model.parameters()
        for epoch in range(epochs):
            data.train.set_epoch(epoch)
            model.train()
            for x, y in data.train:
                out = model(x)
                loss = t.loss(x, out, labels=y, hard=F.cross_entropy(out, y))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                t.step()  # moves the ramp on
    model.eval()


train(15, [])
print(f"dense:  {evaluate(model, data.test, 'accuracy'):.2f} %")

prune = smelt.make("prune.weights", {"ratio": smelt.Ramp(0, 0.9), "scope": "global"})
train(15, [prune, smelt.make("distill.logits")], teacher=copy.deepcopy(model))
print(f"pruned: {evaluate(model, data.test, 'accuracy'):.2f} %, masks kept in the model's store")

result = smelt.compress(
    model, ["share.kmeans", "code.huffman"], smelt.Job(data=smelt.Data(test=data.test), latency=False)
)
size = result.save("digits.smelt", force=True)
loaded = smelt.load("digits.smelt", into=smelt.open_model("lenet(size=8, kernel=3, padding=1)")[0])
print(f"file:   {evaluate(loaded, data.test, 'accuracy'):.2f} %, {size:,} bytes, {result.report.ratio():.0f}x smaller")
