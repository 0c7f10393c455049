"""Headroom and cost: likelihoods equal the model's, and choices are made on other data than they are scored on."""

from __future__ import annotations

import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from florence_vl.analyze.bill import bill, time_options
from florence_vl.analyze.gates import compare_gates
from florence_vl.analyze.headroom import choose_by_halves, headroom
from florence_vl.analyze.options import Measurement, Option, answer_of, cluster_mean, make_options, measure
from florence_vl.analyze.routed import routed_choices, view_options
from florence_vl.evaluate.question import IMAGE, BytesPicture, Question
from florence_vl.model.pictures import open_image
from florence_vl.model.resolution import set_resolution
from florence_vl.model.router import Router, RouterConfig, Routing, router_states, save_routers
from florence_vl.model.tiny import tiny_model, tiny_processor


def question(number: int, picture: int, prompt: str, answer: str, **reference) -> Question:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (40 * picture, 100, 255 - 40 * picture)).save(file, "PNG")
    return Question(
        str(number), "tiny", (IMAGE, prompt), (BytesPicture(file.getvalue()),), {"answer": answer, **reference}
    )


@pytest.fixture(scope="module")
def asked():
    return [
        question(i, i % 4, "what is it?" if i % 2 else "what color?", "a car" if i % 2 else "blue", skill=f"s{i % 2}")
        for i in range(8)
    ]


@pytest.fixture(scope="module")
def loaded():
    torch.manual_seed(0)
    model, _ = tiny_model()
    return model.eval(), tiny_processor(model.config)


def test_options_are_subsets_by_size():
    options = make_options(["davit", "ocr"], [64, 128])
    assert [o.name for o in options] == [
        "128 px, all", "128 px, davit", "128 px, ocr", "64 px, all", "64 px, davit", "64 px, ocr",
    ]  # fmt: skip
    assert len(make_options(list("abcd"), [1])) == 15
    assert len(make_options(list("abcd"), [1], "leave-one-out")) == 9
    with pytest.raises(ValueError, match="each once"):
        make_options(["a"], [64, 64])
    with pytest.raises(ValueError, match="leave-one-out"):
        make_options(["a"], [64], "some")


def test_the_full_option_is_the_models_own_likelihood(loaded, asked):
    model, processor = loaded
    options = make_options(model.config.features, [64], "leave-one-out")
    measured = measure(model, processor, asked, options)
    ordered = sorted(asked, key=lambda q: q.picture_key)
    for row in (0, 5):
        one = ordered[row]
        messages = [
            {"role": "user", "content": one.content()},
            {"role": "assistant", "content": [{"type": "text", "text": answer_of(one)}]},
        ]
        from florence_vl.data.encode import RecordEncoder
        from florence_vl.data.records import Record

        sample = RecordEncoder(processor)(Record("r", "s", messages, [one.images[0].read()]))
        with torch.no_grad():
            loss = model(
                input_ids=sample.input_ids[None], labels=sample.labels[None], pixel_values=sample.pixel_values
            ).loss
        assert measured.nll_QO[row, 0] == pytest.approx(float(loss) * sample.num_supervised, rel=1e-4)
    assert not np.allclose(measured.nll_QO[:, 0], measured.nll_QO[:, 1]), "leaving a feature out changes something"
    assert measured.groups == [q.reference["skill"] for q in ordered]
    assert (measured.flops_O[1:] <= measured.flops_O[0]).all()
    assert measured.flops_O[options.index(Option(64, ("davit",)))] == measured.flops_O.min()


def test_questions_that_cannot_be_scored_are_counted(loaded, asked):
    model, processor = loaded
    two = Question("x", "tiny", (IMAGE, IMAGE, "same?"), asked[0].images * 2, {"answer": "no"})
    mute = Question("y", "tiny", (IMAGE, "what?"), asked[0].images, {"answers": []})
    options = make_options(model.config.features, [64], "none")
    measured = measure(model, processor, [asked[0], two, mute], options)
    assert measured.skipped == {"not exactly one picture": 1, "no right answer in text": 1}
    assert len(measured.groups) == 1
    with pytest.raises(ValueError, match="no question has one picture"):
        measure(model, processor, [two], options)


def made(nll_QO: np.ndarray, groups: list[str], pictures: list[str]) -> Measurement:
    options = [Option(64, (str(i),)) for i in range(nll_QO.shape[1])]
    flops_O = np.arange(nll_QO.shape[1], 0, -1) * 1e9
    return Measurement(options, nll_QO, nll_QO < 1, groups, pictures, flops_O, np.full(nll_QO.shape[1], 10.0))


def test_noise_gives_the_oracle_nothing_and_a_real_difference_is_found():
    rng = np.random.default_rng(0)
    groups = [f"g{i % 2}" for i in range(400)]
    pictures = [str(i // 2) for i in range(400)]
    noise = headroom(made(1 + 0.3 * rng.standard_normal((400, 6)), groups, pictures))
    oracle, bound = noise.choices[1], noise.choices[-1]
    assert oracle.gain_nll.low < 0 < oracle.gain_nll.high, "chosen by noise, scored elsewhere: nothing is won"
    assert bound.gain_nll.low > 0.2, "chosen by its own answer, noise looks like a gain"

    nll = 1 + 0.3 * rng.standard_normal((400, 6))
    nll[0::2, 2] -= 0.5  # group 0 is better off with option 2, group 1 with option 3
    nll[1::2, 3] -= 0.5
    found = headroom(made(nll, groups, pictures))
    assert found.choices[1].gain_nll.mean == pytest.approx(0.5, abs=0.06)
    assert found.choices[0].gain_nll.mean == pytest.approx(0.25, abs=0.06)  # the best fixed one has half of it
    assert [found.by_group[g][1] for g in ("g0", "g1")] == ["64 px, 2", "64 px, 3"]


def test_a_choice_never_sees_the_picture_it_is_scored_on():
    nll = np.ones((6, 2))
    pictures = ["0", "0", "1", "1", "2", "2"]
    nll[:2, 1] = -100  # only picture 0 likes option 1
    share = choose_by_halves(made(nll, ["g"] * 6, pictures), None, splits=50)
    assert share[:2, 1].max() == 0
    np.testing.assert_allclose(share.sum(1), 1)


def test_the_interval_is_over_pictures():
    rng = np.random.default_rng(0)
    per_picture = rng.standard_normal(30)
    alone = cluster_mean(per_picture, [str(i) for i in range(30)])
    repeated = cluster_mean(np.repeat(per_picture, 10), [str(i) for i in range(30) for _ in range(10)])
    assert repeated.mean == pytest.approx(alone.mean)
    assert repeated.half == pytest.approx(alone.half), "asking ten times says nothing new about the pictures"


def test_latencies_and_the_front(loaded, asked):
    model, processor = loaded
    options = make_options(model.config.features, [64], "leave-one-out")
    measured = measure(model, processor, asked, options)
    latencies = time_options(model, processor, options, measured.tokens_O, rounds=1)
    rows = bill(measured, latencies)
    assert len(rows) == len(options)
    assert all(row.latency > 0 for row in rows)
    assert [row.choice.flops for row in rows] == sorted(row.choice.flops for row in rows)
    assert any(row.on_front for row in rows)
    for row in rows:
        mine = (row.choice.accuracy.mean, -row.choice.flops)
        others = ((o.choice.accuracy.mean, -o.choice.flops) for o in rows)
        assert row.on_front == (not any(o != mine and o[0] >= mine[0] and o[1] >= mine[1] for o in others))


def test_the_answer_is_what_the_model_should_say():
    def question(benchmark, **reference):
        return answer_of(Question("1", benchmark, (), (), reference))

    assert question("hallusion_bench_image", answer="0") == "No"
    choices = {"question_type": "multi_choice", "choices": ["a cat", "a dog"]}
    assert question("mathvista_testmini", answer="a dog", **choices) == "B"
    assert question("mathvista_testmini", answer="12", question_type="free_form", choices=None) == "12"
    assert question("vqav2_val", answers=["red", "blue", "red"]) == "red"
    assert question("of a user", answer="x") == "x"
    assert question("of a user") is None


def test_of_options_of_equal_cost_only_the_most_accurate_is_on_the_front(loaded, asked):
    model, processor = loaded
    measured = measure(model, processor, asked, make_options(model.config.features, [64], "leave-one-out"))
    flops_O, right_QO = np.full_like(measured.flops_O, 1e9), np.zeros_like(measured.right_QO)
    right_QO[:2, 0] = right_QO[0, 1] = True
    same = dataclasses.replace(measured, flops_O=flops_O, right_QO=right_QO)
    rows = bill(same, [0.1] * len(measured.options))
    assert [row.choice.name for row in rows if row.on_front] == [measured.options[0].name]


def test_commands_write_tables_figures_and_a_report(tmp_path, monkeypatch, capsys, asked, loaded):
    from florence_vl.cli import analyze as command
    from florence_vl.cli.main import main

    model, processor = loaded
    options = make_options(model.config.features, [64], "leave-one-out")
    measured = measure(model, processor, asked, options)
    monkeypatch.setattr(command, "_measured", lambda *_: (model, processor, measured))
    assert main(["analyze", "headroom", "--model", "x", "--out", str(tmp_path / "h")]) == 0
    assert main(["analyze", "bill", "--model", "x", "--rounds", "1", "--out", str(tmp_path / "b")]) == 0
    printed = capsys.readouterr().out
    assert "Fixed options, 8 questions on 4 pictures" in printed
    assert "Cost of accuracy" in printed
    record = json.loads((tmp_path / "h/headroom.json").read_text())
    assert record["cheapest_equal"] in {option.name for option in options}
    for file in ("h/headroom.png", "b/bill.png", "b/bill.svg"):
        assert (tmp_path / file).stat().st_size > 500
    assert main(["analyze", "report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "Headroom: the gain of choosing features per question" in page
    assert "Cost: accuracy against FLOPs and latency" in page
    assert page.count("data:image/png") == 2
    for file in ("b/bill.json", "b/bill.png"):
        (tmp_path / file).rename(tmp_path / file.replace("bill", "views"))
    (tmp_path / "h/headroom.png").unlink()
    assert main(["analyze", "report", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").read_text().count("data:image/png") == 1, "figures have their result's name"
    monkeypatch.undo()
    nowhere = ["--model", str(tmp_path / "nowhere"), "--out", str(tmp_path / "n")]
    assert main(["analyze", "headroom", *nowhere]) == 2
    assert not (tmp_path / "n").exists()


# ---------------------------------------------------------------- views and their router

VIEWS = {"glance": {"size": 32, "features": ["davit"]}, "read": {"size": 96, "features": ["davit", "ocr"]}}


@pytest.fixture(scope="module")
def viewed(asked, tmp_path_factory):
    """A saved model with views and a router, and what was measured of its views."""
    folder = tmp_path_factory.mktemp("viewed")
    model, processor = tiny_model(views=VIEWS, positions="resampled", position_grid=(2, 2))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    costs = {"full": 1.0, "glance": 0.2, "read": 0.9}
    torch.manual_seed(3)
    dims = model.config.text_config.hidden_size, model.model.vision_tower.feature_dims["davit"]
    router = Router(RouterConfig(*dims, costs, "glance"))
    pictures = [open_image(question.images[0].read()) for question in asked]
    with torch.no_grad():
        router.layers[2].weight.mul_(20)
        seen = router_states(model, processor, pictures, [question.text for question in asked], "glance")
        router.layers[2].bias.sub_(router(*seen).mean(0))  # so that no view is best for all questions
    save_routers(folder, [router])
    measured = measure(model, processor, asked, view_options(model, processor))
    set_resolution(model, processor, image_size=64)
    return folder, model, processor, router.eval(), measured


def test_views_are_options_of_their_own_sizes_and_features(viewed):
    measured = viewed[4]
    assert [option.name for option in measured.options] == [
        "full: 64 px, all", "glance: 32 px, davit", "read: 96 px, davit + ocr",
    ]  # fmt: skip
    assert measured.flops_O[1] == measured.flops_O.min()
    assert measured.tokens_O[1] < measured.tokens_O[0] < measured.tokens_O[2]
    with pytest.raises(ValueError, match="the model has no views"):
        view_options(*tiny_model())


def test_routed_choices_are_the_routers(viewed):
    _, model, processor, router, measured = viewed
    found = {one.choice.name: one for one in routed_choices(model, processor, [router], measured, trades=(0.0, 1e9))}
    pictures = [open_image(question.images[0].read()) for question in measured.questions]
    texts = [question.text for question in measured.questions]
    names = Routing(router, 0.0).views(model, processor, pictures, texts)
    assert len(set(names)) > 1, "the test's router must choose"
    columns = [[option.view for option in measured.options].index(name) for name in names]
    routed = found["router, trade 0"]
    assert routed.choice.nll.mean == pytest.approx(measured.nll_QO[range(8), columns].mean())
    np.testing.assert_allclose(routed.share_O, np.bincount(columns, minlength=3) / 8)
    cheap, chance = found["router, trade 1e+09"], found["chance, trade 0"]
    assert cheap.share_O.tolist() == [0, 1, 0]
    assert cheap.choice.flops > measured.flops_O[1], "the thumbnail is paid for"
    assert chance.choice.nll.mean == pytest.approx(float((measured.nll_QO @ routed.share_O).mean()))
    alone = found["image alone, trade 0"].share_O * 8
    assert not np.allclose(found["shuffled questions, trade 0"].choice.nll.mean, routed.choice.nll.mean)
    assert alone.sum() == pytest.approx(8)


def test_scores_are_means_over_the_routers(viewed):
    _, model, processor, router, measured = viewed
    torch.manual_seed(5)
    other = Router(router.config).eval()
    other.layers[2].weight.data.mul_(20)
    one, two, both = (
        {c.choice.name: c for c in routed_choices(model, processor, routers, measured, trades=(0.0,))}
        for routers in ([router], [other], [router, other])
    )
    for name in ("router, trade 0", "image alone, trade 0"):
        assert both[name].choice.nll.mean == pytest.approx((one[name].choice.nll.mean + two[name].choice.nll.mean) / 2)
        assert both[name].seeds == one[name].seeds + two[name].seeds


def test_the_bill_of_views(viewed, tmp_path, monkeypatch, capsys):
    from florence_vl.cli import analyze as command
    from florence_vl.cli.main import main

    folder, model, processor, _, measured = viewed
    monkeypatch.setattr(command, "_measured", lambda *_: (model, processor, measured))
    bill_of = ["analyze", "bill", "--model", str(folder), "--rounds", "1", "--out", str(tmp_path)]
    assert main([*bill_of, "--subsets", "views", "--trade", "0", "--trade", "0.5"]) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "bill.json").read_text())["rows"]}
    assert len(rows) == 3 + 2 * 4
    assert rows["router, trade 0"]["latency"] > rows["chance, trade 0"]["latency"]
    assert "shuffled questions, trade 0.5" in capsys.readouterr().out
    monkeypatch.setattr(command, "_measured", lambda *_: pytest.fail("measured for hours before the error"))
    assert main([*bill_of, "--subsets", "none", "--trade", "0"]) == 2
    assert "--trade needs --subsets views" in capsys.readouterr().err


def test_gates_by_group_of_questions(asked):
    from florence_vl.analyze.gates import gates_by_group
    from florence_vl.analyze.report import gates_tables

    model, processor = tiny_model(fusion="gated", gate={"context": "question"})
    measured = measure(model, processor, asked, make_options(model.config.features, [64], "none"))
    start = gates_by_group(model, processor, measured)
    assert set(start) == {"s0", "s1"}
    assert {gate.mean for gates in start.values() for gate in gates.values()} == {1.0}, "gates begin at 1"
    torch.manual_seed(0)
    with torch.no_grad():
        model.model.fusion.gate.weight.normal_()
    trained = gates_by_group(model, processor, measured)
    assert list(trained["s0"]) == ["caption", "ocr", "grounding"]
    assert any(abs(trained["s0"][name].mean - trained["s1"][name].mean) > 1e-3 for name in trained["s0"])
    assert gates_by_group(*tiny_model(), measured) == {}
    table = gates_tables({"gates": {"s0": {"ocr": {"mean": 1.2, "half": 0.1, "runs": 8}}}})[0]
    assert table["header"] == ["group", "ocr"]
    assert table["cells"][0][0] == "s0"
    assert "1.20" in table["cells"][0][1]


def _gated(context, open_gate):
    torch.manual_seed(0)
    model, _ = tiny_model(fusion="gated", gate={"context": context})
    if open_gate:
        torch.nn.init.normal_(model.model.fusion.gate.weight, std=3.0)
    return model.eval(), tiny_processor(model.config)


def test_gates_that_use_the_question_lose_it_by_shuffling(asked):
    option = [make_options(["davit", "caption", "ocr", "grounding"], [64], "none")[0]]
    kinds, shuffled = {}, {}
    for name, context in (("start", "question"), ("image", "image"), ("question", "question")):
        model, processor = _gated(context, name != "start")
        kinds[name] = [measure(model, processor, asked, option) for _ in range(2)]
        shuffled[name] = [measure(model, processor, asked, option, shuffle=seed) for seed in (1, 2)]
    start, image, question_ = compare_gates(kinds, shuffled)
    assert start.right_gain is None
    assert start.shuffled_nll.mean == image.shuffled_nll.mean == 0.0, "they do not read the question"
    assert question_.shuffled_nll.mean != 0.0
    own, others = (np.stack([one.nll_QO[:, 0] for one in side["question"]]) for side in (kinds, shuffled))
    assert question_.shuffled_nll.mean == pytest.approx(float((own - others).mean()))
    first = np.stack([one.nll_QO[:, 0] for one in kinds["start"]])
    assert question_.nll_gain.mean == pytest.approx(float((first - own).mean()))
    one_reference = compare_gates({"start": kinds["start"][:1], "question": kinds["question"]}, {})[1]
    assert one_reference.nll_gain.mean == pytest.approx(question_.nll_gain.mean)
    assert one_reference.nll_gain.runs == 2
    with pytest.raises(ValueError, match="'image' answered other questions"):
        compare_gates({"a": kinds["start"], "image": [measure(*_gated("image", False), asked[:4], option)]}, {})


def test_the_command_compares_kinds_of_gates(asked, tmp_path, monkeypatch, capsys):
    from florence_vl.analyze.report import write_report
    from florence_vl.cli import analyze as command
    from florence_vl.cli.main import main

    loaded = {"plain": _gated("none", False), "q0": _gated("question", True), "q1": _gated("question", True)}

    def measured(path, *_):
        model, processor = loaded[path]
        return model, processor, measure(model, processor, asked, make_options(model.config.features, [64], "none"))

    monkeypatch.setattr(command, "_measured", measured)
    out = tmp_path / "gates"
    assert main(["analyze", "gates", "--model", "without=plain", "question=q0,q1", "--out", str(out)]) == 0
    record = json.loads((out / "gates.json").read_text())
    assert [(row["name"], row["seeds"]) for row in record["rows"]] == [("without", 1), ("question", 2)]
    assert record["rows"][0]["shuffled_nll"] is None
    assert record["gates"]["question"]["s0"]["ocr"]["mean"] != record["gates"]["question"]["s1"]["ocr"]["mean"]
    assert write_report(tmp_path, tmp_path / "page.html", "Results")[1] == {"gates": 1}
    assert "Mean gate of each feature by group of questions: question" in (tmp_path / "page.html").read_text()
    for wrong in (["plain"], ["a=plain", "a=q0"], ["=plain"]):
        assert main(["analyze", "gates", "--model", *wrong, "--out", str(out)]) == 2
        assert "is not NAME=MODEL" in capsys.readouterr().err
