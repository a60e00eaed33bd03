"""The report: a synthetic run directory becomes a page that stands alone, and a table whose numbers are right."""

import json
import re
from html.parser import HTMLParser

import pyarrow
import pyarrow.parquet
import pytest

from megatron_nft import charts, report, samples
from megatron_nft.errors import UserError
from megatron_nft.prompts import load_tokenizer
from tests.support import ROOT

HOSTILE = '<script>alert("1")</script><img src="http://evil.example/x.png">'
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Collects tags and texts, and fails on tags that do not nest."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.texts, self.titles, self.ids = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if self.open and self.open[-1] == "h3":
            self.titles.append(data)


def row(step: int, **more) -> dict:
    return {"step": step, "timestamp": 1.75e9 + step, "time/step": 10.0, "time/generate": 6.0, "time/train": 3.0, **more}


def training_row(step: int) -> dict:
    return row(step, tokens=1000, **{
        "train/correct_rate": 0.3 + step / 100, "train/kept_correct_rate": 0.4, "train/entropy": 0.5, "train/response_length": 40.0,
        "train/ratio_mean": 1.0, "train/ratio_max": 3.0, "train/clip_share_wrong": 0.2, "train/grad_norm": 0.7, "train/mixed_share": 0.5,
        "train/outcome/right": 5, "train/outcome/wrong": 3})  # fmt: skip


def answer(prompt_id: str, verdict: float, response: str) -> dict:
    return {"step": 1, "prompt_id": prompt_id, "question": f"What is 1+1? {HOSTILE}", "answer": "2", "sample": 0, "response": response,
            "verdict": verdict, "outcome": "right" if verdict else "wrong", "finish_reason": "stop", "tokens": [1, 2, 3],
            "logprobs": [0.0, 0.0, 0.0]}  # fmt: skip


@pytest.fixture
def run_dir(tmp_path):
    """A finished run of four steps with validation of one set, saved rollouts and a config."""
    rows = [row(0, **{"validation/sums/greedy": 0.25, "validation/sums/avg@8": 0.2})]
    rows += [training_row(step) for step in range(1, 5)]
    rows[2] |= {"validation/sums/greedy": 0.75, "validation/sums/avg@8": 0.4}
    rows[4] |= {"validation/sums/greedy": 0.6, "validation/sums/avg@8": 0.5}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    (tmp_path / "config.yaml").write_text("model:\n  path: models/tiny\nobjective:\n  name: nft\n  eps: 1.0\nlogging:\n  name: A & B\n")
    (tmp_path / "rollouts").mkdir()
    for step in (1, 4, 10):
        many = [answer(f"p{i % 5}", float(i % 2), f"answer {i} of step {step} {HOSTILE}") for i in range(20)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(many), tmp_path / "rollouts" / f"step_{step}.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"r": [1.0]}), tmp_path / "rollouts" / "coefficients_1.parquet")
    return tmp_path


def test_the_page_holds_the_curves_of_the_metrics_there_are(run_dir):
    path = report.write_report(run_dir)
    assert path == run_dir / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    expected = {"Validation accuracy", "Correct rate in training", "Entropy", "Response length", "Probability ratio R", "Clip share",
                "Gradient norm", "Group mixing", "Verdicts", "Seconds by stage"}  # fmt: skip
    assert expected <= set(page.titles)
    assert not {"Memory", "Prompts", "Learning rate", "Truncated answers"} & set(page.titles)
    assert [tag for tag, _ in page.tags].count("svg") == len(expected)
    assert len(page.ids) == len(set(page.ids)), "an id stands twice"


def test_the_slowest_ranks(run_dir):
    """Ratio of the median step and of the worst one; the rank that was the slowest most often."""
    rows = report.load_rows(run_dir)
    assert report.slowest(rows) == []
    for one, ratio, rank in zip(rows[1:], (1.1, 1.4, 1.2, 1.2), (3, 0, 3, 3)):
        one |= {"balance/train": ratio, "balance/train_slowest": f"rank {rank} on node-{rank // 2}"}
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert report.slowest(rows) == [("train", pytest.approx(1.2), 1.4, 2, "rank 3 on node-1", 0.75)]
    page = Page(report.write_report(run_dir).read_text(encoding="utf-8"))
    assert {"Slowest ranks", "Slowest rank"} <= set(page.titles) and "rank 3 on node-1 " in page.texts


def test_the_page_fetches_nothing_and_escapes_what_models_wrote(run_dir):
    text = report.write_report(run_dir).read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "img", "link", "iframe", "image"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "action", "data"):
                assert value.startswith("#"), f"<{tag} {name}={value}>"
            assert "http" not in (value or ""), f"<{tag} {name}={value}>"
    assert not re.search(r"@import|url\((?!#)", text)
    assert any(HOSTILE in shown for shown in page.texts)
    assert "A & B" in page.texts


def test_samples_are_right_and_wrong_ones_of_the_first_and_last_step(run_dir):
    found = samples.sample_answers(run_dir)
    assert [step for step, _, _ in found] == [1, 10]  # by number, not by name
    for _, right, wrong in found:
        assert [one["outcome"] for one in right + wrong] == ["right"] * 3 + ["wrong"] * 3
        assert len({one["prompt_id"] for one in right}) == 3


@pytest.fixture
def watched(run_dir) -> list[int]:
    """The run wrote down R and c of one answer of step 4, from a hostile text of which one token is a tool's; its tokens."""
    tokenizer = load_tokenizer(ROOT / "examples/arithmetic/model")
    ids = tokenizer(f"{HOSTILE} ½", add_special_tokens=False)["input_ids"]
    many = [answer(f"p{i % 5}", 1.0, f"plain answer {i}") | {"position": i, "sample": 0} for i in range(20)]
    many[13] |= {"tokens": ids, "prompt_id": "p3", "position": 7, "sample": 2}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(many), run_dir / "rollouts" / "step_10.parquet")
    numbers = [None, 0.5, -0.25, 0.0, *[0.125] * (len(ids) - 4)]
    pushes = {"step": [10], "position": [7], "sample": [2], "R": [[None, *[1.5] * (len(ids) - 1)]], "c": [numbers]}
    pyarrow.parquet.write_table(pyarrow.table(pushes), run_dir / "rollouts" / "coefficients_10.parquet")
    config = run_dir / "config.yaml"
    config.write_text(config.read_text().replace("models/tiny", str(ROOT / "examples/arithmetic/model")))
    return ids


def test_tokens_have_the_colours_of_their_coefficients(run_dir, watched):
    page = Page(report.write_report(run_dir).read_text(encoding="utf-8"))
    spans = [attributes for tag, attributes in page.tags if tag == "span" and "title" in attributes]
    assert [one["title"] for one in spans[:4]] == ["not trained on", "R 1.5, c +0.5", "R 1.5, c -0.25", "R 1.5, c +0"]
    assert [one.get("class") for one in spans[:3]] == ["masked", None, None]
    assert [one.get("style") for one in spans[:5]] == [
        None, "background: rgba(44, 125, 73, 0.65)", "background: rgba(178, 58, 50, 0.33)", None, "background: rgba(44, 125, 73, 0.16)",
    ]  # fmt: skip
    assert f"{HOSTILE} ½" in "".join(page.texts) and not {"script", "img"} & {tag for tag, _ in page.tags}
    first = samples.sample_answers(run_dir, str(ROOT / "examples/arithmetic/model"))[1][1][0]
    assert "".join(token.text for token in first["tokens"]) == f"{HOSTILE} ½" and len(first["tokens"]) < len(watched) == first["length"]
    assert first["tokens"][-1].text == "½" and first["tokens"][-1].title == "R 1.5, c +0.125; R 1.5, c +0.125"  # one character, two tokens


def test_without_the_tokenizer_the_text_is_shown_as_it_is(run_dir, watched):
    right = samples.sample_answers(run_dir, "models/gone")[1][1]
    assert [one["tokens"] for one in right] == [None] * 3 and right[0]["response"] == "plain answer 13"


def test_of_many_tokens_the_middle_is_left_out():
    many = [samples.Token(str(i), "", "", False) for i in range(samples.LONGEST_ROW + 50)]
    shown = samples._shortened(many)
    assert shown[0] == many[0] and shown[-1] == many[-1] and "50 tokens" in shown[samples.LONGEST_ROW // 2].text
    assert len(shown) == samples.LONGEST_ROW + 1 and samples._shortened(many[:5]) == many[:5]


def test_long_answers_are_cut_in_the_middle():
    shown = samples._shown(answer("p", 1.0, "a" * 5000 + "b" * 5000))
    assert len(shown["response"]) < 6100
    assert shown["response"].startswith("aaa")
    assert shown["response"].endswith("bbb")
    assert "4,000 characters" in shown["response"]


def test_accuracies_and_totals(run_dir):
    rows = report.load_rows(run_dir)
    greedy, sampled = report.accuracies(rows)
    assert (sampled.name, greedy.name) == ("sums avg@8", "sums greedy")
    assert (greedy.before, greedy.after, greedy.best, greedy.best_step) == (0.25, 0.6, 0.75, 2)
    assert greedy.gain == pytest.approx(0.35)
    spent = report.totals(rows)
    assert (spent.steps, spent.tokens, spent.seconds) == (4, 4000, 50.0)
    assert spent.stages == (("generate", 30.0, 0.6), ("train", 15.0, 0.3), ("other", 5.0, 0.1))


def test_summary(run_dir):
    lines = report.summary(run_dir).splitlines()
    assert lines[0].split() == ["validation", "before", "after", "gain"]
    assert "sums greedy     25.0%     60.0%  +35.0 pts" in lines
    assert "4 steps, 4,000 sampled tokens, 0.8 minutes" in lines
    assert "generate         0.50     60.0%" in lines
    assert lines[-1] == f"report: {run_dir / 'report.html'}"


def test_a_bare_run_needs_neither_config_nor_rollouts_nor_validation(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": NaN}\n{"step": 2, "train/loss": 0.5}\n')
    page = Page(report.write_report(tmp_path).read_text(encoding="utf-8"))
    assert page.titles == ["Loss"]
    assert "2 steps" in report.summary(tmp_path)


def test_labels_are_taken_literally():
    rows = [{"step": 1, "validation/_a$\\frac$b/greedy": 0.5}, {"step": 2, "validation/_a$\\frac$b/greedy": 0.7}]
    drawn = charts.svg(charts.charts_of(rows)[0], rows)
    assert drawn.startswith("<svg viewBox=")


@pytest.mark.parametrize("kept", [None, "directory", "file"])
def test_what_is_no_run_is_named(tmp_path, kept):
    run_dir = tmp_path / "run"
    if kept:
        run_dir.mkdir()
    if kept == "file":
        (run_dir / "metrics.jsonl").write_text('{"step": 1')
    message = {None: "no run directory", "directory": "no metrics.jsonl", "file": "no complete step"}[kept]
    with pytest.raises(UserError, match=message):
        report.write_report(run_dir)


def test_curves_of_several_runs(run_dir):
    out = run_dir / "curves.png"
    report.curves_png({"NFT": run_dir, "RFT": run_dir}, out)
    assert out.read_bytes().startswith(b"\x89PNG")
    bare = run_dir / "bare"
    bare.mkdir()
    (bare / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match="bare run .* has no validation"):
        report.curves_png({"NFT": run_dir, "bare run": bare}, out)
