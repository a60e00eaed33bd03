"""Templates: chat, plain and Jinja files; instructions by name; worked examples."""

import json

import pytest

from megatron_nft.config import DataConfig
from megatron_nft.errors import UserError
from megatron_nft.prompts import load_tokenizer
from megatron_nft.prompts.instructions import DAPO_AFTER, DAPO_BEFORE, INSTRUCTIONS, instruct, strip_instruction
from megatron_nft.prompts.templates import Template
from tests.support import byte_tokenizer

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(byte_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_earlier_turns_are_kept_and_the_configured_system_turn_wins(tokenizer):
    turns = [{"role": "system", "content": "old"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert Template.load(tokenizer, DataConfig()).text("q", turns).startswith("<|system|>old<|end|><|user|>a<|end|>")
    assert Template.load(tokenizer, DataConfig(system="new")).text("q", turns).startswith("<|system|>new<|end|><|user|>a<|end|>")
    with pytest.raises(UserError, match="refuses a conversation of tool, user .no tools here"):
        Template.load(tokenizer, DataConfig()).text("q", [{"role": "tool", "content": "x"}])


@pytest.mark.parametrize("name", INSTRUCTIONS)
@pytest.mark.parametrize("question", ["1+1?", "What\n is it?", "是什么？"])
def test_what_an_instruction_puts_around_a_question_comes_off_again(name, question):
    assert instruct(question, name) != question == strip_instruction(instruct(question, name))


def test_instructions_are_the_published_ones_by_name_or_any_text():
    assert instruct("1+1?", "boxed") == f"1+1?\n{BOXED}"
    assert instruct("1+1?", "answer") == f"{DAPO_BEFORE}1+1?{DAPO_AFTER}"
    assert instruct("1+1?", "Box it.") == "1+1?\nBox it." and instruct("1+1?", "") == "1+1?"


@pytest.mark.parametrize("kind", ["jsonl", "json", "yaml"])
def test_worked_examples_are_turns_before_the_question(tmp_path, tokenizer, kind):
    rows = [{"question": "1+1?", "answer": "It is 2."}, {"question": "2+2?", "answer": "It is 4."}]
    path = tmp_path / f"shots.{kind}"
    path.write_text("\n".join(map(json.dumps, rows)) if kind == "jsonl" else json.dumps(rows))  # JSON is YAML
    data = DataConfig(few_shot=str(path), system="S", instruction="Box it.")
    assert Template.load(tokenizer, data).text("3+3?") == (
        "<|system|>S<|end|><|user|>1+1?\nBox it.<|end|><|assistant|>It is 2.<|end|>"
        "<|user|>2+2?\nBox it.<|end|><|assistant|>It is 4.<|end|><|user|>3+3?\nBox it.<|end|><|assistant|>"
    )
    turns = [{"role": "system", "content": "T"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = Template.load(tokenizer, DataConfig(few_shot=str(path))).text("q", turns)
    assert text.startswith("<|system|>T<|end|><|user|>1+1?<|end|>") and text.endswith("It is 4.<|end|><|user|>a<|end|><|assistant|>b<|end|>"
                                                                                     "<|user|>q<|end|><|assistant|>")  # fmt: skip


def test_the_plain_template_has_no_markup(tmp_path, tokenizer):
    path = tmp_path / "shots.yaml"
    path.write_text("- {question: '1+1?', answer: It is 2.}\n")
    assert Template.load(tokenizer, DataConfig(template="plain")).text("q?") == "Question: q?\nAnswer:"
    data = DataConfig(template="plain", few_shot=str(path), system="Do sums.")
    assert Template.load(tokenizer, data).text("q?") == "Do sums.\n\nQuestion: 1+1?\nAnswer: It is 2.\n\nQuestion: q?\nAnswer:"


def test_the_plain_template_begins_as_the_tokenizer_begins_a_text(tmp_path):
    from tokenizers.processors import TemplateProcessing

    begins = load_tokenizer(byte_tokenizer(tmp_path))
    begins.bos_token = "<|system|>"
    assert Template.load(begins, DataConfig(template="plain")).text("q?").startswith("Question")  # it has one, and does not use it
    pair = ("<|system|>", begins.bos_token_id)
    begins.backend_tokenizer.post_processor = TemplateProcessing(single="<|system|> $A", special_tokens=[pair])
    assert Template.load(begins, DataConfig(template="plain")).text("q?") == "<|system|>Question: q?\nAnswer:"


def test_a_template_of_ones_own(tmp_path, tokenizer):
    path = tmp_path / "own.jinja"
    path.write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[me] {% endif %}")
    assert Template.load(tokenizer, DataConfig(template=str(path), system="S")).text("q") == "[system] S\n[user] q\n[me] "


@pytest.mark.parametrize(
    ("setting", "name", "content", "said"),
    [
        ("template", "chatt", None, "data.template: no text file at"),
        ("template", "a.jinja", b"{% for %}", "is no Jinja template (line 1"),
        ("template", "a.jinja", b"\xff", "no text file at"),
        ("few_shot", "a.jsonl", None, "data.few_shot: no file of examples at"),
        ("few_shot", "a.txt", b"x", "data.few_shot: no file of examples at"),
        ("few_shot", "a.jsonl", b'{"question": "q"}\n', "example 1 of"),
        ("few_shot", "a.jsonl", b"{", "line 1 of"),
        ("few_shot", "a.jsonl", b"", "holds no example"),
        ("few_shot", "a.yaml", b"- [", "line 1 of"),
        ("few_shot", "a.yaml", b"question: q\nanswer: a\n", "is no list"),
        ("few_shot", "a.yaml", b"- {question: 1, answer: 2}\n", "example 1 of"),
    ],
)
def test_what_is_wrong_with_a_template_or_examples_is_said_in_one_line(tmp_path, tokenizer, setting, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        Template.load(tokenizer, DataConfig(**{setting: str(tmp_path / name)}))
    assert said in str(caught.value) and "\n" not in str(caught.value)
