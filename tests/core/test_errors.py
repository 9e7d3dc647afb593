"""What errors say of unknown words."""

from smelt.core.errors import nearest


def test_the_nearest_choice() -> None:
    assert nearest("ration", ["score", "ratio", "ratio"]) == "; did you mean 'ratio'?"


def test_else_the_choices_each_once_and_not_endlessly() -> None:
    assert nearest("x", ["beta", "alpha", "beta"]) == "; there is alpha, beta"
    text = nearest("x", [f"layer{i:03}" for i in range(500)])
    assert text.startswith("; there is layer000, ") and text.endswith("layer009, ...")
    assert nearest("x", []) == ""
