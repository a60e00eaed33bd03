"""Answers with tools: a function of the user's lets the engine write a part of an answer, writes a part itself, and so on.

    def calculator(prompt, answer):
        while (yield "="):                  # the engine writes on; true: it has written "=", false: it has ended the answer
            answer.append(result(answer.text))

It is a generator function (prompt: Prompt, answer: Answer). What it yields are the texts at which it wants to be asked: one, or a tuple of
them; () lets the engine write to its end. What it gets back is whether the engine stopped at one of them. `answer.append` puts text into
the answer: special tokens in it count as such, nothing of it is trained on (loss mask 0, log-prob 0.0). The answer ends where the function
does, or where rollout.max_tokens, which counts both, are used up: then the function is closed at its yield.

The functions of many answers are driven by one thread, each for as long as it takes to its next yield: a slow tool holds up all of them.
"""

import inspect
from collections.abc import Callable, Generator
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING

from megatron_nft.errors import UserError
from megatron_nft.rewards.functions import load_function
from megatron_nft.rollout.seeds import seed_of
from megatron_nft.rollout.settings import Request
from megatron_nft.trajectories import Prompt, Response

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megatron_nft.rollout.engine import Engine

Stops = str | tuple[str, ...]
RolloutFunction = Callable[[Prompt, "Answer"], Generator[Stops, bool, None]]


def resolve(name: str) -> RolloutFunction:
    """The function of that name, `package.module:function` or `path/to/file.py:function`.

    Raises UserError when it cannot be found or loaded, is no generator function, or cannot be called with (prompt, answer).
    """
    what = f"rollout function {name!r}"
    function = load_function(name, what, ("prompt", "answer"), "use package.module:function or path/to/file.py:function")
    if not inspect.isgeneratorfunction(function):
        raise UserError(f"{what} never yields", 'let it yield the text at which the engine is to stop, e.g. yield "="')
    return function


class Answer:
    """What stands of an answer, for the function that writes it with the engine."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", max_tokens: int, recorded: Response | None):
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.loss_mask: list[int] = []
        self.cut = False  # whether there was more to write than room
        self._tokenizer, self._max_tokens, self._recorded = tokenizer, max_tokens, recorded

    @property
    def text(self) -> str:
        """Of all that has been written, special tokens left out."""
        return self._tokenizer.decode(self.token_ids, skip_special_tokens=True)

    @property
    def room(self) -> int:
        """Tokens that may still be written."""
        return self._max_tokens - len(self.token_ids)

    def append(self, text: str) -> None:
        """Write text into the answer, as much of it as there is room for."""
        tokens = self._as_recorded(list(self._tokenizer(text, add_special_tokens=False)["input_ids"]))
        self.cut |= len(tokens) > self.room
        tokens = tokens[: self.room]
        self.extend(tokens, [0.0] * len(tokens), 0)

    def extend(self, token_ids: list[int], logprobs: list[float], mask: int) -> None:
        """Take in tokens as they are."""
        self.token_ids += token_ids
        self.logprobs += logprobs
        self.loss_mask += [mask] * len(token_ids)

    def _as_recorded(self, tokens: list[int]) -> list[int]:
        """While an interrupted answer is written again, what a tool said then counts, whatever it says now."""
        at, recorded = len(self.token_ids), self._recorded
        if recorded is None or at >= len(recorded.token_ids):
            return tokens
        then = recorded.token_ids[at : _end_of_run(recorded, at, 0)]
        return tokens if tokens and then[: len(tokens)] == tokens else then


class Conversation:
    """One answer on its way, step by step: `next_request` is what the engine has to write now, `send` takes what it wrote.

    next_request() is the same until something is sent, so a request that an engine lost can be asked for again. Each call of the engine
    has a seed of its own, which depends on the request's and on how many tokens there are by then: the same in a conversation that goes
    on and in one that begins with what was written. An engine that is interrupted sends what it has, with the finish reason "unfinished";
    next_request() goes on after it. A function that raises ends its answer: `error` says why, in one line.
    """

    def __init__(
        self,
        function: RolloutFunction,
        prompt: Prompt,
        request: Request,
        tokenizer: "PreTrainedTokenizerBase",
        begun: Response | None = None,
    ):
        """request: of the whole answer; at its stop texts the engine has ended it. begun: what `response` gave of an interrupted answer;
        the function runs again up to there, and gets what was written then."""
        self.error: str | None = None
        self._function, self._prompt, self._request, self._tokenizer = function, prompt, request, tokenizer
        self._answer = Answer(tokenizer, request.max_tokens, begun)
        self._versions: list[tuple[int, int]] = []  # (first token, weight version)
        self._first, self._asked = 0, False  # the token at which the running call began; whether there was a call
        self._stops: tuple[str, ...] = ()
        self._finish_reason = "unfinished"
        self._generator = function(prompt, self._answer)
        self._advance(None)
        while begun is not None and self.next_request() is not None and len(self._answer.token_ids) < len(begun.token_ids):
            self._answer.append("")  # what a tool wrote stands, should it write nothing now
            self.send(self._recorded_call(begun))

    def next_request(self) -> Request | None:
        """What the engine has to write next; None when the answer is complete."""
        if self._finish_reason != "unfinished":
            return None
        return replace(
            self._request,
            token_ids=(*self._request.token_ids, *self._answer.token_ids),
            max_tokens=self._answer.room,
            seed=seed_of(self._request.seed, len(self._answer.token_ids)),
            stop=tuple(dict.fromkeys((*self._request.stop, *self._stops))),
        )

    def send(self, response: Response) -> None:
        """What the engine wrote to the last request."""
        if response.token_ids:
            at, own = len(self._answer.token_ids), ((0, response.weight_version), *(response.later_versions or ()))
            self._versions += [(at + first, version) for first, version in own]
        self._answer.extend(response.token_ids, response.logprobs, 1)
        self._asked = True
        self._answer.cut |= response.finish_reason == "length"
        if response.finish_reason != "unfinished":
            reached = response.finish_reason == "stop" and self._holds_stop(self._answer.token_ids[self._first :])
            self._advance(reached)

    @property
    def response(self) -> Response:
        """The answer so far, "unfinished" until it is complete: tokens of tools have mask 0 and log-prob 0.0."""
        answer = self._answer
        kept = [pair for pair, before in zip(self._versions, [(0, None), *self._versions]) if pair[1] != before[1]]
        version, later = kept[0][1] if kept else 0, kept[1:] or None
        ids, logprobs, mask = list(answer.token_ids), list(answer.logprobs), list(answer.loss_mask)
        return Response(ids, logprobs, self._finish_reason, version, answer.text, mask, later_versions=later)

    def _advance(self, reached: bool | None) -> None:
        """Run the function to its next yield; `reached` is what it gets (None: it begins)."""
        try:
            stops = self._generator.send(reached)
            if self._answer.room:
                self._stops, self._first = _checked(stops), len(self._answer.token_ids)
                return
            self._answer.cut = True
            self._generator.close()
        except StopIteration:
            if not self._asked:
                self._fail("it ended before the engine wrote anything")
        except Exception as error:  # noqa: BLE001 - whatever the user's function raises
            self._fail(f"{type(error).__name__}: {error}")
        self._finish_reason = "length" if self._answer.cut else "stop"

    def _fail(self, reason: str) -> None:
        name = getattr(self._function, "__name__", "?")
        self.error = " ".join(f"rollout function {name} failed in an answer to {self._prompt.id}, which ends there ({reason})".split())

    def _holds_stop(self, token_ids: list[int]) -> bool:
        """Whether one of the function's texts is in these tokens of the running call."""
        text = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return any(stop in text for stop in self._stops)

    def _recorded_call(self, begun: Response) -> Response:
        """What the engine wrote to the next request, out of an interrupted answer. The last call is the interrupted one, unless a stop text
        or a tool's tokens end it."""
        at = len(self._answer.token_ids)
        end = _end_of_run(begun, at, 1)
        low, high = at, end + 1  # the least end with which a stop text is there; end + 1: none
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._holds_stop(begun.token_ids[at:middle]) else (middle, high)
        over = high <= end or end < len(begun.token_ids)
        end, versions = min(high, end), begun.versions
        later = [(i - at, versions[i]) for i in range(at + 1, end) if versions[i] != versions[i - 1]]
        ids, logprobs = begun.token_ids[at:end], begun.logprobs[at:end]
        return Response(ids, logprobs, "stop" if over else "unfinished", versions[at], "", later_versions=later or None)


class Talks:
    """The conversations of the answers that run, by their numbers; without a function the engine writes each answer alone.

    `errors`: what the function said in failing, of the answers that are over.
    """

    def __init__(self, function: RolloutFunction | None, tokenizer: "PreTrainedTokenizerBase | None"):
        self.errors: list[str] = []
        self._function, self._tokenizer = function, tokenizer
        self._running: dict[int, Conversation] = {}

    def begin(self, number: int, prompt: Prompt, request: Request, max_tokens: int, before: Response | None) -> Request | None:
        """What the engine has to write first; None where there is nothing. request: of what is missing of the answer, if `before` is there
        of it; max_tokens: of the whole."""
        if self._function is None:
            return request
        whole = replace(request, token_ids=prompt.token_ids, max_tokens=max_tokens)
        self._running[number] = Conversation(self._function, prompt, whole, self._tokenizer, before)
        return self._running[number].next_request()

    def go_on(self, number: int, response: Response) -> Request | None:
        """What the engine has to write after this; None where the answer is over."""
        if self._function is None:
            return None
        self._running[number].send(response)
        return self._running[number].next_request()

    def end(self, number: int, response: Response, before: Response | None, decode: Callable[[list[int]], str]) -> Response:
        """The whole answer, of which the engine's last response is known already, or what there is of an unfinished one."""
        if self._function is None:
            return response if before is None else before.followed_by(response, decode(before.token_ids + response.token_ids))
        talk = self._running.pop(number)
        self.errors += [talk.error] if talk.error else []
        return talk.response


def generate(
    engine: "Engine",
    function: RolloutFunction,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: list[Prompt],
    requests: list[Request],
    on_finish: Callable[[int, Response], None] | None = None,
) -> tuple[list[Response], list[str]]:
    """Engine.generate with a rollout function: the answers to requests[i] of prompts[i], and the errors of the function.

    All answers go on together, one call of the engine each, until the last one is complete; a collective, in which every engine takes part
    as long as one of them has something to write.
    """
    conversations = [Conversation(function, *pair, tokenizer) for pair in zip(prompts, requests, strict=True)]
    going = [i for i, one in enumerate(conversations) if one.next_request() is not None]

    def take(which: int, response: Response) -> None:
        index = going[which]
        conversations[index].send(response)
        if on_finish is not None and conversations[index].next_request() is None:
            on_finish(index, conversations[index].response)

    for index in set(range(len(conversations))).difference(going) if on_finish else ():  # failed before it had begun
        on_finish(index, conversations[index].response)
    while any(engine.gather(bool(going))):
        engine.generate([conversations[i].next_request() for i in going], take)
        going = [i for i in going if conversations[i].next_request() is not None]
    return [one.response for one in conversations], [one.error for one in conversations if one.error]


def _checked(stops: object) -> tuple[str, ...]:
    texts = (stops,) if isinstance(stops, str) else stops
    if not (isinstance(texts, tuple | list) and all(isinstance(text, str) and text for text in texts)):
        raise TypeError(f"it yielded {stops!r}, and not a text, or a tuple of texts, at which the engine is to stop")
    return tuple(texts)


def _end_of_run(response: Response, at: int, mask: int) -> int:
    """Where the tokens of this mask that begin at `at` end."""
    return at + sum(1 for _ in takewhile(lambda value: value == mask, response.mask()[at:]))
