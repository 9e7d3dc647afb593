"""A codec for activations."""

from dataclasses import dataclass

from torch import Tensor

from smelt.core.encoded import Encoded
from smelt.core.method import Codec, State, Stats


@dataclass(frozen=True)
class Act(Codec):
    bits: int = 8

    places = ("weight", "input")

    def fit(self, x: Tensor, stats: Stats) -> State:
        return State()

    def encode(self, x: Tensor, state: State) -> Encoded:
        raise NotImplementedError

    def simulate(self, x: Tensor, state: State) -> Tensor:
        return (x / state.scale).round() * state.scale + self.bits
