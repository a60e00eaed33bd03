"""From a question to the text that the model continues: chat template, instruction, worked examples."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from megatron_nft.config import DataConfig
from megatron_nft.errors import UserError, first_line
from megatron_nft.prompts.instructions import instruct
from megatron_nft.prompts.tables import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKS = {"user": "Question: ", "assistant": "Answer: "}  # of the plain template
_EXAMPLES = (".jsonl", ".json", ".yaml", ".yml")


@dataclass
class Template:
    """What makes a prompt of a question, for one tokenizer and the settings of `data`."""

    tokenizer: "PreTrainedTokenizerBase"
    data: DataConfig
    examples: list[dict[str, str]]  # turns
    jinja: str | None  # None: the tokenizer's own

    @classmethod
    def load(cls, tokenizer: "PreTrainedTokenizerBase", data: DataConfig) -> "Template":
        """Read data.few_shot and data.template. Raises UserError for a file that is missing or holds something else, and where
        data.template is chat and the tokenizer has no chat template."""
        jinja = None
        if data.template == "chat" and not tokenizer.chat_template:
            raise UserError(f"the tokenizer in {tokenizer.name_or_path} has no chat template",
                            "add chat_template.jinja to the directory, or set data.template to plain or to a Jinja file")  # fmt: skip
        if data.template not in ("chat", "plain"):
            jinja = _read_template(Path(data.template))
        return cls(tokenizer, data, _read_examples(data), jinja)

    def text(self, question: str, turns: Sequence[dict] = ()) -> str:
        """The text that the model continues: system, worked examples, earlier turns, the question with its instruction, and what
        begins an answer.

        It holds all special tokens, so encode it with add_special_tokens=False. data.system replaces a system turn of the data.
        Raises UserError when the chat template refuses the conversation.
        """
        system = [] if self.data.system is None else [{"role": "system", "content": self.data.system}]
        earlier = [turn for turn in turns if not (system and turn["role"] == "system")]
        first = [turn for turn in earlier if turn["role"] == "system"]  # before the examples, as templates want it
        rest = [turn for turn in earlier if turn["role"] != "system"]
        last = {"role": "user", "content": instruct(question, self.data.instruction)}
        messages = [*system, *first, *self.examples, *rest, last]
        return self._plain(messages) if self.data.template == "plain" else self._chat(messages)

    def _chat(self, messages: list[dict[str, str]]) -> str:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(messages, chat_template=self.jinja, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(f"the chat template refuses a conversation of {roles} ({first_line(error)})",
                            "leave data.system unset, or mend the template") from None  # fmt: skip

    def _plain(self, messages: list[dict[str, str]]) -> str:
        """Blocks of question and answer; the token that the tokenizer begins a text with comes first."""
        text = ""
        for message in messages:
            text += "\n" if message["role"] == "assistant" else "\n\n" if text else ""
            text += _MARKS.get(message["role"], "") + message["content"]
        start = self.tokenizer.bos_token or ""
        begins = bool(start) and self.tokenizer("a")["input_ids"][0] == self.tokenizer.bos_token_id
        return f"{start if begins else ''}{text}\nAnswer:"


def _read_template(path: Path) -> str:
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        text = path.read_text(encoding="utf-8")
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except (OSError, UnicodeDecodeError):
        raise UserError(f"data.template: no text file at {path}", "use chat, plain, or the path of a Jinja file") from None
    except TemplateError as error:
        raise UserError(f"data.template: {path} is no Jinja template (line {getattr(error, 'lineno', '?')}: {error})", "mend it") from None
    return text


def _read_examples(data: DataConfig) -> list[dict[str, str]]:
    """The turns of data.few_shot, each question with the instruction."""
    if data.few_shot is None:
        return []
    path, turns = Path(data.few_shot), []
    for number, row in enumerate(_read_any(path), start=1):
        if not (isinstance(row, dict) and isinstance(row.get("question"), str) and isinstance(row.get("answer"), str)):
            raise UserError(f"data.few_shot: example {number} of {path} has no question and answer that are texts",
                            "give each example both, e.g. {question: 1+1?, answer: 'It is \\boxed{2}.'}")  # fmt: skip
        turns += [{"role": "user", "content": instruct(row["question"], data.instruction)}, {"role": "assistant", "content": row["answer"]}]
    if not turns:
        raise UserError(f"data.few_shot: {path} holds no example", "give one or more, or leave it out")
    return turns


def _read_any(path: Path) -> list[Any]:
    if not path.is_file() or path.suffix not in _EXAMPLES:
        raise UserError(f"data.few_shot: no file of examples at {path}", f"give one that ends in {', '.join(_EXAMPLES)}")
    if path.suffix in (".jsonl", ".json"):
        return list(read_json(path))
    try:
        rows = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1} of {path}" if mark else str(path)
        problem = getattr(error, "problem", None) or "not UTF-8"
        raise UserError(f"data.few_shot: {where} is not YAML ({problem})", "mend it") from None
    if not isinstance(rows, list):
        raise UserError(f"data.few_shot: {path} is no list", "write one `- {question: ..., answer: ...}` for each example")
    return rows
