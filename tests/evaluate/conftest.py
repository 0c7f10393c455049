"""Tiny files of all benchmarks, with the columns of the public data sets."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

OPTIONS = ["a cat", "a dog", "a pig"]


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> dict[str, Any]:
    """A cell of a Hugging Face image column."""
    file = io.BytesIO()
    Image.new("RGB", size, (seed * 37 % 256, seed * 91 % 256, seed * 53 % 256)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def _annotators(answer: str) -> list[dict[str, Any]]:
    return [{"answer": answer, "answer_confidence": "yes", "answer_id": i} for i in range(10)]


def tables() -> dict[str, list[dict[str, Any]]]:
    """Rows by file name (without `.parquet`); two or more questions each."""
    p = [picture(i) for i in range(4)]
    mmbench = [
        {
            "index": index,
            "question": "What is it?",
            "hint": hint,
            "answer": answer,
            "A": a,
            "B": b,
            "C": "a pig",
            "D": "nan",
            "category": "object",
            "image": p[index % 2],
            "source": "s",
            "L2-category": "l2",
            "comment": "nan",
            "split": "dev",
        }
        for index, hint, answer, a, b in (
            (1, "nan", "A", "a cat", "a dog"),
            (1_000_001, "nan", "B", "a dog", "a cat"),
            (2, "Look closely.", "A", "red", "blue"),
        )
    ]
    mmmu = {f"image_{i}": None for i in range(1, 8)}
    hallusion = {
        "category": "VD",
        "subcategory": "figure",
        "visual_input": "1",
        "set_id": "0",
        "sample_note": "",
        "gt_answer_details": "yes it is",
    }
    return {
        "vqav2_val": [
            {
                "question_type": "what",
                "multiple_choice_answer": "red",
                "answers": _annotators("red"),
                "image_id": 5,
                "answer_type": "other",
                "question_id": 50 + i,
                "question": "What colour is it?",
                "image": p[0],
            }
            for i in range(2)
        ],
        "gqa.testdev_balanced_instructions": [
            {
                "id": f"q{i}",
                "imageId": "n1",
                "question": "Which side is it on?",
                "answer": "left",
                "fullAnswer": "It is left.",
            }
            for i in range(2)
        ],
        "gqa.testdev_balanced_images": [{"id": "n0", "image": p[0]}, {"id": "n1", "image": p[1]}],
        "mmbench_en_dev": mmbench,
        "mmbench_cn_dev": mmbench,
        "vizwiz_vqa_val": [
            {
                "question_id": f"VizWiz_{i}",
                "image": p[i],
                "question": "what IS this?",
                "answers": ["can"] * 10,
                "category": "other",
            }
            for i in range(2)
        ],
        "pope": [
            {
                "id": str(i),
                "question_id": str(i),
                "question": " Is there a dog in the image? ",
                "answer": ("yes", "no")[i % 2],
                "image_source": f"COCO_{i // 2}",
                "image": p[i // 2],
                "category": "adversarial",
            }
            for i in range(4)
        ],
        "mmvet": [
            {
                "question_id": f"v1_{i}",
                "image": p[i],
                "image_source": "s",
                "question": "What is x?",
                "answer": "-1<AND>-5",
                "capability": "ocr,math",
            }
            for i in range(2)
        ],
        "mme": [
            {
                "question_id": f"count/{i // 2}.png",
                "image": p[i // 2],
                "question": "Is there one dog? Please answer yes or no.",
                "answer": ("Yes", "No")[i % 2],
                "category": ("count", "code_reasoning")[i // 2],
            }
            for i in range(4)
        ],
        "seedbench": [
            {
                "answer": "B",
                "choice_a": "a cat",
                "choice_b": "a dog",
                "choice_c": "a pig",
                "choice_d": "a cow",
                "data_id": f"d{i}",
                "data_type": ("image", "image", "video")[i],
                "question": "What is it?",
                "question_id": str(i),
                "question_type_id": 1,
                "image": [p[i]],
                "segment": None,
            }
            for i in range(3)
        ],
        "hallusion_bench_image": [
            hallusion
            | {
                "figure_id": str(i % 2),
                "question_id": str(i // 2),
                "question": "Is it longer?",
                "gt_answer": "1",
                "filename": f"{i % 2}.png",
                "image": p[i % 2],
            }
            for i in range(4)
        ],
        "llava_in_the_wild": [
            {
                "question_id": i,
                "question": "Describe it.",
                "image": p[i],
                "category": ("conv", "detail")[i],
                "caption": "A picture.",
                "gpt_answer": "It is a picture.",
                "image_id": f"{i}.jpg",
            }
            for i in range(2)
        ],
        "mmstar": [
            {
                "index": i,
                "question": "What is it?\nOptions: A: a cat, B: a dog, C: a pig, D: a cow ",
                "image": p[i],
                "answer": "B",
                "category": "math",
                "l2_category": "geometry",
                "meta_info": {"source": "s", "split": "val"},
            }
            for i in range(2)
        ],
        "textvqa_val": [
            {
                "image_id": "t",
                "question_id": i,
                "question": "what is the Brand?",
                "question_tokens": ["what"],
                "image": p[0],
                "image_width": 40,
                "image_height": 30,
                "flickr_original_url": "",
                "flickr_300k_url": "",
                "answers": ["nokia"] * 10,
                "image_classes": ["x"],
                "set_name": "val",
                "ocr_tokens": ["nokia"],
            }
            for i in range(2)
        ],
        "ocrbench": [
            {
                "dataset": ("IIIT5K", "HME100k")[i],
                "question": "What is written? ",
                "question_type": "Regular Text Recognition",
                "answer": ["STOP"],
                "image": p[i],
            }
            for i in range(2)
        ],
        "chartqa": [
            {"type": ("human_test", "augmented_test")[i], "question": "How many?", "answer": "100", "image": p[i]}
            for i in range(2)
        ],
        "docvqa_val": [
            {
                "questionId": str(i),
                "question": "What is the date?",
                "question_types": ["layout"],
                "image": p[0],
                "docId": 7,
                "ucsf_document_id": "u",
                "ucsf_document_page_no": "1",
                "answers": ["May 1", "1 May"],
                "data_split": "val",
            }
            for i in range(2)
        ],
        "infovqa_val": [
            {
                "questionId": str(i),
                "question": "How many?",
                "answers": ["12%"],
                "answer_type": ["single span"],
                "image": p[i],
                "image_url": "",
                "operation/reasoning": [],
                "ocr": "",
                "data_split": "val",
            }
            for i in range(2)
        ],
        "ai2d": [{"question": "Which eats grass?", "options": OPTIONS, "answer": "1", "image": p[i]} for i in range(2)],
        "mathvista_testmini": [
            {
                "pid": str(i),
                "question": "How long?",
                "image": f"images/{i}.jpg",
                "decoded_image": p[i],
                "choices": (None, None, ["3/11", "8/11"])[i],
                "unit": ("cm", None, None)[i],
                "precision": (None, 1.0, None)[i],
                "answer": ("14", "0.6", "8/11")[i],
                "question_type": ("free_form", "free_form", "multi_choice")[i],
                "answer_type": ("integer", "float", "text")[i],
                "metadata": {"category": "math", "split": "testmini"},
                "query": "Hint ...",
            }
            for i in range(3)
        ],
        "mmmu_val": [
            mmmu
            | {
                "id": "validation_Art_Theory_1",
                "question": "<image 1> Which is it, given <image 2>?",
                "options": "['a cat', 'a dog']",
                "explanation": "",
                "image_1": p[0],
                "image_2": p[1],
                "img_type": "",
                "answer": "B",
                "topic_difficulty": "Easy",
                "question_type": "multiple-choice",
                "subfield": "x",
            },
            mmmu
            | {
                "id": "validation_Math_2",
                "question": "How many in <image 1>?",
                "options": "[]",
                "explanation": "",
                "image_1": p[2],
                "image_2": None,
                "img_type": "",
                "answer": "14",
                "topic_difficulty": "Easy",
                "question_type": "open",
                "subfield": "x",
            },
        ],
        "scienceqa_img": [
            {
                "image": p[i],
                "question": "Which is it?",
                "choices": OPTIONS,
                "answer": 1,
                "hint": ("", "Figure: a farm.")[i],
                "task": "t",
                "grade": "g",
                "subject": "s",
                "topic": "t",
                "category": "c",
                "skill": "s",
                "lecture": "l",
                "solution": "s",
            }
            for i in range(2)
        ],
        "realworldqa": [
            {
                "image": p[0],
                "question": "Which?\nA. a cat\nB. a dog\nAnswer with only the letter of the correct option.",
                "answer": "B",
            },
            {"image": p[1], "question": "How many cars? ", "answer": "2"},
        ],
        "cv_bench": [
            {
                "idx": i,
                "type": ("2D", "2D", "3D")[i],
                "task": "Count",
                "image": p[i],
                "question": "How many?",
                "choices": ["1", "2", "3"],
                "answer": "(B)",
                "prompt": "How many? Select from:\n(A) 1\n(B) 2\n(C) 3",
                "filename": f"{i}.png",
                "source": ("ADE20K", "COCO", "Omni3D")[i],
                "source_dataset": "s",
                "source_filename": "f",
                "target_class": None,
                "target_size": None,
                "bbox": None,
            }
            for i in range(3)
        ],
        "mmvp": [
            {
                "Index": i + 1,
                "Question": "Is it open?",
                "Options": "(a) Open (b) Closed",
                "Correct Answer": ("(a)", "(b)")[i],
                "image": p[i],
            }
            for i in range(2)
        ],
    }


def write(folder: Path, files: dict[str, list[dict[str, Any]]]) -> Path:
    """Write rows as `<name>.parquet` files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet", row_group_size=2)
    return folder


@pytest.fixture(scope="session")
def benchmark_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny files of all benchmarks of the suite `paper`."""
    return write(tmp_path_factory.mktemp("benchmarks"), tables())


@pytest.fixture(scope="session")
def benchmark_tables() -> dict[str, list[dict[str, Any]]]:
    """The rows in `benchmark_folder`."""
    return tables()
