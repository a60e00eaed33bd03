"""How answers end: what is told where none of them ends by itself."""

from megatron_nft.config import RolloutConfig


def warnings(truncated: int, sampled: int, rollout: RolloutConfig) -> list[str]:
    """A step's warning where every one of its `sampled` answers was cut off at rollout.max_tokens: they learn nothing of how to end."""
    if not sampled or truncated < sampled:
        return []
    strings = f"nor any of rollout.stop ({', '.join(map(repr, rollout.stop))})" if rollout.stop else "and rollout.stop is empty"
    return [
        f"all {sampled} answers ended by length, at rollout.max_tokens ({rollout.max_tokens}): none has the model's end token, {strings} "
        "(see that the model's generation_config.json has the chat template's end token, raise max_tokens, or set rollout.stop)"
    ]
