"""Conversions that are cut off: killed, on a full disk, or by a source that is damaged on the way."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_nft import cli, convert, verify
from megatron_nft.errors import UserError
from megatron_nft.policy import streamed
from megatron_nft.weights import load_huggingface, resume, safetensors_files, save_huggingface, writer
from tests.support import ROOT, add_tokenizer, tiny_model

KINDS = ("hf-to-megatron", "megatron-to-hf")


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> dict[str, Path]:
    """The source of each direction."""
    directory = tmp_path_factory.mktemp("pair")
    source = tiny_model(directory / "source", "llama", False, torch.bfloat16)
    assert cli.main(["convert", "hf-to-megatron", str(source), str(directory / "megatron")]) == 0
    return {"hf-to-megatron": source, "megatron-to-hf": directory / "megatron"}


@pytest.fixture
def small_files(monkeypatch):
    """Files of a few tensors, so that there are many."""
    monkeypatch.setattr(streamed, "FILE", 20_000)
    monkeypatch.setattr(streamed, "PIECE", 3_000)
    plan = writer._plan
    monkeypatch.setattr(writer, "_plan", lambda kinds, limit: plan(kinds, 20_000))


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def finishing(monkeypatch, after: int, then) -> list[str]:
    """Do something after so many files; the list gets the names of all that are finished."""
    names, original = [], resume.Unfinished.finish

    def finish(self, name: str, note: bytes = b"") -> None:
        original(self, name, note)
        names.append(name)
        if len(names) == after:
            (self.directory / "half").write_text("what a killed process leaves")
            then()

    monkeypatch.setattr(resume.Unfinished, "finish", finish)
    return names


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("kind", KINDS)
def test_goes_on_where_it_was_cut_off(pair, tmp_path, monkeypatch, small_files, kind):
    """Finished files are not written again, and the whole is what an uninterrupted run writes, to the byte."""
    source = str(pair[kind])
    assert cli.main(["convert", kind, source, str(tmp_path / "straight")]) == 0
    with monkeypatch.context() as patch:
        before = finishing(patch, after=2, then=interrupt)
        assert cli.main(["convert", kind, source, str(tmp_path / "out")]) == 130
    assert len(before) == 2 and not (tmp_path / "out").exists()
    after = finishing(monkeypatch, after=99, then=interrupt)
    assert cli.main(["convert", kind, source, str(tmp_path / "out")]) == 0
    assert after and not set(before) & set(after)
    assert files(tmp_path / "out") == files(tmp_path / "straight")
    assert not (tmp_path / "out" / resume.JOURNAL).exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "straight"]


@pytest.mark.parametrize("kind", KINDS)
def test_another_source_starts_anew(pair, tmp_path, monkeypatch, small_files, kind):
    source = shutil.copytree(pair[kind], tmp_path / "source")
    with monkeypatch.context() as patch:
        finishing(patch, after=2, then=interrupt)
        assert cli.main(["convert", kind, str(source), str(tmp_path / "out")]) == 130
    os.utime(source / "config.json", ns=(1, 1))
    after = finishing(monkeypatch, after=99, then=interrupt)
    assert cli.main(["convert", kind, str(source), str(tmp_path / "out")]) == 0
    assert len(set(after)) == len(after) and any(name.startswith(("__0_0", "model-00001")) for name in after)


CHILD = """
import os, sys
from megatron_nft import cli
from megatron_nft.policy import streamed
from megatron_nft.weights import resume
streamed.FILE, streamed.PIECE = 20_000, 3_000
finish, done = resume.Unfinished.finish, []
def killing(self, name, note=b""):
    finish(self, name, note)
    done.append(name)
    if len(done) == 3:
        os.kill(os.getpid(), 9)
resume.Unfinished.finish = killing
cli.main(["convert", "hf-to-megatron", *sys.argv[1:]])
"""


def child(code: str, *arguments, limit: int | None = None) -> subprocess.CompletedProcess:
    """A process of its own, whose files may be `limit` bytes long."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT)])}
    restrict = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500, preexec_fn=restrict)


def test_goes_on_after_a_kill(pair, tmp_path, small_files):
    source = pair["hf-to-megatron"]
    assert child(CHILD, source, tmp_path / "out").returncode == -signal.SIGKILL
    partial = tmp_path / ".out.partial"
    kept = {file: file.stat().st_mtime_ns for file in partial.glob("*.distcp")}
    assert not (tmp_path / "out").exists() and len(kept) == 3
    assert cli.main(["convert", "hf-to-megatron", str(source), str(tmp_path / "out")]) == 0
    assert {file.name: (tmp_path / "out" / file.name).stat().st_mtime_ns for file in kept} == {f.name: time for f, time in kept.items()}
    assert cli.main(["convert", "hf-to-megatron", str(source), str(tmp_path / "straight")]) == 0
    assert files(tmp_path / "out") == files(tmp_path / "straight")


def refused(capsys, *arguments) -> str:
    """The one line that the command line says."""
    assert cli.main(["convert", *map(str, arguments)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    return line


RUN = "import sys; from megatron_nft import cli; sys.exit(cli.main(['convert', *sys.argv[1:]]))"


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_gets_too_long(pair, tmp_path, kind):
    """As a full disk: the writing process is told so by the system. With no file finished, nothing is left."""
    done = child(RUN, kind, pair[kind], tmp_path / "out", limit=40_000)
    assert done.returncode == 2 and not any(tmp_path.iterdir()), done.stderr
    [line] = done.stderr.splitlines()
    assert f"no room to write {tmp_path / 'out'} (File too large): make room and run the same command again" in line


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_fills_up_keeps_finished_files(pair, tmp_path, capsys, monkeypatch, small_files, kind):
    def full() -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        finishing(patch, after=2, then=full)
        line = refused(capsys, kind, pair[kind], tmp_path / "out")
    partial = tmp_path / ".out.partial"
    assert f"it goes on after the 2 files that are finished in {partial}; or remove that directory" in line
    assert len([path for path in partial.iterdir() if path.name != resume.JOURNAL]) == 2
    assert cli.main(["convert", kind, str(pair[kind]), str(tmp_path / "out")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", KINDS)
def test_too_little_room_is_seen_beforehand(pair, tmp_path, capsys, monkeypatch, kind):
    monkeypatch.setattr(resume.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    line = refused(capsys, kind, pair[kind], tmp_path / "out")
    assert re.search(r"out needs 0\.02 GB more, and 0\.00 GB are free on its disk", line)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_too_little_room_to_go_on_keeps_finished_files(pair, tmp_path, capsys, monkeypatch, small_files, kind):
    with monkeypatch.context() as patch:
        finishing(patch, after=2, then=interrupt)
        assert cli.main(["convert", kind, str(pair[kind]), str(tmp_path / "out")]) == 130
    partial = tmp_path / ".out.partial"
    assert "the same command goes on after the files that are finished" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(resume.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
        line = refused(capsys, kind, pair[kind], tmp_path / "out")
    assert "needs 0.02 GB more" in line and f"it goes on after the 2 files that are finished in {partial}" in line
    assert len([path for path in partial.iterdir() if path.name != resume.JOURNAL]) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_two_at_once_do_not_write_one_directory(pair, tmp_path, capsys, monkeypatch, small_files, kind):
    """The second is told, and takes nothing away from the first."""
    with monkeypatch.context() as patch:
        finishing(patch, after=2, then=interrupt)
        assert cli.main(["convert", kind, str(pair[kind]), str(tmp_path / "out")]) == 130
    capsys.readouterr()
    partial = tmp_path / ".out.partial"
    with resume.Unfinished(partial).locked():
        before = files(partial)
        assert f"another conversion is writing {partial}" in refused(capsys, kind, pair[kind], tmp_path / "out")
        assert files(partial) == before
    assert cli.main(["convert", kind, str(pair[kind]), str(tmp_path / "out")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_link_as_output(pair, tmp_path, capsys, kind):
    """What it points to is written, there already or not; and a path that ends in .. names what it means."""
    (tmp_path / "there").mkdir()
    for name in ("there", "new"):
        (tmp_path / f"to_{name}").symlink_to(name)
        assert cli.main(["convert", kind, str(pair[kind]), str(tmp_path / f"to_{name}")]) == 0
        assert (tmp_path / name / "config.json").is_file() and (tmp_path / f"to_{name}").is_symlink()
    assert f"{tmp_path} exists already" in refused(capsys, kind, pair[kind], tmp_path / "there" / "..")


@pytest.mark.parametrize("kind", KINDS)
def test_a_place_that_cannot_be_written(pair, tmp_path, capsys, kind):
    for place in ("/proc/model", "/proc/models/of/mine"):
        assert f"{place} cannot be written" in refused(capsys, kind, pair[kind], place)
    for name in ("n" * 250, "n" * 300):
        assert "File name too long" in refused(capsys, kind, pair[kind], tmp_path / name)
    assert not any(tmp_path.iterdir())


def test_a_source_that_breaks_on_the_way_leaves_nothing(pair, tmp_path, capsys, monkeypatch, small_files):
    source = shutil.copytree(pair["hf-to-megatron"], tmp_path / "source")
    file = source / "model.safetensors"
    finishing(monkeypatch, after=2, then=lambda: file.write_bytes(file.read_bytes()[:-50_000]))
    line = refused(capsys, "hf-to-megatron", source, tmp_path / "out")
    assert f"{file} is damaged or incomplete" in line and [path.name for path in tmp_path.iterdir()] == ["source"]


def sharded(source: Path, directory: Path) -> Path:
    held = load_huggingface(source)
    save_huggingface(directory, ((name, held.get(name)) for name in held.names()), source, max_shard_bytes=30_000)
    return directory


@pytest.mark.parametrize("command", ["hf-to-megatron", "verify"])
def test_bad_sources(pair, tmp_path, capsys, command):
    """What tests/unit/weights finds wrong with a directory, and what only a conversion looks at."""
    model = sharded(pair["hf-to-megatron"], tmp_path / "model")
    index = model / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    rest = [tmp_path / "out"] if command != "verify" else []
    index.write_text(json.dumps({**content, "metadata": {"total_size": content["metadata"]["total_size"] + 2}}))
    assert "says total_size" in refused(capsys, command, model, *rest)
    index.write_text(json.dumps(content))
    add_tokenizer(model)
    assert re.search(r"the tokenizer in .*model has 304 tokens, and the model's embedding 101 rows", refused(capsys, command, model, *rest))
    shard = sorted(model.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "damaged or incomplete" in refused(capsys, command, model, *rest)
    shard.unlink()
    assert f"{shard.name} is missing" in refused(capsys, command, model, *rest)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_verify_sees_another_model(tmp_path):
    """The comparison of log-probs and text fails where the converted model is not the source."""
    first, second = (tiny_model(tmp_path / str(seed), "qwen2", True, seed=seed) for seed in (0, 1))
    prompts = [[5, 6, 7]]
    with convert.one_process() as place:
        settings = convert.settings_of(first, torch.float32)
        megatron = convert.policy.Policy(settings, place, trainable=False)
        verify.compare_texts(megatron, verify.greedy_texts(first, prompts))
        with pytest.raises(UserError, match="log-probs of the converted model differ"):
            verify.compare_texts(megatron, verify.greedy_texts(second, prompts))
        [(length, tokens, logprobs)] = verify.greedy_texts(first, prompts)
        logprobs[4, 5] = float("nan")
        with pytest.raises(UserError, match="differ by nan"):
            verify.compare_texts(megatron, [(length, tokens, logprobs), *verify.greedy_texts(first, prompts)])


def test_verify_without_logits(pair, capsys, monkeypatch):
    for arguments, reason in (["--no-logits"], "--no-logits"), ([], "that takes 2 GB of memory, and 1 GB are free"):
        monkeypatch.setattr(verify, "_available", lambda: 1e9)
        assert cli.main(["convert", "verify", str(pair["hf-to-megatron"]), *arguments]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == f"log-probs and greedy text were not compared: {reason}"


def test_verify_without_room_names_the_place(pair, capsys, monkeypatch):
    monkeypatch.setattr(resume.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    line = refused(capsys, "verify", pair["hf-to-megatron"])
    assert f"{tempfile.gettempdir()} has no room" in line and "set TMPDIR" in line and "megatron-nft-verify" not in line


def test_an_interrupted_verify_has_nothing_to_go_on_from(pair, capsys, monkeypatch):
    finishing(monkeypatch, after=1, then=interrupt)
    assert cli.main(["convert", "verify", str(pair["hf-to-megatron"])]) == 130
    assert capsys.readouterr().err == "megatron-nft: interrupted\n"


def test_progress_is_told_in_megabytes(capsys):
    with convert.Progress(5_000_000, "converting it") as progress:
        for _ in range(10):
            progress(500_000)
    assert capsys.readouterr().out.startswith("converting it: 5 MB in ")


def test_safetensors_are_what_the_library_writes(tmp_path):
    """Headers, order and alignment of mixed dtypes: read back by the library itself."""
    from safetensors.torch import load_file

    tensors = {"a": torch.arange(3, dtype=torch.bfloat16), "b": torch.randn(2, 5), "c": torch.tensor(2.0, dtype=torch.float16)}
    kinds = {name: safetensors_files.Kind(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    safetensors_files.write_file(tmp_path / "ours", kinds, tensors.__getitem__)
    read = load_file(tmp_path / "ours")
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name]) for name in tensors)
    save_file(tensors, tmp_path / "theirs")
    stored = safetensors_files.read_header(tmp_path / "theirs")
    assert all(torch.equal(stored[name].read(), tensors[name]) for name in tensors)
