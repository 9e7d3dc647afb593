"""timm's names of layers in those of `_blocks`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

# The layers of a block in the order in which they run: with a 1x1 convolution in front, and without.
SQUEEZE = {"se.conv_reduce": "fc1", "se.conv_expand": "fc2"}
WIDE = (("conv_pw", "bn1"), ("conv_dw", "bn2"), tuple(SQUEEZE), ("conv_pwl", "bn3"))
PLAIN = (("conv_dw", "bn1"), tuple(SQUEEZE), ("conv_pw", "bn2"))
LAYER = re.compile(r"blocks\.(\d+)\.(\d+)\.(.+)")


def from_timm(
    state: Mapping[str, Any], block: Callable[[int, int, int], str], ends: Mapping[str, str], flat: bool = False
) -> dict[str, Any]:
    """A state dict of timm's mobile networks with torchvision's names; any other as it is.

    Args:
        block: (stage, place in the stage, number in the network) -> where a block's layers are.
        ends: timm's name -> ours, of the layers outside of blocks; `{stages}` and `{blocks}` stand for how many
            there are, `{after_stages}` and `{after_blocks}` for one more.
        flat: the last convolution of a block and its norm have no place of their own.
    """
    if "conv_stem.weight" not in state:
        return dict(state)
    split = {key: key.rpartition(".") for key in state}
    has: dict[tuple[int, int], set[str]] = {}
    for layer, _, _ in split.values():
        if found := LAYER.fullmatch(layer):
            has.setdefault((int(found[1]), int(found[2])), set()).add(found[3])
    blocks = sorted(at for at, parts in has.items() if "conv_dw" in parts)
    counts = {"stages": len({stage for stage, _ in blocks}), "blocks": len(blocks)}
    counts |= {f"after_{what}": n + 1 for what, n in counts.items()}
    names = {old.format(**counts): new.format(**counts) for old, new in ends.items()}
    for number, at in enumerate(blocks):
        units = [unit for unit in (WIDE if "conv_pwl" in has[at] else PLAIN) if unit[0] in has[at]]
        for i, unit in enumerate(units):
            for j, part in enumerate(unit):
                place = str(i + j) if flat and unit is units[-1] else f"{i}.{SQUEEZE.get(part, j)}"
                names[f"blocks.{at[0]}.{at[1]}.{part}"] = f"{block(*at, number)}.{place}"
    return {f"{names.get(layer, layer)}.{leaf}": state[key] for key, (layer, _, leaf) in split.items()}
