"""Images of all kinds give the same pixels as a plain PIL reference; corrupt images are rejected by name."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from florence_vl.data.records import ImageRef
from florence_vl.model.image_processing import FlorenceVLImageProcessor
from florence_vl.model.pictures import open_image, pad_and_resize

MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])


def noise(width, height, mode="RGB", seed=0):
    bands = len(Image.new(mode, (1, 1)).getbands())
    data = np.random.default_rng(seed).integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.fromarray(data.squeeze(-1) if bands == 1 else data, mode)


def encode(image, format, **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, format, **kwargs)
    return buffer.getvalue()


def reference(image, side, background=(123, 116, 103)):
    """LLaVA's expand2square, resize and normalize as a plain reference implementation."""
    longest = max(image.size)
    square = Image.new("RGB", (longest, longest), background)
    square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    pixels = np.asarray(square.resize((side, side), Image.Resampling.BICUBIC)) / 255.0
    return ((pixels - MEAN) / STD).transpose(2, 0, 1).astype(np.float32)


def test_tiles_are_completed():
    images = FlorenceVLImageProcessor(size=64, tiles={"max": 4, "size": 64})
    assert images.tiles == {"max": 4, "global": True, "size": 64}


@pytest.mark.parametrize("size", [(200, 120), (120, 200), (96, 96), (301, 299), (640, 3), (3, 640), (1, 1)])
def test_pad_equals_plain_pil(size):
    image = noise(*size)
    got = FlorenceVLImageProcessor(size=64)(image, return_tensors="pt").pixel_values
    assert got.shape == (1, 3, 64, 64)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got[0].numpy(), reference(image, 64), atol=1e-6)


def test_tall_images_are_padded_in_strips(monkeypatch):
    image = noise(7, 900)
    whole = pad_and_resize(image, (32, 32), (123, 116, 103))
    monkeypatch.setattr("florence_vl.model.pictures._STRIP_PIXELS", 900 * 11)
    assert np.array_equal(np.asarray(whole), np.asarray(pad_and_resize(image, (32, 32), (123, 116, 103))))


def test_padding_has_the_mean_colour_and_other_towers_bring_theirs():
    black = Image.new("RGB", (100, 10))
    pixels = FlorenceVLImageProcessor(size=20)(black, return_tensors="np").pixel_values[0]
    np.testing.assert_allclose(pixels[:, 0, 0], (np.array([123, 116, 103]) / 255 - MEAN) / STD, atol=1e-6)
    clip = FlorenceVLImageProcessor(size=20, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5])
    np.testing.assert_allclose(clip(black, return_tensors="np").pixel_values[0, :, 0, 0], 127 / 127.5 - 1, atol=1e-6)


def test_squash_ignores_the_aspect_ratio():
    image = noise(90, 30)
    processor = FlorenceVLImageProcessor(size={"height": 32, "width": 64}, image_aspect_ratio="squash")
    got = processor(image, return_tensors="np").pixel_values[0]
    plain = np.asarray(image.resize((64, 32), Image.Resampling.BICUBIC)) / 255.0
    np.testing.assert_allclose(got, ((plain - MEAN) / STD).transpose(2, 0, 1), atol=1e-6)


def test_default_is_768_bicubic_imagenet():
    processor = FlorenceVLImageProcessor()
    assert processor(noise(20, 30), return_tensors="pt").pixel_values.shape == (1, 3, 768, 768)
    assert processor.resample == Image.Resampling.BICUBIC
    assert tuple(processor.image_mean) == tuple(MEAN)


def test_save_and_load(tmp_path):
    processor = FlorenceVLImageProcessor(size=96, image_aspect_ratio="squash", image_mean=[0.1, 0.2, 0.3])
    processor.save_pretrained(tmp_path)
    again = FlorenceVLImageProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == processor.to_dict()
    image = noise(50, 20)
    assert torch.equal(
        again(image, return_tensors="pt").pixel_values, processor(image, return_tensors="pt").pixel_values
    )


def test_torchvision_is_not_imported():
    assert "torchvision" not in sys.modules


@pytest.mark.parametrize(
    "options", [{"image_aspect_ratio": "padd"}, {"size": {"shortest_edge": 64}}], ids=["aspect", "size"]
)
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError, match=r"pad|height and width"):
        FlorenceVLImageProcessor(**options)


def test_float_arrays_are_refused_and_uint8_arrays_taken():
    processor = FlorenceVLImageProcessor(size=32)
    image = noise(40, 20)
    expected = processor(image, return_tensors="pt").pixel_values
    assert torch.equal(processor(np.asarray(image), return_tensors="pt").pixel_values, expected)
    with pytest.raises(ValueError, match="uint8"):
        processor(np.asarray(image, dtype=np.float32) / 255, return_tensors="pt")


# ---------------------------------------------------------------- open_image


def test_exif_orientation_is_applied():
    image = noise(40, 20)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated by 90 degrees clockwise
    data = encode(image, "PNG", exif=exif)
    got = open_image(data)
    assert got.size == (20, 40)
    assert np.array_equal(np.asarray(got), np.asarray(image.rotate(-90, expand=True)))


def test_palette_and_its_transparency():
    image = noise(16, 16).quantize(8)
    assert np.array_equal(np.asarray(open_image(encode(image, "PNG"))), np.asarray(image.convert("RGB")))
    see_through = open_image(encode(image, "PNG", transparency=image.getpixel((3, 4))))
    assert see_through.getpixel((3, 4)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_composited_on_white(mode):
    image = Image.new(mode, (4, 4), (0,) * (len(mode) - 1) + (0,))
    assert open_image(encode(image, "PNG")).getpixel((0, 0)) == (255, 255, 255)
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert open_image(half).getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey(mode):
    image = noise(9, 9, "L").convert(mode)
    assert np.array_equal(np.asarray(open_image(encode(image, "PNG"))), np.asarray(image.convert("RGB")))


def test_16_bit_is_scaled_not_clipped():
    levels = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    got = np.asarray(open_image(encode(Image.fromarray(levels), "PNG")))
    assert got[0, :, 0].tolist() == [0, 1, 128, 255]
    assert got.shape == (1, 4, 3)


def test_float_tiff():
    levels = np.array([[0.0, 0.5, 1.0]], dtype=np.float32)
    assert np.asarray(open_image(encode(Image.fromarray(levels), "TIFF")))[0, :, 0].tolist() == [0, 128, 255]
    with pytest.raises(ValueError, match="floating-point"):
        open_image(Image.fromarray(np.array([[np.nan, 1.0]], dtype=np.float32)))


def test_cmyk_jpeg():
    image = Image.new("RGB", (32, 32), (200, 30, 60)).convert("CMYK")
    got = np.asarray(open_image(encode(image, "JPEG", quality=95))).mean((0, 1))
    np.testing.assert_allclose(got, (200, 30, 60), atol=4)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    data = encode(
        frames[0], format, save_all=True, append_images=frames[1:], **({"lossless": True} if format == "WEBP" else {})
    )
    assert open_image(data).getpixel((4, 4)) == (255, 0, 0)


def test_sources(tmp_path):
    image = noise(12, 8)
    data = encode(image, "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(data)
    (tmp_path / "shard.tar").write_bytes(b"x" * 100 + data + b"y" * 50)
    import base64

    sources = [
        path,
        str(path),
        data,
        image,
        np.asarray(image),
        ImageRef(str(tmp_path / "shard.tar"), 100, len(data)),
        "data:image/png;base64," + base64.b64encode(data).decode(),
    ]
    for source in sources:
        assert np.array_equal(np.asarray(open_image(source)), np.asarray(image)), source
    processor = FlorenceVLImageProcessor(size=32)
    expected = processor(image, return_tensors="pt").pixel_values
    for source in sources:
        assert torch.equal(processor([source], return_tensors="pt").pixel_values, expected)


@pytest.mark.parametrize("lenient", [False, True])
def test_truncated_and_other_files_are_refused_by_name(tmp_path, monkeypatch, lenient):
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", lenient)  # as lmms-eval does when imported
    jpeg = encode(noise(200, 200), "JPEG")
    png = encode(noise(200, 200), "PNG")
    files = {
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "cut.png": png[: len(png) // 2],
        "head.png": png[:40],
        "text.jpg": b"<html>not found</html>",
        "empty.jpg": b"",
        "noise.png": png[:60] + bytes(1000) + png[1060:],
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            open_image(tmp_path / name)
        with pytest.raises(ValueError, match="record 7"):
            open_image(data, name="record 7")
    with pytest.raises(ValueError, match="directory"):
        open_image(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent"):
        open_image(tmp_path / "absent.jpg")
    with pytest.raises(ValueError, match="int"):
        open_image(7)
    with pytest.raises(ValueError, match="base64"):
        open_image("data:image/png;base64,@@@")


def test_decompression_bombs_are_refused_before_decoding(tmp_path, monkeypatch):
    import struct
    import zlib

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path = tmp_path / "bomb.png"
    path.write_bytes(png + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")))
    with pytest.raises(ValueError, match=r"bomb\.png"):
        open_image(path)
    monkeypatch.setattr("florence_vl.model.pictures.MAX_PIXELS", 99)
    with pytest.raises(ValueError, match="limit of 99"):
        open_image(noise(10, 10))


def test_a_broken_exif_block_does_not_refuse_the_image():
    image = noise(10, 10)
    image.info["exif"] = b"Exif\x00\x00garbage"
    assert open_image(image).size == (10, 10)


def test_exif_of_a_pil_image_reaches_the_processor():
    image = noise(40, 20)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.open(io.BytesIO(encode(image, "PNG", exif=exif)))
    processor = FlorenceVLImageProcessor(size=32)
    expected = processor(ImageOps.exif_transpose(turned), return_tensors="pt").pixel_values
    assert torch.equal(processor(turned, return_tensors="pt").pixel_values, expected)


def test_paths_as_path_objects(tmp_path):
    noise(10, 10).save(tmp_path / "x.png")
    assert open_image(Path(tmp_path / "x.png")).size == (10, 10)
