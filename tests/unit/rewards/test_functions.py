"""Names of verdict functions, and what they may return."""

import numpy
import pytest

from megatron_nft.errors import UserError
from megatron_nft.rewards.boxed import strict_box
from megatron_nft.rewards.functions import as_verdict, code_of, resolve
from megatron_nft.trajectories import Verdict

SOURCE = "THRESHOLD = 1\n\ndef good(response, answer):\n    return 1.0\n\ndef three(response, answer, extra):\n    return 1.0\n"


def test_names_resolve(tmp_path, monkeypatch):
    (tmp_path / "verdicts_of_mine.py").write_text(SOURCE)
    assert resolve("strict_box") is strict_box
    assert resolve("megatron_nft.rewards.boxed:strict_box") is strict_box
    assert resolve(f"{tmp_path}/verdicts_of_mine.py:good")("r", "a") == 1.0
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve("verdicts_of_mine:good")("r", "a") == 1.0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("strictbox", "there is no verdict function 'strictbox': use strict_box, dapo, math_verify"),
        ("{dir}/mine.py", "there is no verdict function"),
        ("{dir}/absent.py:good", "no file at"),
        ("no_such_package.module:good", "cannot import no_such_package.module (ModuleNotFoundError"),
        ("{dir}/broken.py:good", "ZeroDivisionError: division by zero"),
        ("{dir}/mine.py:best", "has no function best: use one of good, three"),
        ("{dir}/mine.py:THRESHOLD", "has no function THRESHOLD"),
        ("{dir}/mine.py:three", "cannot be called with (response, answer)"),
    ],
)
def test_a_name_that_does_not_resolve_is_a_user_error(tmp_path, name, said):
    (tmp_path / "mine.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(UserError) as caught:
        resolve(name.format(dir=tmp_path))
    assert said in str(caught.value)


def test_results():
    assert as_verdict(1, "f") == as_verdict(True, "f") == Verdict(1.0, "right")
    assert as_verdict(numpy.float32(0.25), "f") == Verdict(0.25, "wrong")
    assert as_verdict(Verdict(0.0, "no_answer"), "f") == Verdict(0.0, "no_answer")
    for bad in (1.5, -0.1, float("nan"), None, "1.0", Verdict(2.0, "right"), Verdict(1.0, "splendid"), Verdict(1.0, "right", 5)):
        with pytest.raises(UserError, match="verdict function 'f' returned"):
            as_verdict(bad, "f")


def test_an_array_is_no_verdict():
    with pytest.raises(UserError, match="returned"):
        as_verdict(numpy.array([0.5, 0.5]), "f")


def test_the_code_of_a_users_function_is_told_apart(tmp_path, monkeypatch):
    (tmp_path / "megatron_nft_toy_verdict.py").write_text("def f(response, answer):\n    return 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    names = f"{tmp_path}/megatron_nft_toy_verdict.py:f", "megatron_nft_toy_verdict:f"
    before = {code_of(name) for name in names}
    (tmp_path / "megatron_nft_toy_verdict.py").write_text("def f(response, answer):\n    return 0.0\n")
    after = {code_of(name) for name in names}
    assert len(before) == len(after) == 1 and before != after and None not in before
    assert [code_of(name) for name in ("strict_box", "nowhere.py:f", "no_such_package.module:f", "")] == [None] * 4
