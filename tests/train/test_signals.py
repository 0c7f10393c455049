"""A signal to the whole process group saves and exits, with loader workers, for one process and for two."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image

from florence_vl.model.tiny import tiny_model, tiny_recipe
from florence_vl.train.checkpoint import latest_checkpoint


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_to_the_group_saves_and_leaves(tmp_path: Path, processes: int) -> None:
    model, processor = tiny_model()
    model.save_pretrained(tmp_path / "tiny")
    processor.save_pretrained(tmp_path / "tiny")
    Image.new("RGB", (40, 30), (30, 99, 10)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    rows = [{"id": str(n), "image": "a.png", "conversations": turns} for n in range(16)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    sources = [{"path": str(tmp_path / "data.json"), "image_root": str(tmp_path)}]
    run = tmp_path / "run"
    recipe = tiny_recipe(
        run,
        steps=1_000_000,
        batch_size=4,
        micro_batch_size=2,
        model={"path": str(tmp_path / "tiny")},
        data={"sources": sources, "max_length": 160, "workers": 2},
        checkpoint={"every_steps": None, "export": False},
    )
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    launcher = ["-m", "florence_vl"]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *launcher]
    process = subprocess.Popen(
        [sys.executable, *launcher, "train", str(tmp_path / "recipe.yaml")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    metrics = run / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 240
        while not (metrics.is_file() and metrics.stat().st_size) and process.poll() is None:
            assert time.monotonic() < deadline, "no step was done"
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == (75 if processes == 1 else 1), output  # torchrun has no other code
    assert "signal SIGTERM" in (run / "STOPPED").read_text()
    done = len(metrics.read_text().splitlines())
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    assert checkpoint.name == f"step-{done:08d}"
