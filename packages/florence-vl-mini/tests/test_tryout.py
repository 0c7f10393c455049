"""The twenty pictures of `mini try`: same drawings on every machine, scoring of answers, result table."""

from __future__ import annotations

import sys

import pytest

from florence_vl.cli.main import main
from florence_vl.model.tiny import tiny_model
from florence_vl.serve.session import ChatSession, GenerationOptions
from florence_vl_mini import tryout


def test_twenty_pictures_each_with_something_on_it() -> None:
    assert len(tryout.TRIALS) == len({trial.name for trial in tryout.TRIALS}) == 20
    for trial in tryout.TRIALS:
        image = trial.draw()
        assert image.mode == "RGB"
        assert min(image.size) >= 200
        assert len(image.getcolors(1 << 24)) > 1, trial.name
        assert image.tobytes() == trial.draw().tobytes()


def test_right_answers_count_and_others_do_not() -> None:
    for trial in tryout.TRIALS:
        for answer in trial.answers:
            assert trial.right(answer)
            assert trial.right(f"{answer}.")
        assert not trial.right("")
        assert not trial.right("zebra crossing")
    dots = next(trial for trial in tryout.TRIALS if trial.name == "five dots")
    assert dots.right("Five")
    assert not dots.right("15")


def test_every_picture_is_asked_about_alone() -> None:
    model, processor = tiny_model(seed=1)
    session = ChatSession(model, processor, GenerationOptions(max_new_tokens=4))
    outcomes = tryout.run(session, tryout.TRIALS[:3])
    assert len(session.images) == 1
    assert [o.trial for o in outcomes] == list(tryout.TRIALS[:3])
    assert tryout.table(outcomes).endswith(f"{sum(o.right for o in outcomes)} of 3 right")


def test_a_bar_in_an_answer_does_not_break_the_table() -> None:
    outcome = tryout.Outcome(tryout.TRIALS[0], "a | b\nc" + "x" * 99, False)
    row = tryout.table([outcome]).splitlines()[2]
    assert "a \\| b c" in row
    assert len(row) < 140


def test_a_folder_with_other_files_is_refused_before_the_model_is_loaded(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(
        sys, "argv", ["florence-vl", "mini", "try", "--model", "nowhere/else/x", "--out", str(tmp_path)]
    )
    with pytest.raises(SystemExit) as end:
        sys.exit(main())
    assert end.value.code == 2
    assert "florence-vl did not write" in capsys.readouterr().err
