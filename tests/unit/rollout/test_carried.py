"""What the colocated sampler carries from step to step, over several engines: of one version, not too old, and the same after a resume."""

import json
import random
from pathlib import Path

import pytest

from megatron_nft.config import Config
from megatron_nft.prompts import Cursor, PromptSet
from megatron_nft.rewards import Judge
from megatron_nft.rollout import Rollout, Sampler
from tests.support import one_bucket
from tests.unit.rollout.fakes import CHANCE, MIXED, RIGHT, WRONG, FakeEngine, fake_prompt, on_ranks

N, STEPS = 4, 6


def some_length(prompt: tuple[int, ...], sample: int) -> int:
    """Log-normal, the median 4 tokens, 40 at most."""
    return min(40, 1 + int(random.Random(f"{prompt}/{sample}").lognormvariate(1.5, 1)))


def trained(rollout: Rollout) -> list[tuple]:
    """All that training sees of a rank's groups."""
    return [(g.position, g.prompt.id, [(r.token_ids, r.logprobs, r.versions, r.verdict) for r in g.responses]) for g in rollout.groups]


@pytest.mark.parametrize(
    "order, unfinished, staleness, hopeless, ranks, tp, slots",
    [
        ("started", "resume", 2, None, 3, 1, 12),
        ("finished", "resume", 1, 2, 4, 2, 7),
        ("started", "drop", 2, None, 3, 1, 8),
        ("finished", "resume", 2, None, 4, 1, 4),
    ],
)
def test_carried_groups(tmp_path, order, unfinished, staleness, hopeless, ranks, tp, slots):
    config = Config()
    config.rollout.prompts_per_step, config.rollout.n, config.train.prompts_per_update = 2, N, 1
    config.rollout.order, config.rollout.unfinished, config.rollout.max_staleness = order, unfinished, staleness
    config.rollout.hopeless_after, config.data.most_skipped = hopeless, 0.5
    prompts = PromptSet([fake_prompt((MIXED, WRONG, MIXED, RIGHT, CHANCE)[i % 5], i) for i in range(30)])

    def run(engine: FakeEngine) -> list[Rollout]:
        def start() -> tuple[Cursor, Sampler]:
            cursor = Cursor(prompts, config.seed, most_skipped=config.data.most_skipped)
            return cursor, Sampler(engine, judge if engine.is_first else None, cursor, config)

        (cursor, own), resumed, rollouts = start(), None, []
        for step in range(1, STEPS + 1):
            rollouts.append(own.groups(step))
            if resumed is not None:
                again = resumed.groups(step)
                assert trained(again) == trained(rollouts[-1]) and again.statistics == rollouts[-1].statistics
            own.sync(iter([one_bucket([("a", 1)])]), version=step)
            states = json.dumps([cursor.state_dict(), own.state_dict()])
            saved = Path(tmp_path / str(step))
            own.write_carried(saved, own.carried())
            engine.gather(None)  # all have written
            cursor_again, resumed = start()
            of_cursor, of_sampler = json.loads(states)
            cursor_again.load_state_dict(of_cursor)
            resumed.load(of_sampler, saved)
        return rollouts

    with Judge({}, "strict_box", workers=1, time_limit=1) as judge:
        everyone = on_ranks(ranks, N, run, tp, slots=slots, length=some_length)
    carried = 0
    for step, parts in enumerate(zip(*everyone), start=1):
        assert all(part.statistics == parts[0].statistics for part in parts)
        groups = [group for part in parts for group in part.groups]
        assert len({group.position for group in groups}) == len(groups) == 2
        for group in groups:
            assert group.is_mixed and len(group.responses) == N
            [version] = {response.weight_version for response in group.responses}
            assert 0 <= step - 1 - version <= staleness
            assert all(len(r.versions) == len(r.token_ids) == len(r.logprobs) and r.versions == sorted(r.versions) for r in group.responses)
            carried += version < step - 1
    assert carried or unfinished == "drop"


@pytest.mark.parametrize("name, value", [("n", 2), ("max_tokens", 2)])
def test_carried_groups_that_no_longer_fit_are_sent_anew(tmp_path, name, value):
    """A run that goes on with fewer answers to a prompt, or shorter ones."""
    config = Config()
    config.rollout.prompts_per_step, config.rollout.n, config.train.prompts_per_update = 2, N, 1
    config.rollout.order, config.rollout.max_staleness = "started", 1
    prompts = PromptSet([fake_prompt(MIXED, i) for i in range(30)])

    def start(engine: FakeEngine) -> tuple[Cursor, Sampler]:
        cursor = Cursor(prompts, config.seed, shuffle=False)
        return cursor, Sampler(engine, judge, cursor, config)

    with Judge({}, "strict_box", workers=1, time_limit=1) as judge:
        cursor, own = start(FakeEngine(N, slots=12, length=lambda prompt, sample: 3 + 10 * (prompt[1] == 12)))
        own.groups(1)
        states, carried = (cursor.state_dict(), own.state_dict()), own.carried()
        own.write_carried(tmp_path, carried)
        unfinished = {group.prompt.id for group in carried if any(r.verdict is None for r in group.responses)}
        setattr(config.rollout, name, value)
        engine = FakeEngine(config.rollout.n)
        cursor, own = start(engine)
        cursor.load_state_dict(states[0])
        own.load(states[1], tmp_path)
        assert unfinished and not unfinished & {group.prompt.id for group in own.carried()}
        assert all(len(group.responses) == config.rollout.n for group in own.groups(2).groups)
        sent = [f"set/{request.token_ids[1] - 10}" for request in engine.requests]
        assert all(sent.count(one) == config.rollout.n for one in unfinished)
