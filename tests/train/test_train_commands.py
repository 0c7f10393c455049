"""The commands train, recipes, plan and export: exit codes, one-line errors, output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from florence_vl.cli.main import main


def test_recipes_are_listed_and_shown_with_origins(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "list", "paper/"]) == 0
    listed = [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()]
    assert {"paper/8b-pretrain", "paper/8b-finetune", "paper/3b-pretrain", "paper/3b-finetune"} <= set(listed)
    assert main(["recipes", "show", "paper/8b-pretrain", "optimizer.lr=3e-5"]) == 0
    shown = capsys.readouterr().out
    assert any(line.startswith("optimizer.lr: 3e-05") and "# command line" in line for line in shown.splitlines())
    assert any(line.startswith("batch_size: 256") and "# paper/8b-pretrain.yaml" in line for line in shown.splitlines())
    assert any(line.startswith("precision:") and "# _base/gpu.yaml" in line for line in shown.splitlines())


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["recipes", "show", "paper/8b-pretrian"], "paper/8b-pretrain"),
        (["recipes", "list", "nothing-like-it"], "no recipe's name contains"),
        (["train", "mini/pretrain", "stepz=3"], "unknown key `stepz`. Did you mean 'steps'"),
        (["train", "mini/pretrain", "--steps"], "--steps"),
        (["train", "mini/pretrain", "resume"], "not of the form key.path=value"),
        (["train", "mini/finetune", "model.path=./no/such/model"], "no such file or folder"),
        (["plan", "mini/pretrain", "--device", "h10"], "unknown device 'h10'"),
        (["export", "no/such/run"], "no such run"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = Path(__file__).parents[2]
    monkeypatch.setenv("FLORENCE_VL_RECIPES", str(repository / "recipes"))
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert expected in error[-1]
    assert "Traceback" not in "".join(error)
    assert not (tmp_path / "runs").exists()


def test_a_run_is_exported_in_another_type(
    tiny_run: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from florence_vl import FlorenceVLForConditionalGeneration

    model = tiny_run.tiny()
    tiny_run.run(tmp_path / "run", model=model, steps=2)
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "run"), "--out", str(out), "--dtype", "bf16"]) == 0
    assert "step 2" in capsys.readouterr().out
    loaded = FlorenceVLForConditionalGeneration.from_pretrained(out, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.to(torch.bfloat16))
    assert main(["export", str(tmp_path / "run"), "--out", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "x"), "--dtype", "bf61"]) == 2
    assert "Did you mean 'bf16'" in capsys.readouterr().err


def test_plan_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    small = "model.build={vision: openai/clip-vit-large-patch14-336, llm: microsoft/Phi-3.5-mini-instruct}"
    assert main(["plan", "llava15/vicuna-7b-finetune", "model.path=null", small, "--devices", "8", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["image_tokens"] == 576  # CLIP ViT-L/14 at 336 px: 24 x 24 patches
    assert plan["samples"] == 665_298
    assert plan["devices"] == 8


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_names_its_package(
    tiny_run: ModuleType, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=f"pip install {name}"):
        tiny_run.run(tmp_path, logging={"progress": "none", "trackers": [name]})


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_hear_of_every_metric(
    tiny_run: ModuleType, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys
    from types import SimpleNamespace

    heard: list[tuple[str, object]] = []
    fake = SimpleNamespace(
        init=lambda **options: heard.append(("init", options)),
        log=lambda row, step: heard.append(("log", (step, row))),
        finish=lambda: heard.append(("finish", None)),
    )
    monkeypatch.setitem(sys.modules, name, fake)
    logging = {"progress": "none", "trackers": [name], "every_steps": 2, "project": "p"}
    tiny_run.run(tmp_path, steps=4, logging=logging, checkpoint={"every_steps": None, "export": False})
    assert [what for what, _ in heard] == ["init", "log", "log", "finish"]
    assert heard[0][1]["project"] == "p"  # type: ignore[index]
    step, row = heard[2][1]  # type: ignore[misc]
    assert step == 4
    assert {"loss", "grad_norm", "tokens_per_s", "lr/llm"} <= row.keys()


def test_idle_threads_do_not_spin_for_long_unless_the_user_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that both are put back
        monkeypatch.delenv(name)
    main(["--version"])
    assert os.environ["GOMP_SPINCOUNT"] == "10000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    main(["--version"])
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    main(["--version"])
    assert "GOMP_SPINCOUNT" not in os.environ


def test_openmp_takes_the_spin_count_that_the_command_sets() -> None:
    code = "import florence_vl.cli.main as cli; cli.main(['--version']); import torch; torch.ones(1)"
    kept = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    said = subprocess.run(
        [sys.executable, "-c", code],
        env=kept | {"OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stderr
    if "GOMP_SPINCOUNT" not in said:
        pytest.skip("this torch has another OpenMP than GNU's")
    assert "GOMP_SPINCOUNT = '10000'" in said
