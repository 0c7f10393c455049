"""The view `auto`: a router chooses the view per image from the question, in every command with questions."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from florence_vl.cli.main import main
from florence_vl.evaluate.benchmark import Generation
from florence_vl.evaluate.local import LocalAnswerer, load_answerer
from florence_vl.evaluate.question import IMAGE, BytesPicture, Question
from florence_vl.model.loading import load_model
from florence_vl.model.resolution import set_resolution
from florence_vl.model.router import Router, RouterConfig, Routing, save_routers, set_view
from florence_vl.model.tiny import tiny_model
from florence_vl.serve.engine import GenerationOptions
from florence_vl.serve.session import ChatSession

VIEWS = {"glance": {"size": 32, "features": ["davit"]}, "read": {"size": 96, "features": ["davit", "ocr"]}}
COSTS = {"full": 1.0, "glance": 0.2, "read": 0.9}
GREEDY = Generation(max_new_tokens=6)


def picture(number: int = 0) -> Image.Image:
    return Image.new("RGB", (64, 64), (40 * number, 90, 200))


def asked(prompt: str, number: int = 0) -> Question:
    file = io.BytesIO()
    picture(number).save(file, "PNG")
    return Question(prompt, "tiny", (IMAGE, prompt), (BytesPicture(file.getvalue()),), {"answer": "x"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model whose router sends questions to different views."""
    folder = tmp_path_factory.mktemp("routed")
    model, processor = tiny_model(views=VIEWS, positions="resampled", position_grid=(2, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    torch.manual_seed(3)
    width, dim = model.config.text_config.hidden_size, model.model.vision_tower.feature_dims["davit"]
    router = Router(RouterConfig(width, dim, COSTS, "glance"))
    with torch.no_grad():
        router.layers[2].weight.mul_(20)
    save_routers(folder, [router])
    return folder


@pytest.fixture(scope="module")
def prompts(folder):
    """Two questions about one picture that the router sends to different views."""
    model, processor = load_model(folder)
    routing = set_view(model, processor, folder, view="auto", trade=0.0)
    by_view = {}
    for word in ("What?", "Where is the dog?", "color", "How many people are there?", "sign", "left of the car?"):
        by_view.setdefault(routing.views(model, processor, [picture()], [word])[0], word)
    assert len(by_view) > 1
    return dict(list(by_view.items())[:2])


def test_answers_are_those_of_the_chosen_views(folder, prompts):
    routed = load_answerer(str(folder), "cpu", resolution={"view": "auto", "trade": 0.0})
    questions = [asked(prompt) for prompt in prompts.values()]
    answers = routed.answer(questions, GREEDY)
    assert routed.encoded_images == 2, "one picture in two views is encoded twice"
    for view, question, answer in zip(prompts, questions, answers, strict=True):
        fixed = load_answerer(str(folder), "cpu", resolution={"view": view})
        assert fixed.answer([question], GREEDY)[0].text == answer.text
        assert fixed.identity != routed.identity
    assert {"view", "trade", "router"} <= routed.identity.keys()
    cheap = load_answerer(str(folder), "cpu", resolution={"view": "auto", "trade": 1e6})
    cheap.answer(questions, GREEDY)
    assert [len(tokens) for tokens in cheap.encode(questions, {}).values()] == [1, 1]


def test_a_conversation_sees_each_picture_as_its_own_question_asks(folder, prompts):
    options = GenerationOptions(max_new_tokens=6)
    for view, prompt in prompts.items():
        model, processor = load_model(folder)
        routing = set_view(model, processor, folder, view="auto", trade=0.0)
        session = ChatSession(model, processor, options=options, routing=routing)
        session.show(picture())
        first, second = session.ask(prompt), session.ask("And now?")
        assert session._engine.stats.images_encoded == 1, "later turns keep the view of the picture's own"
        other, other_processor = load_model(folder)
        set_resolution(other, other_processor, view=view)
        plain = ChatSession(other, other_processor, options=options)
        plain.show(picture())
        assert [plain.ask(prompt), plain.ask("And now?")] == [first, second]


def test_commands(folder, prompts, tmp_path, capsys):
    picture().save(tmp_path / "a.png")
    chat = ["chat", "--model", str(folder), "--image", str(tmp_path / "a.png"), "What?", "--max-new-tokens", "3"]
    assert main([*chat, "--view", "auto"]) == 0
    assert main([*chat, "--view", "auto", "--trade", "0"]) == 0
    assert main([*chat, "--trade", "0.1"]) == 2
    assert "--trade is for --view auto" in capsys.readouterr().err
    for name in ("router.json", "router.safetensors"):
        (folder / name).rename(tmp_path / name)
    assert main([*chat, "--view", "auto"]) == 2
    assert "florence-vl train-router" in capsys.readouterr().err
    for name in ("router.json", "router.safetensors"):
        (tmp_path / name).rename(folder / name)


def test_a_router_of_another_model_is_refused_at_once(folder):
    model, processor = tiny_model(views={"look": {"size": 32}}, positions="resampled", position_grid=(2, 2))
    with pytest.raises(ValueError, match="use the router that was trained with this model"):
        set_view(model, processor, folder, view="auto")
    with pytest.raises(ValueError, match="a trade is for the view 'auto'"):
        set_view(model, processor, folder, view="look", trade=1.0)


def test_identity_tells_routers_apart(folder):
    model, processor = load_model(folder)
    first = set_view(model, processor, folder, view="auto")
    other = Router.load(folder)
    with torch.no_grad():
        other.layers[0].bias.add_(1)
    assert LocalAnswerer(model, processor, routing=first).identity != (
        LocalAnswerer(model, processor, routing=Routing(other, first.trade)).identity
    )
