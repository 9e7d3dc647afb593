"""A codec of your own in one file: weights as signed powers of two.

From this one class come its recipe key, checked settings, byte count, save and load, and use inside `train`.  To ship
it in a package of yours, name the module under the entry point group `smelt.methods` instead of calling `register`.

python examples/custom_codec.py
"""

from dataclasses import dataclass

import torch

import smelt
from smelt.forms.codebook import Codebook


@dataclass(frozen=True)
class PowersOfTwo(smelt.Codec):
    """Round weights to signed powers of two.

    applies to: every floating tensor
    needs a pretrained model: yes
    needs data: no
    needs training: no
    good at: multiplications become shifts
    bad at: large weights, whose steps are wide
    source: Miyashita, Lee, Murmann 2016, arXiv:1603.01025
    """

    levels: int = smelt.setting(7, "powers below the largest weight", low=1, high=127)

    def fit(self, x: torch.Tensor, stats: smelt.Stats) -> smelt.State:
        kept = smelt.Values(x, stats.where).kept()
        top = kept.abs().max().clamp_min(1e-12).log2().round()
        powers = 2.0 ** (top - torch.arange(self.levels))
        return smelt.State(codebook=torch.cat([-powers, powers]).sort().values)

    def encode(self, x: torch.Tensor, state: smelt.State) -> smelt.Encoded:
        middle = (state.codebook[1:] + state.codebook[:-1]) / 2
        indices = torch.bucketize(x, middle).to(torch.uint8)
        return smelt.Encoded(Codebook(), {"codebook": state.codebook, "indices": indices}, x.shape, x.dtype)


smelt.register("methods", "quantize.powers_of_two", __name__)

if __name__ == "__main__":
    data = smelt.open_data("digits")
    torch.manual_seed(0)
    model, builder, arguments = smelt.open_model("lenet(size=8, kernel=3, padding=1)")
    recipe = """
    steps:
      - train: {epochs: 15, lr: 2e-3}
      - train: {epochs: 5, lr: 5e-4, with: [quantize.powers_of_two: {levels: 7}]}
      - code.huffman
    """
    result = smelt.compress(smelt.Source.of(model, builder, arguments), recipe, smelt.Job(data=data, latency=False))
    for step, name in result.report.steps():
        size, accuracy = result.report.value("file", step), result.report.value("accuracy", step)
        print(f"{name:25} {size:9,.0f} bytes  {accuracy:.2f} %")
