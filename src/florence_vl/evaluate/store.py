"""A results folder: answers as append-only lines, and a description of the run that prevents mixing runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from florence_vl.files import write_text

VERSION = 1


class ResultsFolder:
    """Answers of one model under fixed protocols.

    `answers*.jsonl` have one line per answered question, written immediately; `run.json` describes the model and the
    protocols. A line truncated by a kill is dropped when its writer opens the folder again.

    Args:
        path: The folder, created if it does not exist.
        rank: Rank of the writing process; each has a separate file.
    """

    def __init__(self, path: Path, rank: int = 0) -> None:
        self.path = path
        self.file = path / ("answers.jsonl" if rank == 0 else f"answers-{rank}.jsonl")

    @property
    def description(self) -> dict[str, Any]:
        """Content of `run.json`; empty if it does not exist.

        Raises:
            ValueError: The file was not written by this package.
        """
        file = self.path / "run.json"
        if not file.is_file():
            return {}
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is damaged: {error}. Give another folder with --out") from None
        if not isinstance(found, dict) or found.get("version") != VERSION:
            raise ValueError(f"{file} was not written by this version of florence-vl; give another folder with --out")
        return found

    def open(self, identity: Mapping[str, Any], benchmarks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Start or resume a run.

        Args:
            identity: Identity of the model (see `Answerer.identity`).
            benchmarks: Description of each benchmark by name; `fingerprint` identifies its protocol.

        Returns:
            The description, with this run's benchmarks added.

        Raises:
            ValueError: The folder has answers of another model, or of a benchmark under another protocol, about other
                pictures or from a sample that is not part of this one, or other files.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        found = self.description
        if not found and any(self.path.iterdir()):
            raise ValueError(f"{self.path} has files but no results (no run.json); give an empty folder with --out")
        old, new = found.get("identity", {}), dict(identity)
        # A folder may be moved: with a fingerprint of the weights, the model's name is ignored.
        unimportant = {"model"} if "fingerprint" in old and "fingerprint" in new else set()
        odd = [key for key in sorted({*old, *new} - unimportant) if old.get(key) != new.get(key)]
        if found and odd:
            differences = "; ".join(f"{key} is {old.get(key)!r} there, {new.get(key)!r} now" for key in odd)
            raise ValueError(f"{self.path} has answers of another model: {differences}. Give another folder with --out")
        known = found.get("benchmarks", {})
        for name, facts in benchmarks.items():
            if name in known and known[name]["fingerprint"] != facts["fingerprint"]:
                raise ValueError(
                    f"{self.path} has answers to {name!r} under another protocol ({known[name].get('protocol')}, "
                    f"{known[name]['fingerprint']}; now {facts.get('protocol')}, {facts['fingerprint']}). Give another "
                    "folder with --out"
                )
            if name in known and known[name].get("pictures", facts.get("pictures")) != facts.get("pictures"):
                raise ValueError(
                    f"{self.path} has answers to {name!r} about other pictures (of another --data folder). Give "
                    "another folder with --out"
                )
            if name in known and not _extends(known[name], facts):
                raise ValueError(
                    f"{self.path} has answers to {name!r} for {_sample(known[name])}, which would be mixed with those "
                    f"for {_sample(facts)}. Give another folder with --out"
                )
        drop_truncated_line(self.file)
        merged = {**found, "version": VERSION, "identity": dict(identity), "benchmarks": {**known, **benchmarks}}
        self.write_description(merged)
        return merged

    def write_description(self, description: Mapping[str, Any]) -> None:
        """Write `run.json`, atomically."""
        write_text(self.path / "run.json", json.dumps(description, indent=2, ensure_ascii=False) + "\n")

    def answers(self) -> dict[tuple[str, str], dict[str, Any]]:
        """All answers by benchmark and question id."""
        found = {}
        for file in sorted(self.path.glob("answers*.jsonl")):
            for row in read_lines(file):
                found[row["benchmark"], row["id"]] = row
        return found

    def count_answers(self) -> int:
        """Number of answers, without reading them."""
        return sum(file.read_bytes().count(b"\n") for file in self.path.glob("answers*.jsonl"))

    def write_unanswered(self, failed: Mapping[str, Mapping[str, str]]) -> None:
        """Store the questions that this process could not get answered, with the reasons; none removes the file."""
        file = self.path / self.file.name.replace("answers", "unanswered").replace(".jsonl", ".json")
        if failed:
            write_text(file, json.dumps(failed, indent=2, ensure_ascii=False) + "\n")
        else:
            file.unlink(missing_ok=True)

    def unanswered(self) -> dict[str, dict[str, str]]:
        """What processes of this run or of earlier ones failed to get answered, if it still has no answer.

        Returns:
            Ids and reasons by benchmark.
        """
        files = sorted(self.path.glob("unanswered*.json"))
        known = self.answers() if files else {}
        found: dict[str, dict[str, str]] = {}
        for file in files:
            for name, failures in json.loads(file.read_text(encoding="utf-8")).items():
                left = {key: reason for key, reason in failures.items() if (name, key) not in known}
                found.update({name: found.get(name, {}) | left} if left else {})
        return found

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add answers."""
        append_lines(self.file, rows)


def _extends(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether the sample of one description of a benchmark is part of another's (see `benchmark.select`)."""
    same_seed = old.get("seed") == new.get("seed")
    if new.get("limit") is None:
        return same_seed or not new.get("generation", {}).get("temperature")  # the seed also samples answers
    return same_seed and old.get("limit") is not None and old["limit"] <= new["limit"]


def _sample(facts: Mapping[str, Any]) -> str:
    limit = facts.get("limit")
    return f"{'all questions' if limit is None else f'a sample of {limit}'} (seed {facts.get('seed')})"


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file; a truncated last line, which may still be being written, is left out.

    Raises:
        ValueError: A line other than the last is not a JSON object.
    """
    if not file.is_file():
        return []
    data = file.read_bytes()
    rows = []
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{file}, line {number} is damaged: {error}") from None
    return rows


def drop_truncated_line(file: Path) -> None:
    """Remove the last line of a JSONL file if a kill truncated it. Only for the file's only writer."""
    if file.is_file():
        data = file.read_bytes()
        if not data.endswith(b"\n"):
            with file.open("r+b") as out:
                out.truncate(data.rfind(b"\n") + 1)


def append_lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add lines to a JSONL file in one write."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with file.open("ab") as out:
        out.write(text.encode("utf-8", "surrogatepass"))
        out.flush()
