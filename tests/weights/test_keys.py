import pytest

from musubi_tuner.weights.keys import WRAPPERS, Rules, chain, same, without_prefix


def test_only_the_first_prefix_is_removed() -> None:
    rename = without_prefix(*WRAPPERS)
    assert rename("model.diffusion_model.blocks.0.q.weight") == "blocks.0.q.weight"
    assert rename("diffusion_model.module.a") == "module.a"
    assert rename("blocks.0.module.a") == "blocks.0.module.a"
    assert same("a.b") == "a.b"


def test_rules_apply_in_order() -> None:
    rules = Rules([(r"^down\.(\d+)\.", r"down_blocks.\1."), (r"\.gamma$", ".weight"), ("weight", "w")])
    assert rules("down.12.norm.gamma") == "down_blocks.12.norm.w"
    assert rules("up.1.bias") == "up.1.bias"


def test_strict_rules_refuse_a_key_that_none_matches() -> None:
    with pytest.raises(ValueError, match="no renaming rule matches key 'b'"):
        Rules([("a", "c")], strict=True)("b")
    assert Rules([("a", "a")], strict=True)("a") == "a"


def test_a_dropped_key_stays_dropped() -> None:
    rename = chain(without_prefix("m."), lambda key: None if key == "x" else key, Rules([("y", "z")]))
    assert rename("m.x") is None
    assert rename("m.y") == "z"
