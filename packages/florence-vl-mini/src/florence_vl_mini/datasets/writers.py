"""Writes scenes in the formats of the readers: LLaVA JSONL with images, parquet, WebDataset."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from florence_vl.files import atomic_folder
from florence_vl.registry import did_you_mean
from florence_vl_mini.scenes import RECORD_TASKS, SceneGenerator

FORMATS = ("llava", "parquet", "webdataset")
SHARD = 1000  # samples per parquet file or tar


def encode_image(image: Image.Image) -> bytes:
    """JPEG of quality 92 without chroma subsampling, which keeps letters sharp."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()


def rows(generator: SceneGenerator, tasks: Sequence[str], samples: int) -> Iterator[dict[str, Any]]:
    """`samples` rows {id, task, kind, image (JPEG bytes), conversations (LLaVA)}; tasks take turns over scenes.

    Scenes without an annotation for a task are skipped.

    Raises:
        ValueError: An unknown task, or one for which the generator's kinds of scene have no annotation.
    """
    for task in tasks:
        if task not in RECORD_TASKS:
            raise ValueError(f"unknown task {task!r}. {did_you_mean(task, RECORD_TASKS)}")
    done, index, idle = 0, 0, 0
    while done < samples:
        scene = generator[index]
        task = tasks[index % len(tasks)]
        index += 1
        try:
            record = scene.record(task)
        except ValueError:
            idle += 1
            if idle > 1000 * len(tasks):
                raise ValueError(
                    f"no scene of the kinds {', '.join(generator.mix)} has an annotation for the task {task!r}"
                ) from None
            continue
        idle = 0
        talk = []
        for message in record["messages"]:
            text = "\n".join("<image>" if p["type"] == "image" else p["text"] for p in message["content"])
            talk.append({"from": "human" if message["role"] == "user" else "gpt", "value": text})
        yield {
            "id": record["id"],
            "task": task,
            "kind": scene.kind,
            "image": encode_image(scene.image),
            "conversations": talk,
        }
        done += 1


def write(
    out: str | Path,
    generator: SceneGenerator,
    samples: int,
    format: str = "llava",
    tasks: Sequence[str] = ("vqa",),
    overwrite: bool = False,
) -> Path:
    """Write a data set of scenes; the same arguments give the same files.

    Args:
        out: Folder to create. It appears when it is complete.
        generator: Source of the scenes.
        samples: Number of records.
        format: "llava" (data.jsonl, images/), "parquet" (Hugging Face's image layout) or "webdataset" (tars of .jpg and
            .json).
        tasks: Tasks of `Scene.record`, in turn.
        overwrite: Whether a data set that this function wrote earlier may be replaced.

    Returns:
        The path that a reader opens: the JSONL file, or the folder.

    Raises:
        ValueError: Unknown format or task, no samples requested, or `out` contains files that may not be replaced.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}. {did_you_mean(format, FORMATS)}")
    if samples < 1 or not tasks:
        raise ValueError(f"at least one sample and one task are needed, found {samples} and {list(tasks)}")
    out = Path(out)
    write_rows = {"llava": _llava, "parquet": _parquet, "webdataset": _webdataset}[format]
    with atomic_folder(out, overwrite=overwrite) as partial:
        write_rows(partial, rows(generator, tasks, samples))
    return out / "data.jsonl" if format == "llava" else out


def _llava(folder: Path, source: Iterator[dict[str, Any]]) -> None:
    (folder / "images").mkdir()
    with (folder / "data.jsonl").open("w") as file:
        for row in source:
            name = f"images/{row['id']}.jpg"
            (folder / name).write_bytes(row["image"])
            file.write(json.dumps({**row, "image": name}) + "\n")


def _shards(source: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    shard: list[dict[str, Any]] = []
    for row in source:
        shard.append(row)
        if len(shard) == SHARD:
            yield shard
            shard = []
    if shard:
        yield shard


def _parquet(folder: Path, source: Iterator[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    for number, shard in enumerate(_shards(source)):
        table = pa.Table.from_pylist(
            [{**row, "image": {"bytes": row["image"], "path": f"{row['id']}.jpg"}} for row in shard]
        )
        parquet.write_table(table, folder / f"scenes-{number:05d}.parquet", row_group_size=100)


def _webdataset(folder: Path, source: Iterator[dict[str, Any]]) -> None:
    for number, shard in enumerate(_shards(source)):
        with tarfile.open(folder / f"scenes-{number:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for row in shard:
                text = {k: v for k, v in row.items() if k != "image"}
                for suffix, data in (("jpg", row["image"]), ("json", json.dumps(text).encode())):
                    member = tarfile.TarInfo(f"{row['id'].replace('.', '_')}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
