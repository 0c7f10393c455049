"""The data sets that Florence-VL was trained on, by name: location, layout and license.

Nothing is downloaded here: an entry describes what to download, and `open_dataset(name, path)` reads the download with
the correct reader, columns and filters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from florence_vl.data.readers import READERS, Filter, Reader, WebDatasetReader, files, guess_reader, open_reader
from florence_vl.registry import Registry, plugins


@dataclass(frozen=True)
class Dataset:
    """Description of a data set.

    Args:
        name: Registered name.
        hub_id: Repository on the Hugging Face Hub.
        files: Files to download.
        records: Stated number of records; None if no count is published.
        columns: Columns or keys of a record.
        images: Where a record's images are, and what to download for them.
        licence: License of the annotations, as stated by the publisher.
        commercial: Whether the license allows commercial use; None if it is not stated for all of the data.
        layouts: Reader name -> its options; the first that fits the path is used.
        folder: Folder of the repository with the files; a complete download is read from there.
        note: Remarks for training.
        revision: Commit that the authors of Florence-VL used, if they named one.
    """

    name: str
    hub_id: str
    files: tuple[str, ...]
    records: int | None
    columns: tuple[str, ...]
    images: str
    licence: str
    commercial: bool | None
    layouts: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"llava": {}})
    note: str = ""
    folder: str | None = None
    revision: str | None = None

    @property
    def url(self) -> str:
        """Its page on the Hub."""
        return f"https://huggingface.co/datasets/{self.hub_id}"


DATASETS: Registry[Dataset] = Registry("data set")


def _add(dataset: Dataset) -> None:
    DATASETS.register(dataset.name)(dataset)


_LLAVA_KEYS = ("id", "image", "conversations")
_SHAREGPT4V_IMAGES = (
    "relative paths coco/train2017, llava/llava_pretrain/images, sam/images; {more}fetch each collection apart and "
    "give their common root as image_root"
)

_PIXELPROSE_TEXT: dict[str, Any] = {
    "caption": "vlm_caption",
    "filters": (Filter("status", "==", "success"), Filter("vlm_caption", "filled")),
    "strip_prefixes": ("This image displays",),
}
_add(
    Dataset(
        name="pixelprose",
        hub_id="tomg-group-umd/pixelprose",
        files=("data/vlm_captions_{common-pool,cc12m,redcaps}_*.parquet (9.8 GB)",),
        records=16_896_423,
        columns=(
            *("uid", "url", "key", "status", "original_caption", "vlm_model", "vlm_caption", "toxicity"),
            *("severe_toxicity", "obscene", "identity_attack", "insult", "threat", "sexual_explicit"),
            *("watermark_class_id", "watermark_class_score", "aesthetic_score", "error_message", "width", "height"),
            *("exif", "sha256"),
        ),
        images=(
            "URL only: fetch with img2dataset. As WebDataset tars (with --caption_col vlm_caption, or save the columns "
            "uid, status, vlm_caption) the tars are the data; images that were saved under their uid are read by the "
            "table: <image_root>/<uid>.jpg (option image_template)"
        ),
        licence="CC-BY-4.0 (annotations)",
        commercial=True,
        layouts={
            "parquet": {**_PIXELPROSE_TEXT, "image_template": "{uid}.jpg", "id_column": "uid"},
            "webdataset": _PIXELPROSE_TEXT,
        },
        note=(
            "rows whose status is not 'success' or whose caption is empty are left out; the opening ' This image "
            "displays' is cut; original_caption is alt text and not used. Published: CommonPool 6,539,107, CC12M "
            "9,066,455, RedCaps 1,290,861"
        ),
    )
)
_add(
    Dataset(
        name="sharegpt4v-cap100k",
        hub_id="Lin-Chen/ShareGPT4V",
        files=("sharegpt4v_instruct_gpt4-vision_cap100k.json (134 MB)",),
        records=102_025,
        columns=_LLAVA_KEYS,
        images=_SHAREGPT4V_IMAGES.format(more="also gqa, ocr_vqa, textvqa, vg, wikiart, web-*; "),
        licence="CC-BY-NC-4.0 and OpenAI's terms",
        commercial=False,
    )
)
_add(
    Dataset(
        name="sharegpt4v-share-captioner",
        hub_id="Lin-Chen/ShareGPT4V",
        files=("share-captioner_coco_lcs_sam_1246k_1107.json (1.49 GB)",),
        records=1_246_901,
        columns=_LLAVA_KEYS,
        images=_SHAREGPT4V_IMAGES.format(more=""),
        licence="CC-BY-NC-4.0 and OpenAI's terms",
        commercial=False,
    )
)
_add(
    Dataset(
        name="sharegpt4v-mix665k",
        hub_id="Lin-Chen/ShareGPT4V",
        files=("sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json (1.23 GB)",),
        records=None,
        columns=_LLAVA_KEYS,
        images=_SHAREGPT4V_IMAGES.format(more="also gqa, ocr_vqa, textvqa, vg, wikiart, web-*; "),
        licence="CC-BY-NC-4.0 and OpenAI's terms",
        commercial=False,
        note="LLaVA's 665K with 23K of its captions replaced; holds text-only rows",
    )
)
_add(
    Dataset(
        name="llava-pretrain-558k",
        hub_id="liuhaotian/LLaVA-Pretrain",
        files=("blip_laion_cc_sbu_558k.json (181 MB)", "images.zip (27.4 GB)"),
        records=558_128,
        columns=_LLAVA_KEYS,
        images="names like 00453/004539375.jpg inside images.zip, which need not be unpacked: image_root=images.zip",
        licence="other (terms of CC-3M, LAION, SBU and BLIP)",
        commercial=None,
    )
)
_add(
    Dataset(
        name="llava-instruct-665k",
        hub_id="liuhaotian/LLaVA-Instruct-150K",
        files=("llava_v1_5_mix665k.json (1.03 GB)",),
        records=665_298,
        columns=_LLAVA_KEYS,
        images=(
            "relative paths coco/train2017, gqa/images, ocr_vqa/images, textvqa/train_images, vg/VG_100K(_2); "
            "fetch each apart and give their common root as image_root"
        ),
        licence="CC-BY-4.0 and OpenAI's terms",
        commercial=None,
        note=(
            "40,688 rows are text only; some files of VG_100K_2 are unreadable (skipped and counted); most original "
            "links of OCR-VQA are dead: its images are mirrored at ej2/llava-ocr-vqa"
        ),
    )
)
_add(
    Dataset(
        name="cambrian-7m",
        hub_id="nyu-visionx/Cambrian-10M",
        revision="a087b923",
        files=("jsons/Cambrian7M_withsystemprompt.jsonl", "<collection>.tar[.gz][_partN]"),
        records=None,
        columns=(*_LLAVA_KEYS, "source"),
        images=(
            "relative to the folder into which the tars are extracted; tars that are not compressed may be given as "
            "image_root (a list) as they are; join split parts (cat x.tar.gz_part* > x.tar.gz) and decompress them"
        ),
        licence="Apache-2.0 by its tag; the collections differ (ALLaVA is non-commercial)",
        commercial=None,
        note="about 7.07 million rows; `source` names the collection; text-only rows exist (orca_math, wizardlm)",
    )
)
_add(
    Dataset(
        name="vision-flan",
        hub_id="Vision-Flan/vision-flan",
        revision="e8c6f097",
        files=("vision_flan.json (983 MB)", "shard_01 ... shard_09 (run.sh, unzip.sh)"),
        records=1_664_261,
        columns=("conversations", "id", "task_name", "image"),
        images="relative path below the unpacked shards (shard_0N/raw_dataset)",
        licence="each of the 187 tasks has its own; none for the whole",
        commercial=None,
        note="the full version, which the paper's stage 2 uses",
    )
)
_add(
    Dataset(
        name="vision-flan-191",
        hub_id="Vision-Flan/vision-flan_191-task_1k",
        files=("annotation_191-task_1k.json (110 MB)", "image_191-task_1k.zip (36.3 GB)"),
        records=None,
        columns=("conversations", "id", "task_name", "image"),
        images="file name inside image_191-task_1k.zip, which need not be unpacked: image_root=image_191-task_1k.zip",
        licence="each task has its own; none for the whole",
        commercial=None,
        note="about 186 thousand rows, 1,000 a task",
    )
)
_add(
    Dataset(
        name="docmatix",
        hub_id="HuggingFaceM4/Docmatix",
        files=("data/train-*.parquet (1,106 shards of 380 to 407 MB, about 440 GB)",),
        records=1_273_215,
        columns=("images", "texts"),
        images="bytes in the parquet files; all question-answer pairs of a row share its pages",
        licence="MIT",
        commercial=True,
        layouts={"parquet": {}},
        folder="data",
        note=(
            "a record is a document with its pages and all its pairs; the authors used a copy of single pages. The "
            "configs pdf and zero-shot-exp lie in folders of those names and are not read"
        ),
    )
)
_RATINGS = ("relevance", "image_correspondence", "visual_dependency", "formatting")
_add(
    Dataset(
        name="finevision",
        hub_id="HuggingFaceM4/FineVision",
        files=("<subset>/train-*.parquet, one folder for each of its collections",),
        records=None,
        columns=("images", "texts", "source", *(f"{name}_ratings" for name in _RATINGS)),
        images="bytes in the parquet files; text-only rows have none",
        licence="each collection has its own; none for the whole",
        commercial=None,
        layouts={"parquet": {"source_column": "source"}},
        note=(
            "each turn has ratings from 1 to 5 (relevance, image_correspondence, visual_dependency, formatting); "
            "min_ratings={relevance: 3} leaves out the turns below"
        ),
    )
)
_add(
    Dataset(
        name="the-cauldron",
        hub_id="HuggingFaceM4/the_cauldron",
        files=("<subset>/train-*.parquet, one folder for each of its 50 collections",),
        records=None,
        columns=("images", "texts"),
        images="bytes in the parquet files",
        licence="each collection has its own; CC-BY-4.0 for the prompts",
        commercial=None,
        layouts={"parquet": {}},
        note="each pair of texts names its collection under `source`",
    )
)


def writers() -> dict[str, tuple[str, ...]]:
    """The `florence-vl` command that writes each data set of the installed packages; append `--out FOLDER`."""
    return {name: words for point in plugins("datasets").values() for name, words in point.load()().items()}


def open_dataset(name: str, path: str | Path, **options: Any) -> Reader:
    """Open a reader of a known data set.

    Args:
        name: Name in `DATASETS`.
        path: The downloaded annotation file, folder or glob; local or fsspec URL.
        options: Arguments of the reader, e.g. `image_root`; they override those of the entry.

    Raises:
        FileNotFoundError: The path does not exist.
        ValueError: The data set is unknown (similar names are suggested), or the path has another layout.
    """
    dataset = DATASETS[name]
    if dataset.folder is not None and files.is_folder(files.join(path, dataset.folder)):
        path = files.join(path, dataset.folder)
    guessed = guess_reader(path)
    if guessed not in dataset.layouts:
        raise ValueError(
            f"{path} looks like {guessed!r}; data set {name!r} is read as {' or '.join(map(repr, dataset.layouts))}. "
            f"Expected from {dataset.url}: {', '.join(dataset.files)}"
        )
    own = dict(dataset.layouts[guessed])
    if guessed == "webdataset" and "caption" in own and "caption" not in options:
        own |= _renamed_caption(path, own)
    return open_reader(path, guessed, **{"name": name, **own, **options})


def _renamed_caption(path: str | Path, own: Mapping[str, Any]) -> dict[str, Any]:
    """Options for shards with the caption under `caption`, where img2dataset stores it (--caption_col renames the
    column).

    Raises:
        ValueError: `caption` contains other text than the data set's captions.
    """
    column = own["caption"]
    plain = open_reader(path, "webdataset", caption="caption")
    assert isinstance(plain, WebDatasetReader)
    rows = [row for index in range(min(len(plain), 20)) if (row := plain.json(index))]
    if not rows or any(column in row for row in rows):
        return {}
    opening = tuple(prefix.split()[0] for prefix in own.get("strip_prefixes", ()))
    texts = [str(row["caption"]).strip() for row in rows if row.get("caption")]
    if not texts or sum(text.startswith(opening) for text in texts) * 2 < len(texts):
        raise ValueError(
            f"{path}: the samples have neither {column!r} nor captions like the data set's under 'caption': fetch with "
            f"--caption_col {column}, or save the column {column}"
        )
    filters = tuple(replace(f, column="caption") if f.column == column else f for f in own.get("filters", ()))
    return {"caption": "caption", "filters": filters}


__all__ = ["DATASETS", "READERS", "Dataset", "open_dataset", "writers"]
