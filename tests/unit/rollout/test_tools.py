"""Conversations of a rollout function with an engine that writes from a script."""

import sys
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest

from megatron_nft.config import Config, load
from megatron_nft.errors import UserError
from megatron_nft.prompts import Cursor, PromptSet, load_tokenizer
from megatron_nft.rewards import Judge
from megatron_nft.rollout import Request, Sampler
from megatron_nft.rollout.tools import Conversation, generate, resolve
from megatron_nft.rollout.verdicts import answer as judged
from megatron_nft.trajectories import Prompt, Response
from tests.support import ROOT, load_example
from tests.unit.rollout.fakes import LENGTHS, MIXED, RIGHT, WRONG, FakeEngine, fake_prompt, on_ranks

END = "<|im_end|>"
PROMPT = Prompt("set/0", "What is 47*8+35?", "411", (5, 6, 7), "set")
REQUEST = Request(PROMPT.token_ids, 0.7, 0.9, 64, seed=11)
calculator = load_example("calculator/calculator.py").calculator


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ROOT / "examples/arithmetic/model")


@dataclass
class Script:
    """An engine that writes the texts of a script, one a request, each token with log-prob -0.5."""

    tokenizer: object
    texts: list[str]
    asked: list[Request] = field(default_factory=list)
    version: int = 0

    def __call__(self, request: Request) -> Response:
        text = self.texts[len(self.asked)]
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        self.asked.append(request)
        ended = len(ids) <= request.max_tokens and text.endswith((END, *request.stop))
        reason = "stop" if ended or len(ids) < request.max_tokens else "length"
        ids = ids[: request.max_tokens]
        return Response(ids, [-0.5] * len(ids), reason, self.version, self.tokenizer.decode(ids, skip_special_tokens=True))


def talk(conversation: Conversation, script: Script, calls: int = 99) -> Response:
    while calls and (request := conversation.next_request()) is not None:
        conversation.send(script(request))
        calls -= 1
    return conversation.response


def trained(response: Response, tokenizer, mask: int) -> str:
    return tokenizer.decode([token for token, counts in zip(response.token_ids, response.loss_mask) if counts == mask])


def test_a_calculator(tokenizer):
    """What the model wrote has mask 1 and its log-probs, what the calculator wrote 0 and 0.0; every call goes on where the last ended."""
    script = Script(tokenizer, ["7*8=", ",40*8=", ",56+320=", ",376+35=", f" \\boxed{{411}}{END}"])
    conversation = Conversation(calculator, PROMPT, REQUEST, tokenizer)
    found = talk(conversation, script)
    assert found.text == "7*8=56,40*8=320,56+320=376,376+35=411 \\boxed{411}" and found.finish_reason == "stop"
    assert trained(found, tokenizer, 0) == "56320376411"
    assert trained(found, tokenizer, 1) == f"7*8=,40*8=,56+320=,376+35= \\boxed{{411}}{END}"
    assert found.logprobs == [-0.5 if counts else 0.0 for counts in found.loss_mask] and conversation.error is None
    so_far = tuple(tokenizer("7*8=56,40*8=320", add_special_tokens=False)["input_ids"])
    third = script.asked[2]
    assert third.token_ids == PROMPT.token_ids + so_far and third.max_tokens == 64 - len(so_far)
    assert (third.temperature, third.top_p, third.stop) == (0.7, 0.9, ("=",))
    assert len({request.seed for request in script.asked}) == 5 and conversation.next_request() is None


def test_a_request_is_the_same_until_it_is_answered_and_seeds_hang_on_the_answers_seed(tokenizer):
    first, again, other = (Conversation(calculator, PROMPT, replace(REQUEST, seed=s), tokenizer) for s in (11, 11, 12))
    assert first.next_request() == first.next_request() == again.next_request()
    assert first.next_request().seed != other.next_request().seed


@pytest.mark.parametrize("max_tokens, text", [(4, "7*8="), (5, "7*8=5"), (6, "7*8=56"), (3, "7*8"), (7, "7*8=56,")])
def test_both_count_in_the_length(tokenizer, max_tokens, text):
    """One token a digit: cut in the model's part, and in the calculator's."""
    closed = []

    def function(prompt, answer):
        try:
            yield from calculator(prompt, answer)
        finally:
            closed.append(True)

    found = talk(Conversation(function, PROMPT, replace(REQUEST, max_tokens=max_tokens), tokenizer), Script(tokenizer, ["7*8=", ",40*8="]))
    assert found.text == text and found.finish_reason == "length" and closed == [True]
    assert len(found.token_ids) == len(found.loss_mask) == len(found.logprobs) == max_tokens


def test_an_answer_that_just_fits_is_not_cut(tokenizer):
    """The model's end token, or the function's last text, is the last token there is room for."""
    found = talk(Conversation(calculator, PROMPT, replace(REQUEST, max_tokens=2), tokenizer), Script(tokenizer, [f"7{END}"]))
    assert found.text == "7" and found.finish_reason == "stop" and len(found.token_ids) == 2

    def once(prompt, answer):
        yield "="
        answer.append("56")

    found = talk(Conversation(once, PROMPT, replace(REQUEST, max_tokens=6), tokenizer), Script(tokenizer, ["7*8="]))
    assert found.text == "7*8=56" and found.finish_reason == "stop"


def test_a_function_may_begin_end_and_go_on_after_the_model(tokenizer):
    """It writes first; the model ends its turn; the function writes another turn, and ends the answer itself."""

    def function(prompt, answer):
        answer.append("47*8=376,")
        assert (yield ()) is False
        answer.append("376+35=")
        assert (yield (",", ".")) is True
        answer.append("!")

    found = talk(Conversation(function, PROMPT, REQUEST, tokenizer), Script(tokenizer, [f"so{END}", "411."]))
    assert tokenizer.decode(found.token_ids) == f"47*8=376,so{END}376+35=411.!" and found.finish_reason == "stop"
    assert trained(found, tokenizer, 1) == f"so{END}411."


def test_the_runs_own_stop_texts_stay(tokenizer):
    script = Script(tokenizer, ["7*8=", "done."])
    found = talk(Conversation(calculator, PROMPT, replace(REQUEST, stop=(".", "=")), tokenizer), script)
    assert found.text == "7*8=56done." and script.asked[0].stop == (".", "=")


def failing(prompt, answer):
    yield "="
    raise ValueError("no such\ntable")


def silent(prompt, answer):
    if answer.text:
        yield "="


def wrong(prompt, answer):
    yield "="
    yield 7


@pytest.mark.parametrize(
    "function, said, text",
    [(failing, "ValueError: no such table", "7*8="), (silent, "before the engine wrote", ""), (wrong, "it yielded 7", "7*8=")],
)
def test_an_error_ends_the_answer(tokenizer, function, said, text):
    conversation = Conversation(function, PROMPT, REQUEST, tokenizer)
    found = talk(conversation, Script(tokenizer, ["7*8="]))
    assert found.text == text and found.finish_reason == "stop" and conversation.next_request() is None
    assert said in conversation.error and "\n" not in conversation.error and "set/0" in conversation.error


def interrupted(conversation: Conversation, script: Script, calls: int, tokens: int) -> Response:
    """After so many whole calls, a part of one."""
    talk(conversation, script, calls)
    part = script(conversation.next_request())
    script.asked.pop()
    ids = part.token_ids[:tokens]
    conversation.send(Response(ids, part.logprobs[:tokens], "unfinished", script.version, ""))
    return conversation.response


@pytest.mark.parametrize("calls, tokens", [(0, 0), (0, 2), (1, 0), (1, 3), (2, 0), (2, 3)])
@pytest.mark.parametrize("form", ["goes on", "again"])
def test_an_interrupted_answer_goes_on(tokenizer, calls, tokens, form):
    """In the same conversation, or in a new one that begins with what was written; a tool that says something else by then is not heard."""
    texts = ["7*8=", ",40*8=", f" \\boxed{{320}}{END}"]
    conversation, script = Conversation(calculator, PROMPT, REQUEST, tokenizer), Script(tokenizer, texts, version=3)
    begun = interrupted(conversation, script, calls, tokens)
    before = len(begun.token_ids)

    def restless(prompt, answer):
        while (yield "="):
            answer.append("0" if len(answer.token_ids) < before else str(eval(answer.text.rsplit(",")[-1].rstrip("="))))

    if form == "again":
        before_it, conversation = conversation, Conversation(restless, PROMPT, REQUEST, tokenizer, begun)
        assert conversation.response == (begun if begun.token_ids else replace(begun, weight_version=0))
        assert conversation.next_request() == before_it.next_request()
    assert conversation.next_request().token_ids == PROMPT.token_ids + tuple(begun.token_ids)
    rest = texts[calls:]
    if tokens:
        rest[0] = tokenizer.decode(tokenizer(rest[0], add_special_tokens=False)["input_ids"][tokens:])
    found = talk(conversation, Script(tokenizer, rest, version=4))
    assert found.text == "7*8=56,40*8=320 \\boxed{320}" and found.finish_reason == "stop"
    assert found.versions == [3] * before + [4] * (len(found.token_ids) - before)
    assert trained(found, tokenizer, 0) == "56320"


def adding(prompt, answer):
    """Three calls for the prompts of the first kind, one for the others; an error in some."""
    for _ in range(3 if prompt.token_ids[0] == RIGHT else 1):
        yield ()
        answer.append("1+1")
    if prompt.token_ids[0] == WRONG:
        raise KeyError("of a tool")


@pytest.mark.parametrize("ranks, tp", [(1, 1), (3, 1), (4, 2)])
def test_engines_go_on_together(tokenizer, ranks, tp):
    """However many calls the answers of an engine need, every engine takes part in all of them; finished ones are handed on at once."""
    prompts = [fake_prompt(kind, i) for i, kind in enumerate([RIGHT, MIXED, WRONG, MIXED])]

    def run(engine: FakeEngine):
        share = prompts[engine.index :: engine.count]
        requests, told = [Request(prompt.token_ids, 1.0, 1.0, 40, seed=7) for prompt in share], []
        found = generate(engine, adding, tokenizer, share, requests, lambda index, response: told.append((index, response)))
        assert sorted(told, key=lambda pair: pair[0]) == list(enumerate(found[0]))
        return share, found

    for share, (responses, errors) in on_ranks(ranks, 1, run, tp):
        for prompt, response in zip(share, responses, strict=True):
            length, again = LENGTHS[prompt.token_ids[0]], [1, 0, 0, 0] * (2 if prompt.token_ids[0] == RIGHT else 0)
            assert response.loss_mask == [1] * length + [0] * 3 + again
        assert len(errors) == sum(prompt.token_ids[0] == WRONG for prompt in share)


class Toy:
    """A tokenizer whose text is the tokens' numbers; a tool's word is one token."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict:
        return {"input_ids": [99] if text else []}

    def decode(self, token_ids, skip_special_tokens: bool) -> str:
        return "\\boxed{1}" if 1 in token_ids else "\\boxed{2}"


TOY = "megatron_nft_toy_tools"


@pytest.fixture
def toy(monkeypatch):
    """The function of that name: one word of a tool after the model's; it fails for prompts of the second kind."""

    def one_word(prompt, answer):
        yield ()
        answer.append("word")
        if prompt.token_ids[1] == 12:
            raise ValueError("of a tool")

    monkeypatch.setitem(sys.modules, TOY, SimpleNamespace(one_word=one_word))
    return f"{TOY}:one_word"


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("carried", [0, 1])
def test_the_sampler_lets_a_function_write(toy, ranks, carried):
    """Answers of a step, and those that are interrupted and go on in the next one; errors are counted and told of once."""
    config = Config()
    config.rollout.prompts_per_step, config.rollout.n, config.train.prompts_per_update, config.rollout.function = 3, 4, 1, toy
    config.rollout.max_staleness, config.rollout.order = carried, "started" if carried else "prompt"

    def run(engine: FakeEngine):
        engine.tokenizer = Toy()
        prompts = PromptSet([fake_prompt(MIXED, i) for i in range(40)])
        with Judge({}, "strict_box", workers=1, time_limit=1) as judge:
            own = Sampler(engine, judge, Cursor(prompts, 1, shuffle=False, most_skipped=0.0), config)
            return [own.groups(step) for step in range(1, 5)]

    parts = on_ranks(ranks, 4, run, length=lambda prompt, sample: 2 + (prompt[1] + sample) % 3, slots=16)
    for rollouts in zip(*parts):
        groups = [group for one in rollouts for group in one.groups]
        assert len(groups) == 3
        for response in (response for group in groups for response in group.responses):
            assert response.token_ids[-1] == 99 and response.loss_mask == [1] * (len(response.token_ids) - 1) + [0]
            assert response.logprobs == [-0.5] * (len(response.token_ids) - 1) + [0.0] and 3 <= len(response.token_ids) <= 5
    told = [one for one in parts[0] if one.warnings]
    assert sum(one.statistics["tool_errors"] for one in parts[0]) == 4 and len(told) == 1 and "set/2" in told[0].warnings[0]


def test_evaluation_lets_it_write_too(toy):
    with Judge({}, "strict_box", workers=1, time_limit=1) as judge:
        engine = FakeEngine(2)
        engine.tokenizer = Toy()
        prompts = [fake_prompt(RIGHT, 0), fake_prompt(RIGHT, 1)]
        requests = [[Request(p.token_ids, 1.0, 1.0, 8, seed) for seed in range(2)] for p in prompts]
        groups = judged(engine, judge, prompts, requests, function=toy)
    assert [r.token_ids[-1] for g in groups for r in g.responses] == [99] * 4 and all(g.correct_rate == 1.0 for g in groups)


def test_the_example_is_a_config():
    config = load(ROOT / "examples/calculator/nft.yaml")
    assert resolve(str(ROOT / config.rollout.function)).__name__ == "calculator"


def test_a_tool_that_is_silent_the_second_time(tokenizer):
    """What it wrote stands, and the function goes on after it."""
    conversation = Conversation(calculator, PROMPT, REQUEST, tokenizer)
    begun = interrupted(conversation, Script(tokenizer, ["7*8=", ",40*8="]), 1, 2)

    def silent(prompt, answer):
        while True:
            yield "="

    again = Conversation(silent, PROMPT, REQUEST, tokenizer, begun)
    assert again.response == begun and again.next_request() == conversation.next_request()


def test_names_resolve(tmp_path):
    assert resolve(str(ROOT / "examples/calculator/calculator.py:calculator")).__name__ == "calculator"
    (tmp_path / "mine.py").write_text("def plain(prompt, answer):\n    return 1\n\ndef one(prompt):\n    yield 1\n")
    for name, said in (("plain", "never yields"), ("one", r"cannot be called with \(prompt, answer\)"), ("none", "use one of plain, one")):
        with pytest.raises(UserError, match=f"rollout function .*{said}"):
            resolve(f"{tmp_path / 'mine.py'}:{name}")
    with pytest.raises(UserError, match="there is no rollout function 'calculator': use package.module:function"):
        resolve("calculator")
