"""Rounding at random: the same compiled or not, on the levels, right in the mean; masks and what they gather."""

import pytest
import torch

from smelt.core.encoded import Encoded
from smelt.core.errors import FileError, RecipeError
from smelt.core.method import make
from smelt.forms import grouped
from smelt.forms.grouped import Grouped, packed, unpacked
from smelt.grids import masks, stochastic
from smelt.grids.stochastic import rounded


def restored(parts: dict[str, torch.Tensor], n: int, bits: int, group: int) -> torch.Tensor:
    return Encoded(Grouped(bits, group), parts, torch.Size((n,)), torch.float32).decode()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 9, 256, 1001])
def test_compiled_or_not_the_result_is_the_same(n: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = (3 * torch.randn(n, generator=torch.Generator().manual_seed(n))).to(dtype)
    points = [(b, g) for b in range(1, 9) for g in (8, 256)]
    mine = [rounded(x, bits=b, group=g, seed=7) for b, g in points]
    back = [restored(parts, n, b, g) for parts, (b, g) in zip(mine, points, strict=True)]
    mask, count = masks.above(x)
    split = [masks.gather(x, mask, count), masks.gather(x, mask, n - count, False), masks.kept(x, mask)]
    for module in (stochastic, masks, grouped):
        monkeypatch.setattr(module, "functions", lambda: None)
    theirs = [rounded(x, bits=b, group=g, seed=7) for b, g in points]
    for a, b in zip(mine, theirs, strict=True):
        assert all(torch.equal(a[k], b[k]) for k in ("codes", "low", "step"))
    again = [restored(parts, n, b, g) for parts, (b, g) in zip(mine, points, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(back, again, strict=True))
    assert torch.equal(masks.above(x)[0], mask) and masks.above(x)[1] == count == int((x > 0).sum())
    other = [masks.gather(x, mask, count), masks.gather(x, mask, n - count, False), masks.kept(x, mask)]
    assert all(torch.equal(a, b) for a, b in zip(split, other, strict=True))
    assert torch.equal(split[2], x.relu()) and torch.equal(split[0], x[x > 0])


def test_masks_put_back_what_they_gathered() -> None:
    x = torch.randn(777)
    mask, count = masks.above(x, 0.3)
    out = torch.full_like(x, 9)
    masks.scatter(masks.gather(x, mask, count), mask, out)
    assert torch.equal(out, torch.where(x > 0.3, x, 9.0))
    masks.scatter(masks.gather(x, mask, 777 - count, False), mask, out, False)
    assert torch.equal(out, x)
    assert torch.equal(masks.booleans(masks.bits(x > 0.3), 777), x > 0.3)


def test_codes_are_packed_from_the_lowest_bit_on() -> None:
    assert packed(torch.tensor([1, 2, 3, 0, 1], dtype=torch.uint8), 2).tolist() == [0b00111001, 0b01]
    for bits in range(1, 9):
        codes = torch.randint(0, 1 << bits, (77,), dtype=torch.uint8)
        assert torch.equal(unpacked(packed(codes, bits), bits, 77), codes)
        assert packed(codes, bits).numel() == 10 * bits


def test_values_fall_on_the_two_levels_beside_them_and_the_mean_is_right() -> None:
    x = torch.randn(512, generator=torch.Generator().manual_seed(0))
    draws = torch.stack([restored(rounded(x, bits=2, group=256, seed=s), 512, 2, 256) for s in range(2000)])
    step = rounded(x, bits=2, group=256)["step"].float().repeat_interleave(256)
    assert bool(((draws - x).abs() <= step * (1 + 1e-5)).all())
    # Each mean of 2000 draws has a standard deviation of at most step / 2 / sqrt(2000); of 512, none beyond 5 of them.
    assert bool(((draws.mean(0) - x).abs() <= 5 * step / 2 / 2000**0.5).all())
    z = (draws.mean(0) - x) / (draws.std(0) / 2000**0.5).clamp_min(1e-6)
    assert 0.8 < float(z[draws.std(0) > 1e-3].std()) < 1.2


def test_neighbours_are_rounded_independently() -> None:
    x = torch.full((4096,), 0.5)
    x[::256], x[1::256] = 0, 1
    draws = torch.stack([restored(rounded(x, bits=1, group=256, seed=s), 4096, 1, 256) for s in range(64)])[:, 2:256]
    centred = draws - 0.5
    assert abs(float((centred[:, 1:] * centred[:, :-1]).mean())) < 4 * 0.25 / (64 * 253) ** 0.5
    assert abs(float((centred[1:] * centred[:-1]).mean())) < 4 * 0.25 / (63 * 254) ** 0.5


def test_what_is_constant_or_not_finite() -> None:
    x = torch.cat((torch.full((8,), 0.5), torch.zeros(8), torch.tensor([1.0, torch.inf] * 4)))
    y = restored(rounded(x, bits=2, group=8), 24, 2, 8)
    assert torch.equal(y[:16], x[:16]) and bool(y[16:].isnan().all())


def test_the_codec_packs_its_bits_and_repeats() -> None:
    codec = make("quantize.stochastic", {"bits": 3, "group": 64})
    assert codec.period() is None and make("quantize.stochastic", {"adapt": 5}).period() == 5
    with pytest.raises(RecipeError, match=r"group is 12; it takes a multiple of 8"):
        make("quantize.stochastic", {"group": 12})
    with pytest.raises(RecipeError, match=r"outside 1\.\.8"):
        make("quantize.stochastic", {"bits": 9})


def test_a_file_may_claim_nothing_else() -> None:
    form, bf16 = Grouped(2, 256), torch.bfloat16
    good = {
        "codes": (torch.Size((128,)), torch.uint8),
        "low": (torch.Size((2,)), bf16),
        "step": (torch.Size((2,)), bf16),
    }
    form.check(good, torch.Size((512,)), torch.float32)
    for wrong in (
        {"codes": (torch.Size((127,)), torch.uint8)},
        {"low": (torch.Size((1,)), bf16)},
        {"step": (torch.Size((2,)), torch.int16)},
    ):
        with pytest.raises(FileError, match="form 'grouped'"):
            form.check({**good, **wrong}, torch.Size((512,)), torch.float32)
    for bits, group in ((0, 256), (9, 256), (2, 12), (2, 0)):
        with pytest.raises(FileError, match="form 'grouped'"):
            Grouped(bits, group).check(good, torch.Size((512,)), torch.float32)
