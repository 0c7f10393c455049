"""The router: labels from the loss under each view, one accuracy-cost curve, baselines that must lose."""

import numpy as np
import pytest
import torch
from PIL import Image

from florence_vl.data.records import Record
from florence_vl.model.router import Router, RouterConfig, load_routers, route, save_routers
from florence_vl.model.tiny import tiny_model
from florence_vl.train.router import RouterData, collect, curve, fit_router, view_costs

VIEWS = {"glance": {"size": 32, "features": ["davit"]}, "read": {"features": ["davit", "ocr"]}}


@pytest.fixture(scope="module")
def parts():
    return tiny_model(views=VIEWS, positions="resampled", position_grid=[2, 2])


def record(index, answer="A dog."):
    pixels = np.random.default_rng(index).integers(0, 255, (50, 60, 3), dtype=np.uint8)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"What is shown, {index}?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    return Record(str(index), "made", messages, [Image.fromarray(pixels)])


def test_costs_fall_with_size_and_features(parts):
    model, processor = parts
    costs = view_costs(model.config, processor)
    assert costs["full"] == 1
    assert costs["glance"] < costs["read"] < 1
    with pytest.raises(ValueError, match=r"config\.views is empty"):
        view_costs(tiny_model()[0].config, processor)


def test_losses_are_those_of_the_views(parts):
    model, processor = parts
    data = collect(model, processor, [record(i) for i in range(3)] + [Record("bad", "made", [], [])])
    assert data.losses_BW.shape == (3, 3)
    assert data.bad == {"messages": 1}
    chat = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": record(1).images[0]},
                {"type": "text", "text": "What is shown, 1?"},
            ],
        },
        record(1).messages[1],
    ]
    inputs = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True, view="glance"
    )
    labels = torch.where(torch.as_tensor(inputs.pop("assistant_masks")) == 1, inputs["input_ids"], -100)
    expected = model(**inputs, labels=labels).loss
    column = list(data.costs).index("glance")
    torch.testing.assert_close(data.losses_BW[1, column], expected.detach())


def made_up(count=400, seed=0):
    """Questions of two kinds: one needs the full view, the other does not."""
    generator = torch.Generator().manual_seed(seed)
    questions = torch.randn(count, 8, generator=generator)
    needs = (questions[:, 0] > 0).float()
    losses = torch.stack([torch.ones(count), 1 + 2 * needs], 1)
    images = torch.randn(count, 4, generator=generator)
    return RouterData(questions, images, losses, {"full": 1.0, "glance": 0.2}, {})


def test_a_router_saves_cost_at_no_loss_and_shuffled_questions_lose():
    router = fit_router(made_up(), "glance")
    rows = curve(router, made_up(seed=1), [0.0, 1.0, 100.0])
    middle = rows[1]
    assert middle["cost"] < 0.8, "0.6 if every question were told right"
    assert middle["loss"] < 1.2
    assert middle["shuffled"] > middle["loss"] + 0.2
    assert middle["random"] > middle["loss"] + 0.2
    assert rows[2]["cost"] == pytest.approx(0.2)
    assert middle["shares"]["full"] == pytest.approx(0.5, abs=0.15)


def test_save_load_and_route(parts, tmp_path):
    model, processor = parts
    data = collect(model, processor, [record(i) for i in range(4)])
    save_routers(tmp_path, [fit_router(data, "glance", steps=5)])
    router = Router.load(tmp_path)
    pictures = [record(i).images[0] for i in range(3)]
    questions = ["What?", "Where is the dog?", ""]
    cheapest = route(model, processor, router, pictures, questions, trade=1e6)
    assert cheapest == ["glance"] * 3
    alone = [route(model, processor, router, [p], [q], trade=0.0)[0] for p, q in zip(pictures, questions, strict=True)]
    assert route(model, processor, router, pictures, questions, trade=0.0) == alone
    other, other_processor = tiny_model(views={"look": {"size": 32}}, positions="resampled", position_grid=[2, 2])
    with pytest.raises(ValueError, match="use the router that was trained with this model"):
        route(other, other_processor, router, pictures, questions, trade=0.0)
    with pytest.raises(FileNotFoundError, match="no router in"):
        Router.load(tmp_path / "none")
    with pytest.raises(ValueError, match="trade must be 0 or more"):
        router.choose(data.questions_BH, data.images_BD, -1.0)


def test_routers_of_several_seeds(tmp_path):
    data = made_up(40)
    routers = [fit_router(data, "glance", steps=5, seed=seed) for seed in range(3)]
    save_routers(tmp_path, routers)
    for saved, loaded in zip(routers, load_routers(tmp_path), strict=True):
        assert torch.equal(saved.layers[0].weight, loaded.layers[0].weight)
    assert torch.equal(Router.load(tmp_path).layers[0].weight, routers[0].layers[0].weight)
    save_routers(tmp_path, routers[:1])
    assert len(load_routers(tmp_path)) == 1, "the routers of an earlier call are removed"


def test_costs_must_name_the_full_view():
    with pytest.raises(ValueError, match="lack the view 'full'"):
        Router(RouterConfig(4, 4, {"glance": 0.5}, "glance"))
