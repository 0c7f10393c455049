"""Image input checks: formats, limits, files and network."""

import http.server
import io
import os
import struct
import subprocess
import sys
import threading
import zlib

import numpy as np
import pytest
from PIL import Image

from florence_vl.model import pictures
from florence_vl.model.image_processing import FlorenceVLImageProcessor
from florence_vl.model.pictures import (
    UPLOADS,
    MediaPolicy,
    data_url,
    fetch,
    image_size,
    is_public,
    media_policy,
    open_image,
)


def png(width=4, height=3, color=(1, 2, 3)):
    file = io.BytesIO()
    Image.new("RGB", (width, height), color).save(file, "PNG")
    return file.getvalue()


def test_eps_is_not_opened_whatever_its_name(tmp_path):
    file = tmp_path / "holiday.jpg"
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(ValueError, match="supported format"):
        open_image(file)


@pytest.mark.parametrize("format", ["PCX", "SGI", "ICNS", "IM", "MSP"])
def test_rare_formats_are_not_decoded(format):
    file = io.BytesIO()
    mode, size = ("1", (64, 64)) if format == "MSP" else ("RGB", (64, 64))
    Image.new(mode, size).save(file, format)
    with pytest.raises(ValueError, match="supported format"):
        open_image(file.getvalue())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_named_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match="not a regular file"):
        open_image(tmp_path / "pipe.png")


def test_limits_are_checked_from_the_header(monkeypatch):
    loaded, small, narrow = [], png(), png(1, 300)
    monkeypatch.setattr(Image.Image, "load", lambda self: loaded.append(self))
    monkeypatch.setattr(pictures, "MAX_PIXELS", 11)
    with pytest.raises(ValueError, match="4x3 pixels, more than the limit of 11"):
        open_image(small)
    monkeypatch.setattr(pictures, "MAX_PIXELS", 10**9)
    monkeypatch.setattr(pictures, "MAX_STRIP", 100)
    with pytest.raises(ValueError, match="more than 200 times"):
        open_image(narrow)
    assert loaded == []


def test_decoders_that_are_slow_or_take_more_memory_have_lower_limits(monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PIXELS", 64)
    deep, plain, webp = (b"P6 3 2 65535\n" + bytes(36), b"P3 3 2 255\n" + b"1 " * 18, io.BytesIO())
    Image.new("RGB", (8, 5)).save(webp, "WEBP")
    for data, limit in ((deep, 2), (plain, 2), (webp.getvalue(), 32)):
        with pytest.raises(ValueError, match=f"more than the limit of {limit} for"):
            open_image(data)
    assert open_image(b"P6 3 2 255\n" + bytes(18)).size == (3, 2)


def tiff(tile):
    """A TIFF of 16 x 16 gray pixels in one tile of `tile` x `tile`."""
    data = zlib.compress(bytes(tile * tile))
    tags = [(256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (277, 1), (322, tile), (323, tile), (324, 0)]
    tags.append((325, len(data)))
    start = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, start if tag == 324 else value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


def test_what_is_left_of_a_common_limit_is_checked_from_the_header(monkeypatch):
    small = png()
    assert open_image(small, max_pixels=12).size == (4, 3)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it is decoded"))
    with pytest.raises(ValueError, match="4x3 pixels, but only 11 are left of the limit"):
        open_image(small, max_pixels=11)


def test_a_data_url_is_white_behind_transparent_pixels():
    for image in (Image.new("RGBA", (8, 4), (0, 0, 0, 0)), Image.new("LA", (8, 4), (0, 0))):
        assert open_image(data_url(image)).getpixel((0, 0)) == (255, 255, 255)
    image = Image.new("RGB", (8, 4), (1, 2, 3))
    assert open_image(data_url(image, longest=4)).size == (4, 2)
    assert image.size == (8, 4)


def test_a_tile_larger_than_its_image_is_refused(monkeypatch):
    assert open_image(tiff(64)).size == (16, 16)
    monkeypatch.setattr(pictures, "_MAX_TILE", 64 * 64 - 1)
    with pytest.raises(ValueError, match="its tiles have 4096 pixels each"):
        open_image(tiff(64))


def test_a_jpeg_of_very_many_scans_is_refused(tmp_path):
    file = io.BytesIO()
    Image.new("L", (64, 64), 90).save(file, "JPEG", progressive=True, exif=b"Exif\0\0" + b"\xff\xda" * 300)
    data = file.getvalue()
    assert open_image(data).size == (64, 64), "what looks like scans inside metadata is none"
    first = data.rindex(b"\xff\xda")
    header = data[first : first + 2 + int.from_bytes(data[first + 2 : first + 4], "big")]
    (tmp_path / "scans.jpg").write_bytes(data[:-2] + header * 300 + data[-2:])
    for source in (tmp_path / "scans.jpg", (tmp_path / "scans.jpg").read_bytes()):
        with pytest.raises(ValueError, match="more than 200 scans"):
            open_image(source)


def test_large_jpegs_are_reduced_while_decoding(monkeypatch):
    file = io.BytesIO()
    Image.new("RGB", (81, 43), (200, 10, 10)).save(file, "JPEG", quality=95)
    whole = open_image(file.getvalue())
    monkeypatch.setattr(pictures, "REDUCED_PIXELS", 81 * 43 - 1)
    half = open_image(file.getvalue())
    assert (whole.size, half.size) == ((81, 43), (41, 22))
    assert image_size(file.getvalue()) == (22, 41), "the planned number of tokens is that of the decoded image"
    assert image_size(half) == (22, 41)
    assert np.abs(np.asarray(half, dtype=int) - (200, 10, 10)).max() < 6


def test_a_large_file_is_refused_before_it_is_read(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(png())
    monkeypatch.setattr(pictures, "MAX_FILE_BYTES", 10)
    with pytest.raises(ValueError, match="more than the limit of 10"):
        open_image(tmp_path / "a.png")


@pytest.mark.parametrize(("value", "message"), [("200000000", "(13000, 15000)"), ("1e9", "must be a number of pixels")])
def test_the_environment_sets_the_limit(tmp_path, value, message):
    Image.new("1", (15000, 13000)).save(tmp_path / "large.png")
    code = f"from florence_vl.model.pictures import image_size; print(image_size({str(tmp_path / 'large.png')!r}))"
    environment = {**os.environ, "FLORENCE_VL_MAX_PIXELS": value}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert message in done.stdout + done.stderr


MEASURE = """
import sys
from pathlib import Path
from florence_vl.model import pictures
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
pictures._STRIP_PIXELS = 1 << 20
before = peak()
image = pictures.open_image(sys.argv[1])
print(peak() - before, image.width * image.height)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize(
    ("format", "mode", "options"),
    [
        ("PNG", "RGBA", {"compress_level": 1}),
        ("PNG", "I;16", {"compress_level": 1}),
        ("JPEG", "RGB", {}),
        ("JPEG", "CMYK", {"progressive": True, "subsampling": 0}),
        ("WEBP", "RGBA", {"lossless": True, "method": 0, "quality": 0}),
        ("GIF", "P", {}),
        ("BMP", "RGB", {}),
        ("DIB", "RGB", {}),
        ("TIFF", "F", {"compression": "tiff_adobe_deflate"}),
        ("TIFF", "RGBA", {"compression": "tiff_lzw"}),
        ("PPM", "RGB", {}),
        ("AVIF", "RGBA", {"speed": 10, "subsampling": "4:4:4"}),
    ],
)
def test_the_largest_allowed_picture_of_each_format_stays_below_2_gb(tmp_path, format, mode, options):
    """Measured at 6 megapixels, an eighth of a strip's share, and taken to the format's limit."""
    path = tmp_path / "picture"
    Image.new(mode, (3000, 2000), None if mode == "P" else 0).save(path, format, **options)
    command = [sys.executable, "-c", MEASURE, str(path)]
    grown, pixels = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    limit = pictures.MAX_PIXELS // pictures._DECODER_WEIGHT.get(format, 1)
    assert pixels == 6_000_000
    assert grown * 1024 / pixels * limit < 1.7e9, "leaves 300 MB for the program"
    assert grown * 1024 / pixels > 3, "the picture itself was measured"


@pytest.mark.parametrize("mode", ["RGBA", "I;16", "F", "CMYK", "P", "LA"])
def test_conversion_in_strips_is_the_same(mode, monkeypatch):
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 255, (30, 20, 4), dtype=np.uint8)
    if mode == "F":
        image = Image.fromarray(levels[..., 0].astype(np.float32))
    elif mode == "I;16":
        image = Image.fromarray(levels[..., 0].astype(np.uint16) * 257)
    else:
        image = Image.fromarray(levels).convert(mode)
    whole = open_image(image)
    monkeypatch.setattr(pictures, "_STRIP_PIXELS", 20 * 7)
    assert np.array_equal(np.asarray(whole), np.asarray(open_image(image)))


@pytest.mark.parametrize("size", [(30, 700), (3, 900), (1, 997), (299, 301), (500, 777)])
@pytest.mark.parametrize("resample", list(Image.Resampling))
def test_tall_images_are_resized_as_their_square(size, resample):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
    square = Image.new("RGB", (max(size), max(size)), (9, 8, 7))
    square.paste(image, ((max(size) - size[0]) // 2, (max(size) - size[1]) // 2))
    expected = square.resize((48, 40), resample)
    found = pictures.pad_and_resize(image, (40, 48), (9, 8, 7), resample)
    assert np.array_equal(np.asarray(expected), np.asarray(found))


def test_tall_images_touch_no_more_pixels_than_wide_ones(monkeypatch):
    made, new = [], Image.new

    def count(mode, size, *rest):
        made.append(size[0] * size[1])
        return new(mode, size, *rest)

    monkeypatch.setattr(Image, "new", count)
    pictures.pad_and_resize(new("RGB", (270, 3000)), (256, 256), (0, 0, 0))
    assert sum(made) < 3 * 270 * 3000, "the square has 3000 x 3000"


def test_sizes_come_from_the_header_upright():
    assert image_size(png(5, 7)) == (7, 5)
    file = io.BytesIO()
    turned = Image.new("RGB", (6, 4))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(file, "JPEG", exif=exif)
    assert image_size(file.getvalue()) == (6, 4)
    assert open_image(file.getvalue()).size == (4, 6)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["TIFF", "JPEG", "PNG", "WEBP"])
def test_the_size_from_the_header_is_that_of_the_opened_image(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.new("RGB", (6, 4)).save(file, format, exif=exif.tobytes())
    data = [file.getvalue()]
    if format == "PNG":  # the same with the EXIF chunk behind the pixels, where it is not read
        start = data[0].index(b"eXIf") - 4
        end = start + 12 + int.from_bytes(data[0][start : start + 4], "big")
        rest = data[0][:start] + data[0][end:]
        data.append(rest[:-12] + data[0][start:end] + rest[-12:])
        assert open_image(data[1]).size == (6, 4)
    for source in [*data, Image.open(file)]:
        assert image_size(source) == open_image(source).size[::-1] == image_size(source)
    assert open_image(data[0]).size == ((4, 6) if orientation > 4 else (6, 4))


def test_files_only_below_the_allowed_folders(tmp_path):
    (tmp_path / "in").mkdir()
    inside, outside = tmp_path / "in" / "a.png", tmp_path / "b.png"
    inside.write_bytes(png())
    outside.write_bytes(png())
    (tmp_path / "in" / "link.png").symlink_to(outside)
    policy = MediaPolicy(allowed_paths=(tmp_path / "in",))
    assert open_image(inside, policy=policy).size == (4, 3)
    assert open_image(f"file://{inside}", policy=policy).size == (4, 3)
    for path in (outside, tmp_path / "in" / ".." / "b.png", tmp_path / "in" / "link.png", f"file://{outside}"):
        with pytest.raises(ValueError, match="not from this folder"):
            open_image(path, policy=policy)
    with pytest.raises(ValueError, match="not allowed"):
        open_image(inside, policy=UPLOADS)
    with pytest.raises(ValueError, match="must name a local file"):
        open_image("file://other/x.png")


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700:4700::1111", True),
        ("127.0.0.1", False),
        ("10.0.0.1", False),
        ("169.254.169.254", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("100.64.0.1", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:169.254.169.254", False),
        ("2002:7f00:1::", False),
        ("64:ff9b::7f00:1", False),
    ],
)
def test_public_addresses(address, public):
    assert is_public(address) is public


class Handler(http.server.BaseHTTPRequestHandler):
    """Pictures, redirects and bad answers; counts what it is asked."""

    asked: list[str] = []

    def do_GET(self):
        self.asked.append(self.path)
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
            self.end_headers()
        elif self.path == "/raw":  # UTF-8 as it is
            self.send_response(302)
            self.send_header("Location", "/caf\u00e9.png".encode().decode("latin-1"))
            self.end_headers()
        elif self.path == "/big.png":
            self.send_response(200)
            self.end_headers()
            for _ in range(64):
                self.wfile.write(b"x" * 4096)
        elif self.path == "/ok.png":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(png())
        else:
            self.send_response(404)
            self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    Handler.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


def test_nothing_is_fetched_unasked(server):
    for policy in (None, UPLOADS):
        with pytest.raises(ValueError, match="not fetched; download the picture, or allow its domain"):
            open_image(f"{server}/ok.png", policy=policy)
    with pytest.raises(ValueError, match="not among the allowed ones"):
        open_image(f"{server}/ok.png", policy=MediaPolicy(allowed_domains=("example.com", ".example.org")))
    with pytest.raises(ValueError, match="not a public address"):
        open_image(f"{server}/ok.png", policy=MediaPolicy(allowed_domains=("127.0.0.1",)))
    with pytest.raises(ValueError, match="download the picture"):
        FlorenceVLImageProcessor().fetch_images([f"{server}/ok.png"])
    assert Handler.asked == []


def test_allowed_addresses_are_fetched_and_redirects_checked(server):
    policy = MediaPolicy(allowed_domains=("127.0.0.1",), allow_private=True, max_bytes=10_000)
    assert open_image(f"{server}/ok.png", policy=policy).size == (4, 3)
    with media_policy(policy):
        assert FlorenceVLImageProcessor().fetch_images(f"{server}/to/{server}/ok.png").size == (4, 3)
    for path, message in [
        ("/to/http://localhost/ok.png", "not among the allowed"),
        ("/to/file:///etc/hostname", "only http and https"),
        ("/to/to/to/to/to/to/ok.png", "answered 404|redirects"),
        ("/big.png", "more than 10000 bytes"),
        ("/none.png", "answered 404"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_image(f"{server}{path}", policy=policy)
    with pytest.raises(ValueError, match="user name"):
        fetch("http://a:b@127.0.0.1/", policy)
    with pytest.raises(ValueError, match="took too long"):
        fetch(f"{server}/ok.png", MediaPolicy(allowed_domains=("127.0.0.1",), allow_private=True, timeout=0))


def test_other_characters_of_a_url_are_percent_encoded(server):
    policy = MediaPolicy(allowed_domains=("127.0.0.1",), allow_private=True)
    for path in ("/caf\u00e9.png?q=\u00e9 x", "/raw", "/caf%C3%A9.png"):
        with pytest.raises(ValueError, match="answered 404"):
            fetch(f"{server}{path}", policy)
    assert Handler.asked == ["/caf%C3%A9.png?q=%C3%A9%20x", "/raw", "/caf%C3%A9.png", "/caf%C3%A9.png"]


@pytest.mark.parametrize("domain", ["https://a.org", "a.org/", "a.org:443", "*.a.org", "a.org.", "[::1]", ""])
def test_domains_that_match_nothing_are_refused(domain):
    with pytest.raises(ValueError, match="give the host alone"):
        MediaPolicy(allowed_domains=("b.org", domain))
    assert MediaPolicy(allowed_domains=("a.org", ".a.org", "b\u00fccher.example", "::1")).allowed_domains


def test_a_name_is_resolved_once_and_the_checked_address_is_used(server, monkeypatch):
    answers = iter([[(2, 1, 6, "", ("8.8.8.8", 80))]])
    monkeypatch.setattr(pictures.socket, "getaddrinfo", lambda *args, **kwargs: next(answers))
    reached = []

    def connect(address, timeout):
        reached.append(address)
        raise OSError("no route")

    monkeypatch.setattr(pictures.socket, "create_connection", connect)
    with pytest.raises(ValueError, match="no route"):
        fetch("http://pictures.example.com/a.png", MediaPolicy(allowed_domains=(".example.com",)))
    assert reached == [("8.8.8.8", 80)]


def test_every_address_of_a_name_must_be_public(monkeypatch):
    found = [(2, 1, 6, "", ("8.8.8.8", 80)), (2, 1, 6, "", ("10.0.0.7", 80))]
    monkeypatch.setattr(pictures.socket, "getaddrinfo", lambda *args, **kwargs: found)
    with pytest.raises(ValueError, match=r"10\.0\.0\.7, which is not a public address"):
        fetch("http://example.com/a.png", MediaPolicy(allowed_domains=("example.com",)))
