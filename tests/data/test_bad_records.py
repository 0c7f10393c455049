"""Readers return a checked record or a `BadRecord` for any content; ambiguous records are rejected."""

from __future__ import annotations

import io
import json
import logging
import tarfile
import zipfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from florence_vl.data.readers import ImageStore, open_reader
from florence_vl.data.readers import images as images_module
from florence_vl.data.readers.conversation import from_row
from florence_vl.data.records import BadRecord, Record, bad_record_on_error, decode_text, normalize_messages, printable
from florence_vl.model.pictures import open_image


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLORENCE_VL_CACHE", str(tmp_path / "cache"))
    logging.getLogger("florence_vl.data.readers.conversation").disabled = True


def png():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (255, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


LLAVA = {
    "id": "a",
    "image": "a.png",
    "conversations": [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}],
}
CHAT = {
    "id": "b",
    "images": ["a.png"],
    "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]},
        {"role": "assistant", "content": "A"},
    ],
}
TEXTS = {"id": "c", "texts": [{"user": "Q", "assistant": "A"}]}

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("\ud83d") | st.just("../../x.png"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


@st.composite
def mutated(draw):
    row = json.loads(json.dumps(draw(st.sampled_from([LLAVA, CHAT, TEXTS]))))
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from([p for p in places(row) if p] or [()]))
        at = row
        for key in path[:-1]:
            at = at[key]
        if not path:
            continue
        if isinstance(at, dict) and draw(st.booleans()):
            del at[path[-1]]
        else:
            at[path[-1]] = draw(anything)
    return row


def read(reader, index):
    """A record that holds what `Record` promises, or None when it is counted as bad."""
    try:
        record = reader[index]
    except BadRecord as error:
        str(error).encode()
        return None
    assert isinstance(record, Record)
    record.id.encode()
    assert normalize_messages(record.messages) == record.messages
    assert record.num_image_parts == len(record.images)
    record.text().encode()
    return record


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(mutated(), min_size=1, max_size=8))
def test_mutated_records_are_read_or_bad_in_every_reader(tmp_path, rows):
    (tmp_path / "a.png").write_bytes(png())
    for name, first in (("llava", LLAVA), ("messages", CHAT)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in [first, *rows]))
        reader = open_reader(path, name)
        assert read(reader, 0) is not None
        for index in range(1, len(reader)):
            read(reader, index)
    folder = tmp_path / "folder"
    folder.mkdir(exist_ok=True)
    lines = [{"file_name": "a.png", "text": "A"}, *({"file_name": "a.png", **row} for row in rows)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    reader = open_reader(folder)
    assert [read(reader, index) is not None for index in range(1)] == [True]
    for index in range(1, len(reader)):
        read(reader, index)
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for number, row in enumerate(rows):
            for ending, data in (("png", png()), ("json", json.dumps(row).encode())):
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    reader = open_reader(tmp_path / "shard.tar")
    for index in range(len(reader)):
        read(reader, index)
    for row in rows:
        read_table(tmp_path / "t.parquet", row)


def read_table(path, row):
    """Read a row as a separate table if Arrow has types for it and its columns are a known layout."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    try:
        parquet.write_table(pa.Table.from_pylist([row]), path)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError, TypeError):
        return
    for options in ({}, {"caption": "id"}):
        try:
            reader = open_reader(path, **options)
        except ValueError:  # no known layout
            continue
        for index in range(len(reader)):
            read(reader, index)


def test_any_exception_of_a_record_is_a_bad_record():
    with pytest.raises(BadRecord, match="x: RecursionError: deep") as error, bad_record_on_error("x"):
        raise RecursionError("deep")
    assert error.value.kind == "unreadable"
    with pytest.raises(BadRecord, match=r"^own$"), bad_record_on_error("x"):
        raise BadRecord("image", "own")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**LLAVA, "video": "a.mp4"}, "'video', which is not supported"),
        ({**LLAVA, "images": ["b.png"]}, "under 'image' and under 'images'"),
        ({**CHAT, "tools": [{"name": "f"}]}, "'tools', which is not supported"),
        ({**CHAT, "images": [], "messages": [{"role": "user", "content": "<image>Q"}]}, "names no image"),
        ({**LLAVA, "conversations": [{**t, "weight": 0} for t in LLAVA["conversations"]]}, "weight=0"),
        ({**LLAVA, "conversations": [{"from": [], "value": "x"}]}, r"from \[\]"),
        ({**LLAVA, "conversations": [*LLAVA["conversations"], {"from": "human", "value": "\ud83d"}]}, "lone surrogate"),
        ({**LLAVA, "image": "../a.png"}, "is outside"),
        ({**LLAVA, "image": "/etc/passwd"}, "is outside"),
        ({**LLAVA, "image": "http://example.org/a.png"}, "is outside"),
    ],
)
def test_records_whose_meaning_is_not_used_are_bad(tmp_path, row, message):
    first = LLAVA if "conversations" in row else CHAT
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [first, row])))
    with pytest.raises(BadRecord, match=message):
        open_reader(tmp_path / "rows.jsonl")[1]


def test_deep_json_is_a_bad_record(tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        json.dumps(LLAVA) + '\n{"conversations": ' + "[" * 100_000 + "]" * 100_000 + "}"
    )
    with pytest.raises(BadRecord, match="nested too deeply"):
        open_reader(tmp_path / "rows.jsonl")[1]


def test_a_system_text_of_the_row_is_used_and_empty_image_keys_are_none(tmp_path):
    rows = [{**LLAVA, "system": "Be brief."}, {**LLAVA, "image": None, "images": ["a.png"]}]
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    reader = open_reader(tmp_path / "rows.jsonl")
    assert reader[0].text("system") == "Be brief."
    assert open_image(reader[1].images[0]).size == (8, 8)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "rows.jsonl").write_text(json.dumps({**LLAVA, "image": "../a.png"}))
    reader = open_reader(tmp_path / "outside" / "rows.jsonl", allow_outside=True)
    assert open_image(reader[0].images[0]).size == (8, 8)


def test_text_is_decoded_strictly():
    text = "A café, “red”"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        assert decode_text(text.encode(encoding), "x") == text
    for data in (text.encode("cp1252"), "一只红色的猫".encode("gbk"), "abc".encode("utf-16-le")):
        with pytest.raises(BadRecord, match=r"x .*convert it to UTF-8"):
            decode_text(data, "x")


def test_printable_text_has_no_control_characters_or_surrogates():
    assert printable("a\ud83d\x1b[31m é 漢\n") == "a\\ud83d\\x1b[31m é 漢\n"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (["a.png", "b.png", "a.txt", "b.txt"], r"'a' comes back with the member 'a\.txt'"),
        (
            ["a.1.png", "a.1.txt", "a.2.png", "a.2.txt"],
            r"two members 'a\.1\.txt' and 'a\.2\.txt'.*must not contain dots",
        ),
        (["a.png", "a.txt", "a.txt"], r"two members 'a\.txt' and 'a\.txt'"),
        (["a.png", "a.png", "a.txt"], r"two members 'a\.png' and 'a\.png'"),
    ],
)
def test_samples_of_a_shard_are_verified(tmp_path, members, message):
    write_tar(tmp_path / "s.tar", members)
    with pytest.raises(ValueError, match=rf"s\.tar: the sample .*{message}"):
        open_reader(tmp_path / "s.tar")


def test_hidden_members_are_left_out(tmp_path):
    write_tar(tmp_path / "s.tar", ["._a.png", "a.png", "a.txt", "__MACOSX/._b.png", "b.png", "b.txt"])
    reader = open_reader(tmp_path / "s.tar")
    assert [(record.id, len(record.images)) for record in (reader[0], reader[1])] == [("a", 1), ("b", 1)]


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name in members:
            data = png() if name.endswith("png") else b"A caption."
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damaged_zip_members_are_found_by_their_checksum(tmp_path, method):
    path = tmp_path / "i.zip"
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("x/a.png", bytes(range(256)) * 4)
    whole = path.read_bytes()
    for at in range(40, 70):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=r"damaged|truncated"):
            _content(ImageStore(path), "x/a.png")


def _content(store, name):
    found = store[name]
    return found if isinstance(found, bytes) else found.read()


def test_what_an_archive_inflates_to_is_bounded_and_near_names_are_told(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "i.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("train/a.png", bytes(1 << 20))
    monkeypatch.setattr(images_module, "MAX_IMAGE_BYTES", 1 << 16)
    with pytest.raises(BadRecord, match="larger than the limit"):
        ImageStore(tmp_path / "i.zip")["train/a.png"]
    with pytest.raises(BadRecord, match=r"holds 'train/a\.png'"):
        ImageStore(tmp_path / "i.zip")["coco/train/a.png"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        ("a.json", '{\n "data": [\n {"conversations": []}]}', "one JSON object over several lines"),
        ("a.jsonl", "{broken\n{}", "The first record must be readable"),
    ],
)
def test_files_of_another_shape_are_refused_with_the_cause(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        open_reader(tmp_path / name, "llava")
    assert not isinstance(error.value, BadRecord)


def test_a_folder_of_save_to_disk_is_refused_with_the_way_out(tmp_path):
    for name in ("dataset_info.json", "state.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=r"save_to_disk.*to_parquet"):
        open_reader(tmp_path)


def test_a_csv_row_that_is_wider_than_its_header_is_bad_and_not_cut(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    lines = ["file_name,text", 'a.png,"red, blue"', "a.png,red, blue", "a.png"]
    (tmp_path / "metadata.csv").write_bytes("\r\n".join(lines).encode())
    reader = open_reader(tmp_path)
    assert reader[0].text("assistant") == "red, blue"
    for index, message in ((1, "line 3 has 3 fields, the header has 2: put quotes"), (2, "has 1 fields")):
        with pytest.raises(BadRecord, match=message):
            reader[index]


def test_one_line_that_is_not_utf8_is_one_bad_record(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    good = json.dumps({"file_name": "a.png", "text": "café"}, ensure_ascii=False)
    lines = [good.encode(), good.encode("cp1252"), good.encode()]
    (tmp_path / "metadata.jsonl").write_bytes(b"\n".join(lines))
    reader = open_reader(tmp_path)
    assert [reader[index].text("assistant") for index in (0, 2)] == ["café", "café"]
    with pytest.raises(BadRecord, match=r"line 2 is not UTF-8"):
        reader[1]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-32-be", "utf-16"])
def test_json_is_utf8_and_nothing_else_is_guessed(tmp_path, encoding):
    (tmp_path / "a.jsonl").write_bytes(f"{json.dumps(LLAVA)}\n{json.dumps(LLAVA)}\n".encode(encoding))
    with pytest.raises(ValueError, match=r"convert it to UTF-8|contains NUL|neither a JSON list|invalid JSON"):
        open_reader(tmp_path / "a.jsonl", "llava")


@pytest.mark.parametrize("store", [False, True])
def test_what_stands_behind_the_end_of_a_tar_is_not_lost_silently(tmp_path, store):
    names = [f"{n}.{ending}" for n in range(4) for ending in ("png", "txt")]
    write_tar(tmp_path / "whole.tar", names)
    whole = (tmp_path / "whole.tar").read_bytes()
    header = whole.index(b"2.png") + 148  # the checksum of this member's header
    broken = {"header": whole[:header] + b"x" * 8 + whole[header + 8 :], "two": whole + whole, "tail": whole + b"x"}
    for name, data in broken.items():
        (tmp_path / f"{name}.tar").write_bytes(data)
        with pytest.raises(ValueError, match="damaged, or several archives in one"):
            ImageStore(tmp_path / f"{name}.tar") if store else open_reader(tmp_path / f"{name}.tar")


@pytest.mark.parametrize("further", [{"video": "a.mp4"}, {"system": "Be brief."}, {"tools": [{}]}])
def test_keys_beside_a_caption_that_change_its_meaning_make_it_bad(tmp_path, further):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    (tmp_path / "a.png").write_bytes(png())
    rows = [{"file_name": "a.png", "text": "A"}, {"file_name": "a.png", "text": "A", **further}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, data in (("a.png", png()), ("a.json", json.dumps({"caption": "A", **further}).encode())):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    column = {key: [json.dumps(value)] for key, value in further.items()}
    parquet.write_table(pa.table({"image": [png()], "text": ["A"], **column}), tmp_path / "t.parquet")
    readers = (
        open_reader(tmp_path, "folder"),
        open_reader(tmp_path / "s.tar"),
        open_reader(tmp_path / "t.parquet", caption="text"),
    )
    for reader, index in zip(readers, (1, 0, 0), strict=True):
        with pytest.raises(BadRecord, match="which is not supported"):
            reader[index]


@pytest.mark.parametrize("key", [{"weight": 0.5}, {"train": False}, {"mask": True}, {"reasoning_content": "so"}])
@pytest.mark.parametrize("layout", ["conversations", "messages", "texts"])
def test_weights_masks_and_reasoning_of_a_turn_are_not_ignored(key, layout):
    row = {"conversations": LLAVA, "messages": CHAT, "texts": TEXTS}[layout]
    row = json.loads(json.dumps(row))
    row[layout][-1] |= key
    with pytest.raises(BadRecord, match=next(iter(key))):
        from_row(row, layout, ["a.png"], ImageStore(None), "row")
    row[layout][-1] |= {name: type(value)(name not in ("mask", "reasoning_content")) for name, value in key.items()}
    row[layout][-1].pop("reasoning_content", None)
    from_row(row, layout, ["a.png"], ImageStore(None), "row")


def test_a_table_that_was_replaced_is_read_anew(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for answer in ("one", "two"):
        parquet.write_table(pa.table({"texts": [[{"user": "Q", "assistant": answer}]]}), tmp_path / "t.parquet")
        assert open_reader(tmp_path / "t.parquet")[0].text("assistant") == answer
