from megatron_nft.config import RolloutConfig
from megatron_nft.rollout.endings import warnings


def test_answers_none_of_which_ends_by_itself_are_told():
    assert warnings(0, 0, RolloutConfig()) == warnings(7, 8, RolloutConfig()) == []
    [told] = warnings(8, 8, RolloutConfig(max_tokens=99))
    assert "all 8 answers ended by length" in told and "rollout.max_tokens (99)" in told and "end token" in told
    assert "rollout.stop is empty" in told and "\n" not in told
    [told] = warnings(8, 8, RolloutConfig(stop=["</answer>", "\n"]))
    assert "rollout.stop ('</answer>', '\\n')" in told and "\n" not in told
