"""The command line as a user types it: commands, their output, errors, Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pared import terminal
from pared.cli import main
from pared.converters.methods import lte
from pared.tests import tiny

COMMANDS = ("doctor", "convert", "export", "inspect", "generate", "chat", "embed", "eval", "bench")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def pared(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process; returns exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pared", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        printed = capsys.readouterr()
        return int(left.value.code or 0), printed.out, printed.err

    return run


def test_help_names_every_command_and_loads_no_torch() -> None:
    code = "import sys\nfrom pared.cli import app\ntry:\n app(['--help'])\nfinally:\n assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(f"  {command} " in done.stdout for command in COMMANDS)


def test_threads_are_set_before_torch() -> None:
    code = """
import os, sys
sys.argv = ["pared", "--version"]
from pared.cli import main
try: main()
except SystemExit: pass
assert "torch" not in sys.modules
assert int(os.environ["GOMP_SPINCOUNT"]) < 10000 and int(os.environ["OMP_NUM_THREADS"]) >= 1
"""
    clean = {k: v for k, v in os.environ.items() if "OMP_" not in k}
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("pared ")


@pytest.mark.parametrize("arguments", [["--nope"], ["inspect", "x", "--nope"], ["nope"], ["generate", "x"]])
def test_a_wrong_command_line_is_refused(pared: Run, arguments: list[str]) -> None:
    status, _, err = pared(*arguments)
    assert status == 2
    assert "Error" in err


def unframed(err: str) -> str:
    """What a framed error says, without its spaces: lines break wherever the paths in them make them."""
    return re.sub(r"[\s│]", "", err)


def test_our_errors_are_one_block(pared: Run, tmp_path: Path) -> None:
    status, out, err = pared("inspect", tmp_path / "nowhere")
    assert status == 1
    assert out == ""
    assert "FolderError" in err and "nowhere" in unframed(err)
    assert "Traceback" not in err


def test_a_place_for_answers_takes_workers(pared: Run, tmp_path: Path) -> None:
    status, _, err = pared("generate", tmp_path, "a prompt", "--out", tmp_path / "answers")
    assert status == 1 and "give--ray" in unframed(err)


def test_debug_shows_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from pared.errors import FolderError

    monkeypatch.setattr(sys, "argv", ["pared", "--debug", "inspect", str(tmp_path / "nowhere")])
    with pytest.raises(FolderError):
        main()


def test_doctor(pared: Run) -> None:
    status, out, _ = pared("doctor", "--json")
    assert status == 0
    told = json.loads(out)
    wanted = {"pared", "python", "torch", "triton", "transformers", "cpu", "native library", "hf kernels", "gpu"}
    assert wanted <= told["environment"].keys()
    assert {row["op"].split()[0] for row in told["paths"]} == {"linear", "attention", "fused"}
    assert all(row["path"] in ("triton", "native", "torch") and row["why"] for row in told["paths"])
    assert pared("doctor")[1].count("bfloat16") == len(told["paths"]) // 3


def test_convert_refuses_then_overwrites(pared: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    assert pared("convert", tiny_checkpoint, target)[0] == 0
    status, _, err = pared("convert", tiny_checkpoint, target)
    assert status == 1
    assert "FolderExists" in err and "--overwrite" in err
    assert pared("convert", tiny_checkpoint, target, "--overwrite", "--dtype", "bfloat16")[0] == 0
    told = json.loads(pared("inspect", target, "--json")[1])
    assert told["total"]["compact_bytes"] == told["total"]["dense_bytes"]


def test_inspect(pared: Run, tiny_folder: Path) -> None:
    status, out, _ = pared("inspect", tiny_folder, "--json", "--verify")
    assert status == 0
    told = json.loads(out)
    kinds = {kind["kind"]: kind for kind in told["kinds"]}
    assert kinds["mlp.up_proj"]["shapes"] == {"48x32": 2}
    assert kinds["mlp.up_proj"]["format"] == "dense"
    assert kinds["mlp.up_proj"]["compact_bytes"] == kinds["mlp.up_proj"]["dense_bytes"] == 2 * 48 * 32 * 4
    weights = sum(kind["compact_bytes"] for kind in told["kinds"])
    assert told["total"]["compact_bytes"] == weights < told["disk_bytes"]
    assert told["stock"] is True
    table = pared("inspect", tiny_folder)[1]
    assert "mlp.up_proj" in table and "48x32" in table and "every engine loads it" in table


def test_inspect_verify_finds_damage(pared: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    pared("convert", tiny_checkpoint, target)
    shard = target / "model.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert pared("inspect", target)[0] == 0
    status, _, err = pared("inspect", target, "--verify")
    assert status == 1
    assert "sha256" in err


def test_export(pared: Run, tiny_folder: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    assert pared("export", tiny_folder, tmp_path / "again")[0] == 0
    before, after = (load_file(home / "model.safetensors") for home in (tiny_checkpoint, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    status, _, err = pared("export", tiny_folder, tmp_path / "again")
    assert status == 1
    assert "choose another name" in err.replace("\n", "")
    assert "pared" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_generate(pared: Run, tiny_folder: Path) -> None:
    from pared import LLM, SamplingParams

    expected = LLM(tiny_folder).generate("hello", SamplingParams(max_tokens=9))[0].text
    streamed = pared("generate", tiny_folder, "hello", "--max-tokens", 9)
    assert streamed[:2] == (0, expected + "\n")
    assert pared("generate", tiny_folder, "hello", "--max-tokens", 9, "--no-stream")[1] == expected + "\n"
    sampled = ("generate", tiny_folder, "hello", "--max-tokens", 9, "--temperature", 1.5, "--seed", 7)
    assert pared(*sampled)[1] == pared(*sampled)[1]
    as_chat = pared("generate", tiny_folder, "hello", "--chat", "--max-tokens", 9)
    assert as_chat[0] == 0 and as_chat[1] != streamed[1]


def test_generate_refuses_bad_values(pared: Run, tiny_folder: Path) -> None:
    status, _, err = pared("generate", tiny_folder, "hello", "--top-p", 1.5)
    assert status == 1
    assert "top_p" in err and "1.5" in err


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there(pared: Run, tiny_folder: Path, device: str) -> None:
    status, _, err = pared("generate", tiny_folder, "hello", "--device", device)
    assert status == 1
    assert "BadParameter" in err
    assert device in err


def test_eval(pared: Run, tiny_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("plain words, one after the other. " * 20, encoding="utf-8")
    status, out, err = pared("eval", tiny_folder, "--text", text, "--window", 64, "--json")
    assert status == 0, err
    (row,) = json.loads(out)
    assert row["perplexity"] > 1
    status, out, err = pared("eval", tiny_folder, tiny_folder, "--text", text, "--window", 64)
    assert status == 0, err
    head, _, *lines = out.splitlines()
    assert head.split() == ["model", "disk", "memory", "bytes", "per", "token", "tokens/s", "perplexity"]
    assert [line.split()[-1] for line in lines] == [f"{row['perplexity']:.3f}"] * 2
    assert "--tasks" in pared("eval", tiny_folder)[2]
    assert "cannotberead" in unframed(pared("eval", tiny_folder, "--text", tmp_path / "none")[2])


def test_bench(pared: Run, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    few = ("--prompt-tokens", 24, "--new-tokens", 6, "--rounds", 2, "--out", out)
    status, table, err = pared("bench", tiny_folder, *few)
    assert status == 0, err
    assert "prefill" in table and "decode" in table
    told = json.loads(out.read_text())
    assert told["agreement"]["equal_tokens"] == 6
    assert told["bytes_per_token"] > 0 and len(told["decode_tokens_per_second"]["ratio"]) == 3


def chatting(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pared.cli", "chat", str(folder), "--max-tokens", "5"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=folder)


def test_chat_answers_and_ends_at_end_of_file(tiny_folder: Path) -> None:
    with chatting(tiny_folder) as talk:
        out, err = talk.communicate("hello\n\n/new\nhello again\n", timeout=300)
    assert talk.returncode == 0, err
    assert out.count("> ") >= 5
    assert "Traceback" not in err


def test_ctrl_c_at_the_prompt_ends_a_chat(tiny_folder: Path) -> None:
    with chatting(tiny_folder) as talk:
        assert talk.stdout is not None
        assert talk.stdout.readline().startswith("Ctrl-C")
        while talk.stdout.read(1) != ">":
            pass
        talk.send_signal(signal.SIGINT)
        _, err = talk.communicate(timeout=300)
    assert talk.returncode == 0, err
    assert "Traceback" not in err


def test_ctrl_c_stops_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    def pieces() -> Iterator[str]:
        yield "half an "
        raise KeyboardInterrupt

    assert terminal.say(pieces()) == "half an "
    assert capsys.readouterr().out == "half an  [stopped]\n"


# --- routed FFNs ---------------------------------------------------------------------------------


def _routes(tmp_path: Path, recipe: str = "size=8") -> list[object]:
    """The command line that trains the routers of a tiny model."""
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i * i % 40}" for i in range(2000)))
    source = tmp_path / "src"
    if not source.exists():
        tiny.checkpoint(source)
    given = f"lte:{recipe},tokens=256,length=16,batch=2"
    return ["convert", source, tmp_path / "out", "--calibration", text, "--method", given]


def _unboxed(text: str) -> str:
    """Without what the red block puts between words."""
    return re.sub(r"[\s│]", "", text)


def test_inspect_says_how_much_of_a_routed_model_a_token_reads(pared: Run, tmp_path: Path) -> None:
    assert pared(*_routes(tmp_path, "size=8,lr=1e-3,layers=1"))[0] == 0
    told = json.loads(pared("inspect", tmp_path / "out", "--json")[1])
    (method,), sleep = told["provenance"]["methods"], told["sleep"]
    (share,) = method["result"]["layers"].values()
    assert (sleep["text"], sleep["layers"]) == ("text.txt", {"1": share})
    assert sleep["saved_bytes"] == round(share * 3 * 24 * 16 * 4)
    table = " ".join(pared("inspect", tmp_path / "out")[1].split())
    assert "3 groups of 8, router 4.0 % of bytes" in table
    assert f"on text.txt a token left out {100 * share:.1f} % of the groups" in table
    assert f"by layer, in percent: 1: {100 * share:.0f}" in table


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("size=16", "groups of 16 do not divide the 24 neurons of layer 0; choose another size= or other layers="),
        ("size=12", "size=12 is not one of 8, 16, 32 neurons of a group"),
        ("size=8,tau=1", "tau=1.0 is not between 0 and 1, where scores lie; the paper's is 0.5"),
        ("size=8,tau=-0.5", "tau=-0.5 is not between 0 and 1"),
        ("size=8,tau=nan", "tau=nan is not between 0 and 1"),
        ("size=8,layers=5", "names layers that are not there; the model has 0 to 1"),
    ],
)
def test_what_no_routed_ffn_can_be_is_said(pared: Run, tmp_path: Path, given: str, message: str) -> None:
    status, _, err = pared(*_routes(tmp_path, given))
    assert status == 1
    assert _unboxed(message) in _unboxed(err)
    assert "Traceback" not in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("router", "tau", "message"),
    [
        ((5, 16), 0.5, "mlp.router.weight in {src} is [5, 16]; for 24 neurons in groups of 8, 16, 32 it must be"),
        ((3, 15), 0.5, "mlp.router.weight in {src} is [3, 15]; for 24 neurons"),
        ((), 0.5, "mlp.router.weight in {src} is []; for 24 neurons"),
        ((3, 16), 1.5, "lte in config.json gives tau 1.5, which must lie between 0 and 1"),
        ((3, 16), "half", "lte in config.json gives tau 'half', which must lie between 0 and 1"),
    ],
)
def test_a_router_that_does_not_fit_its_model_is_said(
    pared: Run, tmp_path: Path, router: tuple[int, ...], tau: object, message: str
) -> None:
    source = tiny.checkpoint(tmp_path / "src")
    state, config = load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())
    state["model.layers.1.mlp.router.weight"] = torch.ones(router)
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    (source / "config.json").write_text(json.dumps(config | {"lte": {"tau": tau}}))
    status, _, err = pared("convert", source, tmp_path / "out")
    assert status == 1
    assert _unboxed(message.format(src=source)) in _unboxed(err)
    assert not (tmp_path / "out").exists()


def test_a_training_that_breaks_keeps_what_was_good(
    pared: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, calls = lte.next_token_loss, list[int]()

    def breaking(*given: object) -> torch.Tensor:
        calls.append(1)
        return loss(*given) * (float("nan") if len(calls) == 5 else 1.0)

    monkeypatch.setattr(lte, "next_token_loss", breaking)
    with pytest.warns(UserWarning, match=r"stage 1: the loss of step 4 was nan.*going on with the last good weights"):
        assert pared(*_routes(tmp_path))[0] == 0
    (method,) = json.loads(pared("inspect", tmp_path / "out", "--json")[1])["provenance"]["methods"]
    stages = method["result"]["stages"]
    assert [stage["steps"] for stage in stages] == [4, 8]
    assert "the loss of step 4 was nan" in stages[0]["stopped"] and stages[1]["stopped"] is None
    status, out, _ = pared("generate", tmp_path / "out", "w1 w2", "--max-tokens", "3")
    assert status == 0 and out
