"""Readers: access by index in every format, from disk and from URLs, with errors that name file and line."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import pickle
import tarfile
import zipfile

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from florence_vl.data.readers import READERS, Filter, ImageStore, IndexedJson, guess_reader, open_reader
from florence_vl.data.readers import index as index_module
from florence_vl.data.readers.conversation import split_placeholders
from florence_vl.data.records import BadRecord, ImageRef
from florence_vl.model.pictures import open_image


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLORENCE_VL_CACHE", str(tmp_path / "cache"))


def png(color=(255, 0, 0), size=8):
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), color).save(buffer, "PNG")
    return buffer.getvalue()


def turns(*texts):
    return [{"from": "human" if i % 2 == 0 else "gpt", "value": text} for i, text in enumerate(texts)]


LLAVA = [
    {"id": "a", "image": "one.png", "conversations": turns("<image>\nWhat is it?", "A square.")},
    {"id": 2, "conversations": turns('Say "hi" \\ [there]', "hi }] {", "More?", "ümläut 漢字")},
    {
        "id": "c",
        "image": ["one.png", "two.png"],
        "conversations": turns("Compare <image> with\n<image>\nnow.", "They differ."),
    },
]


@pytest.fixture
def images(tmp_path):
    (tmp_path / "one.png").write_bytes(png((255, 0, 0)))
    (tmp_path / "two.png").write_bytes(png((0, 255, 0)))
    return tmp_path


def write_llava(folder, form):
    path = folder / f"data.{'json' if form != 'lines' else 'jsonl'}"
    if form == "lines":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in LLAVA))
    else:
        path.write_text(json.dumps(LLAVA, ensure_ascii=form == "ascii", indent=2 if form == "indented" else None))
    return path


@pytest.mark.parametrize("form", ["plain", "indented", "ascii", "lines"])
def test_llava(images, form):
    reader = open_reader(write_llava(images, form))
    assert type(reader) is READERS["llava"]
    assert len(reader) == 3
    one, text_only, two = (reader[i] for i in range(3))
    assert (one.id, text_only.id, two.id) == ("a", "2", "c")
    assert one.messages[0] == {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}],
    }
    assert one.messages[1] == {"role": "assistant", "content": [{"type": "text", "text": "A square."}]}
    assert open_image(one.images[0]).getpixel((0, 0)) == (255, 0, 0)
    assert text_only.images == []
    assert text_only.messages[0]["content"][0]["text"] == 'Say "hi" \\ [there]'
    assert text_only.messages[3]["content"][0]["text"] == "ümläut 漢字"
    assert [part["type"] for part in two.messages[0]["content"]] == ["text", "image", "text", "image", "text"]
    assert two.messages[0]["content"][2]["text"] == "with"
    assert open_image(two.images[1]).getpixel((0, 0)) == (0, 255, 0)
    again = pickle.loads(pickle.dumps(reader))
    assert again[2].text() == two.text()


def test_placeholders_keep_their_places():
    assert split_placeholders("no image here ") == [{"type": "text", "text": "no image here "}]
    assert split_placeholders("a\n<image>") == [{"type": "text", "text": "a"}, {"type": "image"}]
    assert split_placeholders("<image><image>") == [{"type": "image"}] * 2


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        ({"conversations": turns("<image> a", "b")}, "messages", "shows 1 images, the record names 0"),
        (
            {"image": ["one.png", "two.png"], "conversations": turns("<image> a", "b")},
            "messages",
            "shows 1 images, the record names 2",
        ),
        ({"conversations": "hello"}, "messages", "must be a list of turns"),
        ({"conversations": [{"from": "humn", "value": "x"}]}, "messages", "'human'"),
        ({"conversations": [{"from": "human"}]}, "messages", "must have 'from' and 'value'"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "messages", "no turn of the user"),
        ({"conversations": [{"from": "human", "value": None}]}, "messages", "has no text"),
        ({"conversations": []}, "messages", "no turn of the user"),
        ({"image": 7, "conversations": turns("<image>", "b")}, "image", "file name or bytes, found 7"),
    ],
)
def test_malformed_llava_rows_are_bad_records(images, row, kind, message):
    path = images / "bad.jsonl"
    path.write_text(json.dumps(LLAVA[0]) + "\n" + json.dumps({"id": "x", **row}))
    reader = open_reader(path)
    with pytest.raises(BadRecord, match=message) as error:
        reader[1]
    assert error.value.kind == kind
    assert "record 1 (id 'x')" in str(error.value) or kind == "image"


def test_llava_habits(images):
    rows = [
        {"id": 0, "image": "one.png", "conversations": turns("No placeholder", "yes")},
        {"id": 1, "conversations": [{"from": "gpt", "value": "dropped"}, *turns("q", "a")]},
        {"id": 2, "image": None, "conversations": turns("q", "the word <image> in an answer is text")},
    ]
    path = images / "habits.json"
    path.write_text(json.dumps(rows))
    reader = open_reader(path)
    assert [part["type"] for part in reader[0].messages[0]["content"]] == ["image", "text"]
    assert [message["role"] for message in reader[1].messages] == ["user", "assistant"]
    assert reader[2].messages[1]["content"] == [{"type": "text", "text": "the word <image> in an answer is text"}]


@given(
    rows=st.lists(
        st.dictionaries(
            st.text(max_size=5), st.recursive(st.text() | st.integers() | st.none(), st.lists, max_leaves=4), max_size=3
        ),
        min_size=1,
        max_size=12,
    ),
    indent=st.sampled_from([None, 1]),
    ascii_=st.booleans(),
    chunk=st.integers(1, 40),
)
@settings(max_examples=80, deadline=None)
def test_offsets_of_any_json_at_any_chunk_size(tmp_path_factory, rows, indent, ascii_, chunk):
    path = tmp_path_factory.mktemp("json") / "rows.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii_), encoding="utf-8", errors="surrogatepass")
    lines = path.with_suffix(".jsonl")
    text = "\n".join(json.dumps(row, ensure_ascii=True) + ("\n  " if i % 3 == 1 else "") for i, row in enumerate(rows))
    lines.write_text(text)
    full = index_module._chunks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "_chunks", lambda p, size=None: full(p, chunk))
        array, by_line = index_module.scan_json_array(path), index_module.scan_json_lines(lines)
    data = path.read_bytes()
    for offsets, source in ((array, data), (by_line, lines.read_bytes())):
        pieces = [source[a:b].rstrip().rstrip(b",") for a, b in itertools.pairwise(offsets)]
        assert [json.loads(piece.decode("utf-8", "surrogatepass")) for piece in pieces] == rows


def test_the_index_is_built_once_mapped_and_renewed_when_the_file_changes(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"n": i}) for i in range(5000)))
    scans = []
    real = index_module.scan_json_lines
    monkeypatch.setattr("florence_vl.data.readers.json_files.scan_json_lines", lambda p: scans.append(p) or real(p))
    first = IndexedJson(path)
    second = IndexedJson(path)
    assert len(scans) == 1
    assert isinstance(second.offsets, np.memmap)
    assert second[4999] == {"n": 4999}
    assert first.offsets.tolist() == second.offsets.tolist()
    path.write_text("\n".join(json.dumps({"n": -i}) for i in range(6000)))
    assert IndexedJson(path)[5999] == {"n": -5999}
    assert len(scans) == 2


def test_invalid_json_names_the_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"conversations": []}\n\n{"conversations": [}\n{"conversations": []}\n')
    reader = open_reader(path)
    assert len(reader) == 3
    with pytest.raises(BadRecord, match=r"rows\.jsonl line 3: invalid JSON: .* column 20"):
        reader[1]
    array = tmp_path / "rows.json"
    array.write_text('[\n {"conversations": []},\n {"conversations":\n  nul}\n]')
    with pytest.raises(BadRecord, match=r"rows\.json line 4: invalid JSON"):
        open_reader(array)[1]
    array.write_bytes(b'[{"conversations": []}, {"conversations": "\xff"}]')
    with pytest.raises(BadRecord, match="line 1: invalid JSON: not UTF-8"):
        open_reader(array)[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("   \n ", "holds no records"),
        ("[]", "holds no records"),
        ('[{"conversations": []}, {"conv', "truncated.*number 1"),
        ('[[{"conversations": []}]]', "not a list of objects"),
        ('[{"conversations": []}]\n[{"conversations": []}]', "more than one JSON list: the first ends at byte 22"),
        ('{"data": 1}', "the first record has no 'conversations'; its keys are data"),
        ('{"messages": []}', "read by the reader 'messages'"),
    ],
)
def test_wrong_files_are_refused(tmp_path, text, message):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        READERS["llava"](path)


def test_unknown_things_name_their_neighbors(tmp_path, images):
    with pytest.raises(ValueError, match=r"unknown reader 'lava'.*'llava'"):
        open_reader(tmp_path, "lava")
    with pytest.raises(ValueError, match=r"no option 'image_rot'.*'image_root'"):
        open_reader(write_llava(images, "plain"), image_rot="x")
    with pytest.raises(FileNotFoundError, match=r"nothing\.json"):
        open_reader(tmp_path / "nothing.json")
    with pytest.raises(FileNotFoundError, match="no such image folder"):
        open_reader(write_llava(images, "plain"), image_root=tmp_path / "nowhere")
    (tmp_path / "data.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="cannot tell the format"):
        guess_reader(tmp_path / "data.bin")


def test_urls(images):
    memory = fsspec.filesystem("memory")
    with memory.open("/set/data.json", "wb") as file:
        file.write(write_llava(images, "plain").read_bytes())
    with memory.open("/set/one.png", "wb") as file:
        file.write(png((1, 2, 3)))
    reader = open_reader("memory://set/data.json")
    record = reader[0]
    assert isinstance(record.images[0], ImageRef)
    assert open_image(record.images[0]).getpixel((0, 0)) == (1, 2, 3)
    assert reader[1].text("assistant").startswith("hi }] {")
    file_reader = open_reader(f"file://{write_llava(images, 'lines')}")
    assert file_reader[2].num_image_parts == 2
    with pytest.raises(FileNotFoundError, match="memory://set/none"):
        open_reader("memory://set/none.json")


def test_tables_shards_and_folders_at_urls(tmp_path):
    memory = fsspec.filesystem("memory")
    page = {"bytes": png((5, 0, 0)), "path": None}
    table = write_parquet(
        tmp_path / "t.parquet",
        {"images": [[page]] * 3, "texts": [[{"user": "q", "assistant": str(i)}] for i in range(3)]},
    )
    shard = write_tar(tmp_path / "s.tar", [("k.png", png((6, 0, 0))), ("k.txt", b"words")])
    for name, data in {
        "tables/t.parquet": table.read_bytes(),
        "shards/s.tar": shard.read_bytes(),
        "folder/i.png": png((7, 0, 0)),
        "folder/i.txt": b"words",
    }.items():
        with memory.open(f"/urls/{name}", "wb") as file:
            file.write(data)
    for folder, reader, red, answer in (
        ("tables", "parquet", 5, "2"),
        ("shards", "webdataset", 6, "words"),
        ("folder", "folder", 7, "words"),
    ):
        found = pickle.loads(pickle.dumps(open_reader(f"memory://urls/{folder}")))
        assert type(found) is READERS[reader]
        record = found[len(found) - 1]
        assert record.text("assistant") == answer
        assert open_image(record.images[0]).getpixel((0, 0)) == (red, 0, 0)


@pytest.mark.parametrize("archive", ["tar", "zip", "deflated"])
def test_images_inside_archives(tmp_path, archive):
    contents = {f"coco/{i}.png": png((i, 0, 0)) for i in range(20)}
    if archive == "tar":
        root = tmp_path / "images.tar"
        with tarfile.open(root, "w") as tar:
            for name, data in contents.items():
                info = tarfile.TarInfo("./" + name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    else:
        root = tmp_path / "images.zip"
        method = zipfile.ZIP_STORED if archive == "zip" else zipfile.ZIP_DEFLATED
        with zipfile.ZipFile(root, "w", method) as file:
            for name, data in contents.items():
                file.writestr(name, data)
    store = pickle.loads(pickle.dumps(ImageStore(root)))
    for i in (0, 7, 19):
        assert open_image(store[f"coco/{i}.png"]).getpixel((0, 0)) == (i, 0, 0)
    with pytest.raises(BadRecord, match=r"no image 'coco/20\.png'") as error:
        store["coco/20.png"]
    assert error.value.kind == "image"


def test_several_image_roots(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{folder}.png").write_bytes(png())
    store = ImageStore([tmp_path / "a", tmp_path / "b"])
    assert store["a.png"] == os.path.join(tmp_path, "a", "a.png")
    assert store["b.png"] == os.path.join(tmp_path, "b", "b.png")
    with pytest.raises(ValueError, match=r"decompress it to \.tar"):
        ImageStore("x.tar.gz")


def test_messages(images):
    rows = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
        {
            "id": "openai",
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "see"},
                        {"type": "image_url", "image_url": {"url": "one.png"}},
                        {"type": "image", "path": "two.png"},
                    ],
                },
                {"role": "assistant", "content": "two"},
            ],
        },
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "<image> and <image>?"},
                {"role": "assistant", "content": "no"},
            ],
            "images": ["one.png", "two.png"],
        },
        {"messages": [{"role": "user", "content": [{"type": "image"}]}], "images": ["two.png"]},
        {"messages": [{"role": "user", "content": "<image> <image>"}], "images": ["two.png"]},
        {"messages": [{"role": "robot", "content": "x"}]},
        {"messages": [{"role": "user", "content": "shown first"}], "images": "two.png"},
    ]
    path = images / "chat.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    reader = open_reader(path)
    assert type(reader) is READERS["messages"]
    assert reader[0].images == []
    assert [os.path.basename(p) for p in reader[1].images] == ["one.png", "two.png"]
    assert [part["type"] for part in reader[2].messages[1]["content"]] == ["image", "text", "image", "text"]
    assert [os.path.basename(p) for p in reader[3].images] == ["two.png"]
    with pytest.raises(BadRecord, match="names only 1"):
        reader[4]
    with pytest.raises(BadRecord, match="unknown role 'robot'"):
        reader[5]
    assert [part["type"] for part in reader[6].messages[0]["content"]] == ["image", "text"]


def write_parquet(path, columns, group=2):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path, row_group_size=group)
    return path


def test_parquet_of_pages_and_pairs(tmp_path):
    pages = [[{"bytes": png((10 * i + j, 0, 0)), "path": None} for j in range(1 + i % 2)] for i in range(5)]
    texts = [[{"user": f"q{i}", "assistant": f"a{i}", "source": "PDFA"}] * 2 for i in range(5)]
    for part in range(2):
        write_parquet(tmp_path / f"train-{part}.parquet", {"images": pages, "texts": texts})
    reader = open_reader(tmp_path)
    assert type(reader) is READERS["parquet"]
    assert (len(reader), reader.block) == (10, 2)
    record = pickle.loads(pickle.dumps(reader))[8]
    assert [m["role"] for m in record.messages] == ["user", "assistant"] * 2
    assert [part["type"] for part in record.messages[0]["content"]] == ["image", "image", "text"]
    assert open_image(record.images[0]).getpixel((0, 0)) == (30, 0, 0)
    assert len(reader[6].images) == 2
    assert open_image(reader[6].images[1]).getpixel((0, 0)) == (11, 0, 0)
    with pytest.raises(IndexError):
        reader[10]


def test_parquet_captions_filters_and_templates(tmp_path):
    for i in range(6):
        (tmp_path / f"u{i}.png").write_bytes(png((i, i, i)))
    columns = {
        "uid": [f"u{i}" for i in range(6)],
        "status": ["success", "failed", None, "success", "success", "success"],
        "vlm_caption": [" This image displays a dog.", "x", "x", "", " This image displays: two cats.", "Plain"],
    }
    path = write_parquet(tmp_path / "captions.parquet", columns)
    options = {
        "caption": "vlm_caption",
        "prompts": "What?",
        "image_template": "{uid}.png",
        "id_column": "uid",
        "strip_prefixes": ("This image displays",),
    }
    reader = open_reader(
        path, filters=[Filter("status", "==", "success"), Filter("vlm_caption", "filled", True)], **options
    )
    assert [reader[i].id for i in range(len(reader))] == ["u0", "u4", "u5"]
    assert [reader[i].text("assistant") for i in range(3)] == ["A dog.", "Two cats.", "Plain"]
    assert reader[0].text("user") == "What?"
    assert open_image(reader[1].images[0]).getpixel((0, 0)) == (4, 4, 4)
    assert pickle.loads(pickle.dumps(reader))[1].id == "u4"
    # as a recipe writes them
    written = [{"column": "status", "test": "==", "value": "success"}, {"column": "vlm_caption", "test": "filled"}]
    plain = open_reader(path, filters=written, **{**options, "strip_prefixes": "This image displays"})
    assert [plain[i].text("assistant") for i in range(len(plain))] == ["A dog.", "Two cats.", "Plain"]
    with pytest.raises(ValueError, match=r"keys column, test and value, found \{'colum': 'status'"):
        open_reader(path, filters=[{"colum": "status", "test": "=="}], **options)
    with pytest.raises(BadRecord, match="no caption in 'vlm_caption'"):
        open_reader(path, **options)[3]
    with pytest.raises(ValueError, match=r"no column 'vlm_captions'.*'vlm_caption'"):
        open_reader(path, **{**options, "caption": "vlm_captions"})
    with pytest.raises(ValueError, match="names column 'uuid'"):
        open_reader(path, **{**options, "image_template": "{uuid}.png"})
    with pytest.raises(ValueError, match=r"no known layout.*caption=COLUMN; found uid, status"):
        open_reader(path)
    with pytest.raises(ValueError, match="no rows after the filters"):
        open_reader(path, filters=[Filter("status", "==", "never")], **options)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"broken\.parquet is not a readable parquet file"):
        open_reader(tmp_path / "broken.parquet", **options)


def write_tar(path, members, form=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_webdataset(tmp_path, form):
    long = "x" * 90 + "/" + "y" * 80 if form == tarfile.USTAR_FORMAT else "x" * 150 + "/" + "ÿ" * 80
    for shard in range(2):
        members = []
        for i in range(3):
            key = f"{long}{shard}{i}" if i == 2 else f"{shard:05d}/{i:06d}"
            members += [
                (f"{key}.jpg", png((shard, i, 0))),
                (f"{key}.txt", f" caption {shard}{i} ".encode()),
                (f"{key}.json", json.dumps({"uid": f"id{shard}{i}", "ok": i != 1, "long": f"L{i}"}).encode()),
            ]
        write_tar(tmp_path / f"shard-{shard}.tar", members, form)
    reader = open_reader(tmp_path)
    assert type(reader) is READERS["webdataset"]
    assert len(reader) == 6
    again = pickle.loads(pickle.dumps(reader))
    for i in range(6):
        record = again[i]
        assert record.id == f"id{i // 3}{i % 3}"
        assert record.text("assistant") == f"caption {i // 3}{i % 3}"
        assert open_image(record.images[0]).getpixel((0, 0)) == (i // 3, i % 3, 0)
    filtered = open_reader(tmp_path, filters=[Filter("ok", "==", True)], caption="long")
    assert [filtered[i].text("assistant") for i in range(len(filtered))] == ["L0", "L2", "L0", "L2"]


def test_webdataset_conversations(tmp_path):
    conversation = {"id": "c", "conversations": turns("<image> and <image>", "ok")}
    chat = {"messages": [{"role": "user", "content": "<image>?"}], "images": ["folder/m.b.png"]}
    path = write_tar(
        tmp_path / "set.tar",
        [
            ("k.0.png", png((0, 9, 0))),
            ("k.1.png", png((1, 9, 0))),
            ("k.json", json.dumps(conversation).encode()),
            ("m.a.png", png((2, 0, 0))),
            ("m.b.png", png((3, 0, 0))),
            ("m.json", json.dumps(chat).encode()),
            ("n.json", b"{nothing"),
        ],
    )
    reader = open_reader(path)
    assert [open_image(image).getpixel((0, 0))[0] for image in reader[0].images] == [0, 1]
    assert [open_image(image).getpixel((0, 0))[0] for image in reader[1].images] == [3]
    with pytest.raises(BadRecord, match=r"n\.json: invalid JSON"):
        reader[2]


def test_damaged_tars_are_refused(tmp_path):
    path = write_tar(tmp_path / "set.tar", [("a.png", png(size=64)), ("a.txt", b"x" * 3000)])
    data = path.read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[:2000])
    with pytest.raises(ValueError, match=r"cut\.tar is damaged after 2 members"):
        open_reader(tmp_path / "cut.tar")
    (tmp_path / "none.tar").write_bytes(b"not a tar" * 100)
    with pytest.raises(ValueError, match=r"none\.tar is not an uncompressed tar"):
        open_reader(tmp_path / "none.tar")


def test_folder_with_sidecars(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.png", "sub/a.png", "none.png"):
        (tmp_path / name).write_bytes(png())
    (tmp_path / "b.txt").write_text("caption of b\n")
    (tmp_path / "sub" / "a.txt").write_text("caption of a")
    reader = open_reader(tmp_path, prompts=[""])
    assert type(reader) is READERS["folder"]
    assert [reader[i].id for i in (0, 2)] == ["b.png", "sub/a.png"]
    assert reader[2].messages == [
        {"role": "user", "content": [{"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "caption of a"}]},
    ]
    with pytest.raises(BadRecord, match=r"none\.txt does not exist"):
        reader[1]


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_folder_with_metadata(tmp_path, form):
    rows = [{"file_name": f"{i}.png", "text": f"caption, {i}"} for i in range(3)]
    for row in rows:
        (tmp_path / row["file_name"]).write_bytes(png())
    path = tmp_path / f"metadata.{form}"
    if form == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["file_name", "text"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    reader = open_reader(tmp_path)
    assert [reader[i].text("assistant") for i in range(3)] == [row["text"] for row in rows]
    assert open_image(reader[1].images[0]).size == (8, 8)
    with pytest.raises(ValueError, match="no column 'title'; its columns are file_name, text"):
        open_reader(tmp_path, caption="title")
    path.write_text("a,b\n1,2\n" if form == "csv" else '{"a": 1}\n')
    with pytest.raises(ValueError, match="record 1 has no 'file_name'"):
        open_reader(tmp_path)


def test_prompts_are_spread_and_fixed(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02d}.png").write_bytes(png())
        (tmp_path / f"{i:02d}.txt").write_text("x")
    reader = open_reader(tmp_path, prompts=["one", "two"])
    asked = [reader[i].text("user") for i in range(40)]
    assert 8 < asked.count("one") < 32
    assert asked == [reader[i].text("user") for i in range(40)]
    with pytest.raises(ValueError, match="at least one text"):
        open_reader(tmp_path, prompts=[])


@pytest.mark.parametrize("layout", ["conversations", "texts", "messages"])
def test_webdataset_shows_images_in_the_order_of_the_record(tmp_path, layout):
    question = "<image> or <image>?"
    texts = {
        "conversations": turns(question, "b"),
        "texts": [{"user": question, "assistant": "b"}],
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "b"}],
    }
    members = [("k.a.png", png((1, 0, 0))), ("k.b.png", png((2, 0, 0)))]
    shown = {}
    for name, listed in (("swapped", ["x/k.b.png", "x/k.a.png"]), ("lost", ["k.b.png", "k.c.png"]), ("others", ["7"])):
        row = {"image": listed, layout: texts[layout]}
        reader = open_reader(write_tar(tmp_path / f"{name}.tar", [*members, ("k.json", json.dumps(row).encode())]))
        try:
            shown[name] = [open_image(image).getpixel((0, 0))[0] for image in reader[0].images]
        except BadRecord as error:
            shown[name] = error.kind
    assert shown == {"swapped": [2, 1], "lost": "image", "others": "image" if layout == "messages" else [1, 2]}
