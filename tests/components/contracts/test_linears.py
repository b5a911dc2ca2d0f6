"""Which Linears FP8 takes."""

import pytest

from nvila.components.contracts.linears import decoder_linears, fp8_linears, no_fp8, why_not_fp8

QWEN_7B = decoder_linears(3584, 28, 4, 18944)


def test_of_qwen_7b_all_but_keys_and_values_are_taken() -> None:
    """As in the reference: they are too small to gain by it, and all else of a block is not."""
    taken = fp8_linears(QWEN_7B, 3584)
    assert set(QWEN_7B) - set(taken) == {"self_attn.k_proj", "self_attn.v_proj"}
    assert taken["mlp.down_proj"] == (3584, 18944)
    assert why_not_fp8(QWEN_7B["self_attn.k_proj"], 3584) == ("512 features, below min_features 3584")
    assert fp8_linears(QWEN_7B, 512) == QWEN_7B


@pytest.mark.parametrize(
    ("features", "least", "said"),
    [((4096, 4100), 3584, "divisible by 16"), ((3584, 3568), 3584, "3568 features, below")],
)
def test_a_linear_that_no_kernel_takes_stays(features: tuple[int, int], least: int, said: str) -> None:
    """It would end a stage in its first step, after hours."""
    assert said in str(why_not_fp8(features, least))


def test_where_none_is_taken_it_is_said_what_would_be() -> None:
    """A number that would not do either is no advice."""
    assert "at least 8192" in no_fp8(QWEN_7B.values(), 8192) and "say 3584 or less" in no_fp8(QWEN_7B.values(), 8192)
    assert "none here is divisible by 16" in no_fp8([(40, 40)], 16)
