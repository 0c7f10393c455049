"""Every registered data set is read from a small file in its exact schema."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile

import pytest
from PIL import Image

from florence_vl.data.readers import READERS, open_reader
from florence_vl.data.records import BadRecord
from florence_vl.data.sources import DATASETS, open_dataset
from florence_vl.model.pictures import open_image


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLORENCE_VL_CACHE", str(tmp_path / "cache"))


def jpeg(size=(16, 12)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(buffer, "JPEG")
    return buffer.getvalue()


def put(path, data=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data or jpeg())


def turns(*texts):
    return [{"from": "human" if i % 2 == 0 else "gpt", "value": text} for i, text in enumerate(texts)]


def sharegpt4v(root, text_only=False):
    names = ["coco/train2017/000000000009.jpg", "llava/llava_pretrain/images/00000/1.jpg", "sam/images/sa_1.jpg"]
    rows = [
        {"id": name.split("/")[-1][:-4], "image": name, "conversations": turns("<image>\nDescribe it.", "A photo.")}
        for name in names
    ]
    for name in names:
        put(root / name)
    if text_only:
        rows.append({"id": "wgByO4Y_0", "model": "", "conversations": turns("hello", "hi", "more", "yes")})
    (root / "data.json").write_text(json.dumps(rows))
    return root / "data.json", {}, len(rows)


def llava_pretrain(root):
    row = {
        "id": "004539375",
        "image": "00453/004539375.jpg",
        "conversations": turns("Render a clear and concise summary of the photo.\n<image>", "select luxury furniture"),
    }
    with zipfile.ZipFile(root / "images.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("00453/004539375.jpg", jpeg())
    (root / "blip_laion_cc_sbu_558k.json").write_text(json.dumps([row]))
    return root / "blip_laion_cc_sbu_558k.json", {"image_root": root / "images.zip"}, 1


def llava_instruct(root):
    names = ["coco/train2017/1.jpg", "gqa/images/2.jpg", "ocr_vqa/images/3.jpg", "vg/VG_100K_2/4.jpg"]
    rows = [
        {"id": str(i), "image": n, "conversations": turns("<image>\nQ1", "A1", "Q2", "A2")} for i, n in enumerate(names)
    ]
    rows.append({"id": "text", "model": "", "conversations": turns("Q", "A")})
    for name in names:
        put(root / "images" / name)
    (root / "llava_v1_5_mix665k.json").write_text(json.dumps(rows))
    return root / "llava_v1_5_mix665k.json", {"image_root": root / "images"}, 5


def cambrian(root):
    rows = [
        {
            "id": 1,
            "image": "chartqa/train/png/1.png",
            "conversations": turns("<image>\nQ", "A"),
            "source": "chartqa_28k.json",
        },
        {"id": "m", "conversations": turns("1+1?", "2"), "source": "orca_math_200k.json"},
    ]
    with tarfile.open(root / "chartqa.tar", "w") as tar:
        info = tarfile.TarInfo("chartqa/train/png/1.png")
        info.size = len(jpeg())
        tar.addfile(info, io.BytesIO(jpeg()))
    path = root / "Cambrian7M_withsystemprompt.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path, {"image_root": [str(root / "chartqa.tar")]}, 2


def vision_flan(root, archive=None):
    row = {
        "conversations": turns("<image>\nQ", "A"),
        "id": "task_1_0",
        "task_name": "task_1",
        "image": "images/t_0.jpg",
    }
    if archive:
        row["image"] = "t_0.jpg"
        with zipfile.ZipFile(root / archive, "w") as file:
            file.writestr("t_0.jpg", jpeg())
    else:
        put(root / "images" / "t_0.jpg")
    (root / "vision_flan.json").write_text(json.dumps([row]))
    return root / "vision_flan.json", {"image_root": root / archive} if archive else {}, 1


def docmatix(root):
    import pyarrow as pa
    import pyarrow.parquet as pq

    page = {"bytes": jpeg(), "path": None}
    texts = [{"user": f"Q{i}?", "assistant": f"A{i}.", "source": "PDFA key: 1"} for i in range(3)]
    for folder in ("data", "pdf", "zero-shot-exp"):  # the configs images, pdf and zero-shot-exp
        (root / folder).mkdir()
    table = pa.table({"images": [[page, page], [page]], "texts": [texts, texts[:1]]})
    pq.write_table(table, root / "data" / "train-00000-of-01106.parquet")
    pq.write_table(pa.table({"pdf": [b"%PDF"], "texts": [texts]}), root / "pdf" / "train-00000-of-00001.parquet")
    pq.write_table(table, root / "zero-shot-exp" / "test-00000-of-00001.parquet")
    return root, {}, 2


def rated(root, **columns):
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [{"user": "Q?", "assistant": "A.", "source": "ai2d"}]
    rows = [{"images": [{"bytes": jpeg(), "path": None}] * n, "texts": texts, **columns} for n in (1, 0)]
    (root / "ai2d").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), root / "ai2d" / "train-00000-of-00001.parquet")
    return root, {}, 2


def finevision(root):
    return rated(root, source="ai2d", relevance_ratings=[5], formatting_ratings=[4])


PIXELPROSE_ROWS = [
    ("u0", "success", " This image displays a red barn. It is a photo."),
    ("u1", "failed_to_download", " This image displays x."),
    ("u2", "success", ""),
    ("u3", "success", " A painting of a lake."),
    ("u4", None, "This image displays y."),
]


def pixelprose(root):
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {name: [None] * 5 for name in DATASETS["pixelprose"].columns}
    columns["uid"], columns["status"], columns["vlm_caption"] = (list(c) for c in zip(*PIXELPROSE_ROWS, strict=True))
    columns["original_caption"] = ["alt text"] * 5
    pq.write_table(pa.table(columns), root / "vlm_captions_redcaps_00.parquet")
    for uid in ("u0", "u3"):
        put(root / "pictures" / f"{uid}.jpg")
    return root / "vlm_captions_redcaps_00.parquet", {"image_root": root / "pictures"}, 2


MADE = {
    "pixelprose": pixelprose,
    "sharegpt4v-cap100k": sharegpt4v,
    "sharegpt4v-share-captioner": sharegpt4v,
    "sharegpt4v-mix665k": lambda root: sharegpt4v(root, text_only=True),
    "llava-pretrain-558k": llava_pretrain,
    "llava-instruct-665k": llava_instruct,
    "cambrian-7m": cambrian,
    "vision-flan": vision_flan,
    "vision-flan-191": lambda root: vision_flan(root, "image_191-task_1k.zip"),
    "docmatix": docmatix,
    "finevision": finevision,
    "the-cauldron": rated,
}


@pytest.mark.parametrize("name", DATASETS.names())
def test_every_data_set_is_read_from_its_schema(tmp_path, name):
    path, options, expected = MADE[name](tmp_path)
    reader = open_dataset(name, path, **options)
    assert len(reader) == expected
    for index in range(expected):
        record = reader[index].check()
        assert record.source.split("/")[0] == name
        assert record.messages[-1]["role"] == "assistant"
        assert record.text("assistant").strip()
        for image in record.images:
            assert open_image(image).size == (16, 12)
    dataset = DATASETS[name]
    assert dataset.licence
    assert dataset.images
    assert dataset.hub_id in dataset.url
    assert all(kind in READERS for kind in dataset.layouts)


def test_pixelprose_is_filtered_and_stripped(tmp_path):
    path, options, _ = pixelprose(tmp_path)
    reader = open_dataset("pixelprose", path, **options)
    assert [(reader[i].id, reader[i].text("assistant")) for i in range(2)] == [
        ("u0", "A red barn. It is a photo."),
        ("u3", "A painting of a lake."),
    ]


def test_pixelprose_as_webdataset(tmp_path):
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for number, (uid, status, caption) in enumerate(PIXELPROSE_ROWS):
            row = json.dumps({"uid": uid, "status": status, "vlm_caption": caption, "caption": "alt text"}).encode()
            for name, data in (
                (f"{number:09d}.jpg", jpeg()),
                (f"{number:09d}.json", row),
                (f"{number:09d}.txt", b"alt"),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    reader = open_dataset("pixelprose", tmp_path)
    assert [(reader[i].id, reader[i].text("assistant")) for i in range(len(reader))] == [
        ("u0", "A red barn. It is a photo."),
        ("u3", "A painting of a lake."),
    ]


def test_docmatix_shows_all_pages_before_the_first_question(tmp_path):
    path, options, _ = docmatix(tmp_path)
    record = open_dataset("docmatix", path, **options)[0]
    assert [part["type"] for part in record.messages[0]["content"]] == ["image", "image", "text"]
    assert [message["role"] for message in record.messages] == ["user", "assistant"] * 3


def test_a_missing_picture_is_a_bad_record_of_kind_image(tmp_path):
    path, options, _ = llava_pretrain(tmp_path)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as file:
        file.writestr("other.jpg", jpeg())
    with pytest.raises(BadRecord) as error:
        open_dataset("llava-pretrain-558k", path, **options)[0]
    assert error.value.kind == "image"


def test_wrong_layouts_and_names_are_refused(tmp_path):
    path, _, _ = llava_instruct(tmp_path)
    with pytest.raises(ValueError, match=r"looks like 'llava'; data set 'docmatix' is read as 'parquet'.*1,106 shards"):
        open_dataset("docmatix", path)
    with pytest.raises(ValueError, match=r"unknown data set 'lava-instruct-665k'.*'llava-instruct-665k'"):
        open_dataset("lava-instruct-665k", path)
    with pytest.raises(ValueError, match=r"no option 'captoin'"):
        open_dataset("llava-instruct-665k", path, captoin="x")


def test_non_commercial_data_is_marked():
    assert {name for name in DATASETS if DATASETS[name].commercial is False} == {
        name for name in DATASETS if name.startswith("sharegpt4v")
    }


def write_img2dataset(root, key):
    """A shard as img2dataset's writer leaves it: tar, table and figures side by side."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{key: " This image displays a red barn.", "status": "success", "key": "000000000", "uid": "u0"}]
    pq.write_table(pa.Table.from_pylist(rows), root / "00000.parquet")
    (root / "00000_stats.json").write_text('{"count": 1}')
    with tarfile.open(root / "00000.tar", "w") as tar:
        for ending, data in (("jpg", jpeg()), ("json", json.dumps(rows[0]).encode()), ("txt", b"x")):
            member = tarfile.TarInfo(f"000000000.{ending}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("key", ["vlm_caption", "caption"])
def test_img2dataset_folders_are_read_from_their_tars(tmp_path, key):
    write_img2dataset(tmp_path, key)
    reader = open_dataset("pixelprose", tmp_path)
    assert len(reader) == 1
    assert reader[0].text("assistant") == "A red barn."
    assert open_image(reader[0].images[0]).size == (16, 12)


def test_alt_text_is_not_taken_for_captions(tmp_path):
    write_img2dataset(tmp_path, "caption")
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        data = json.dumps({"caption": "buy now", "status": "success"}).encode()
        member = tarfile.TarInfo("0.json")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    with pytest.raises(ValueError, match="--caption_col vlm_caption"):
        open_dataset("pixelprose", tmp_path)


def test_shards_beside_foreign_tables_are_refused(tmp_path):
    write_img2dataset(tmp_path, "caption")
    (tmp_path / "00000.parquet").rename(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"do not belong together.*other\.parquet"):
        open_dataset("pixelprose", tmp_path)


def test_a_whole_download_of_several_configs_is_refused_by_the_plain_reader(tmp_path):
    docmatix(tmp_path)
    with pytest.raises(ValueError, match=r"several splits: test: .*; train: "):
        open_reader(tmp_path)
    (tmp_path / "zero-shot-exp" / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(ValueError, match="different layouts"):
        open_reader(tmp_path)


def test_finevision_keeps_the_source_and_turns_with_high_ratings(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [{"user": f"Q{i}?", "assistant": f"A{i}."} for i in range(3)]
    rows = [
        {"images": [{"bytes": jpeg(), "path": None}], "texts": texts, "source": "ai2d", "relevance_ratings": ratings}
        for ratings in ([5, 1, None], [1, 1, 1], [5])
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train-00000-of-00001.parquet")
    reader = open_dataset("finevision", tmp_path, min_ratings={"relevance": 3})
    assert reader[0].source == "finevision/ai2d"
    assert reader[0].text("assistant") == "A0.\nA2."
    with pytest.raises(BadRecord, match="no turn reaches") as error:
        reader[1]
    assert error.value.kind == "unsupervised"
    with pytest.raises(BadRecord, match="1 relevance ratings for 3 turns"):
        reader[2]
    assert open_dataset("finevision", tmp_path)[1].text("assistant") == "A0.\nA1.\nA2."
