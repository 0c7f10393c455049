"""Open images safely: which formats and sources are allowed, and the size limits.

Formats are an allow-list, so that Pillow starts no other program and no rare decoder. Limits are checked from the
header, before memory is allocated. http(s) URLs are disabled unless a `MediaPolicy` names their domains.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import contextvars
import http.client
import io
import ipaddress
import math
import os
import re
import socket
import ssl
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, Union, runtime_checkable
from urllib.parse import quote, unquote, urljoin, urlsplit

import numpy as np
from PIL import Image, ImageFile, ImageOps, TiffImagePlugin

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF")
"""Allowed formats, by Pillow's names, if this build of Pillow supports them."""


def _limit(variable: str, default: int) -> int:
    text = os.environ.get(variable, "")
    if not text:
        return default
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"the environment variable {variable} must be a number of pixels, found {text!r}")
    if Image.MAX_IMAGE_PIXELS is not None:  # Pillow refuses twice this number
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, int(text))
    return int(text)


MAX_PIXELS = _limit("FLORENCE_VL_MAX_PIXELS", 120_000_000)
"""Larger images are refused. The environment variable FLORENCE_VL_MAX_PIXELS changes the limit.

Formats whose decoders need more memory or time per pixel have a lower limit, see `_DECODER_WEIGHT`.
"""

REDUCED_PIXELS = 1 << 25
"""JPEG images with more pixels are decoded at half their width and height."""

MAX_FILE_BYTES = 512 << 20
"""Larger image files are refused: some decoders read the whole file."""

MAX_ASPECT, MAX_STRIP = 200, 10_000
"""Images are refused if the longer side has more than MAX_STRIP pixels and more than MAX_ASPECT times the shorter."""

TRANSPARENT_ON = (255, 255, 255)
"""Color behind transparent pixels: white, as most figures with an alpha channel are drawn for a white page."""

# By format, or by the decoder that Pillow chose: WebP and AVIF need twice the memory of others, and PPM with a depth
# other than 8 bits and run-length BMP are decoded in Python.
_DECODER_WEIGHT = {"WEBP": 2, "AVIF": 2, "bmp_rle": 8, "ppm": 32, "ppm_plain": 32}
_MAX_TILE = 1 << 24  # pixels of a tile of a TIFF, which is decoded whole even if the image is small
_MAX_SCANS = 200  # of a JPEG: each takes a pass over the whole image, even with few bytes
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # except stuffed bytes and restart markers
_STRIP_PIXELS = 1 << 24  # pixels that are converted or padded at a time
_MAX_REDIRECTS = 3
_URL_SAFE = "/%?#:@!$&'()*+,;=~[]"  # characters of a URL that are not percent-encoded
_HEADER_BYTES = 1 << 16


@dataclass(frozen=True)
class MediaPolicy:
    """Allowed sources of images.

    Attributes:
        allowed_paths: Folders whose files may be opened; None allows every path, for programs that open the user's own
            files, and an empty tuple none.
        allowed_domains: Hosts from which http(s) URLs are fetched; a name that begins with a dot includes its
            subdomains. Empty by default: nothing is fetched.
        max_bytes: Maximum size of an encoded image.
        timeout: Seconds per URL, including redirects.
        allow_private: Also fetch from addresses that are not public, for tests on loopback.

    Raises:
        ValueError: A domain is not the name of a host.
    """

    allowed_paths: tuple[Path, ...] | None = None
    allowed_domains: tuple[str, ...] = ()
    max_bytes: int = 32 << 20
    timeout: float = 10.0
    allow_private: bool = False

    def __post_init__(self) -> None:
        for domain in self.allowed_domains:
            # two colons or more: an IPv6 address
            if re.search(r"[/*@\[\]\s]|^$|\.$", domain) or domain.count(":") == 1:
                raise ValueError(
                    f"the domain {domain!r} would match no URL: give the host alone, without scheme, port, path or *, "
                    "for example example.org, or .example.org for its subdomains"
                )


OWN_FILES = MediaPolicy()
"""Default: every local file, no network."""

UPLOADS = MediaPolicy(allowed_paths=())
"""Encoded bytes and data: URLs only, for servers with untrusted clients."""

_policy: contextvars.ContextVar[MediaPolicy] = contextvars.ContextVar("media_policy", default=OWN_FILES)


@contextlib.contextmanager
def media_policy(policy: MediaPolicy) -> Iterator[None]:
    """Use another policy for `open_image` inside a `with` block."""
    token = _policy.set(policy)
    try:
        yield
    finally:
        _policy.reset(token)


@runtime_checkable
class ReadableImage(Protocol):
    """An object that returns the bytes of an encoded image, such as `florence_vl.data.records.ImageRef`."""

    def read(self) -> bytes:
        """The encoded bytes."""
        ...


ImageInput = Union[str, os.PathLike, bytes, bytearray, memoryview, Image.Image, np.ndarray, ReadableImage]  # noqa: UP007


def image_name(source: Any) -> str:
    """Name of an image source for messages: its path or URL, or a description."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"<image of {len(source)} bytes>"
    if isinstance(source, Image.Image):
        return str(getattr(source, "filename", "") or f"<{source.mode} image of {source.width}x{source.height}>")
    if isinstance(source, np.ndarray):
        return f"<array of shape {source.shape}>"
    text = str(source)
    return text if len(text) <= 300 else f"{text[:60]}... ({len(text)} characters)"


def open_image(
    source: ImageInput,
    name: str | None = None,
    policy: MediaPolicy | None = None,
    max_pixels: int | None = None,
) -> Image.Image:
    """Decode an image to upright RGB.

    Handles EXIF orientation (of a PNG, if it is before the pixels), palettes, alpha (composited on white), grayscale,
    16 and 32 bit, CMYK and animations (first frame).

    Args:
        source: A local path, a `data:image/...` or `file:` URL, an http(s) URL that the policy allows, encoded bytes, a
            PIL image, a uint8 array (H, W, 3 or 4), or an object with `read() -> bytes`.
        name: Name for messages; by default that of `image_name`.
        policy: Allowed sources; by default those of the enclosing `media_policy`, otherwise every local file.
        max_pixels: What is left of a limit for several images; also checked before the image is decoded.

    Returns:
        The decoded image, mode RGB, at its own size.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The source is not an image of an allowed format, is damaged, truncated or too large, or the policy
            does not allow it. The message names the source.
    """
    name = name or image_name(source)
    try:
        image = _open(source, policy or _policy.get())
        _check_size(image)
        if max_pixels is not None and image.width * image.height > max_pixels:
            raise ValueError(
                f"it has {image.width}x{image.height} pixels, but only {max_pixels} are left of the limit for all "
                "images together"
            )
        if _is_jpeg(image):
            _check_scans(image)
            if _is_reduced(image):
                image.draft(None, (image.width // 2, image.height // 2))
        oriented = _has_exif(image)
        with _refuse_truncated():
            image.load()
        return _to_rgb(_upright(image, own=image is not source) if oriented else image)
    except FileNotFoundError:
        raise FileNotFoundError(f"no such image file: {name}") from None
    except MemoryError as error:
        raise ValueError(f"cannot read image {name}: out of memory") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, EOFError, ...
        raise ValueError(f"cannot read image {name}: {_reason(error)}") from error


@contextlib.contextmanager
def _refuse_truncated() -> Iterator[None]:
    # Pillow's flag is global to the process, and lmms-eval sets it on import.
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def image_size(source: ImageInput, policy: MediaPolicy | None = None) -> tuple[int, int]:
    """(height, width) in pixels of the image that `open_image` returns, read from its header if the source is encoded.

    Raises:
        FileNotFoundError, ValueError: As in `open_image`.
    """
    name = image_name(source)
    try:
        image = _open_header(source, policy or _policy.get())
        _check_size(image)
        width, height = image.size
        if _is_jpeg(image) and _is_reduced(image):
            width, height = (width + 1) // 2, (height + 1) // 2
        tags = getattr(image, "tag_v2", None)
        if tags is not None:  # Pillow's size of a TIFF is upright or not, depending on its version
            if tags.get(0x0112) in (5, 6, 7, 8):
                height, width = tags[256], tags[257]
        elif _has_exif(image):
            with contextlib.suppress(Exception):  # unreadable EXIF says nothing about the pixels
                if image.getexif().get(0x0112) in (5, 6, 7, 8):
                    width, height = height, width
        return height, width
    except FileNotFoundError:
        raise FileNotFoundError(f"no such image file: {name}") from None
    except Exception as error:
        raise ValueError(f"cannot read image {name}: {_reason(error)}") from error


def _has_exif(image: Image.Image) -> bool:
    """Whether EXIF data is read: not that behind the pixels of a PNG, which Pillow finds by decoding it."""
    return image.format != "PNG" or "exif" in image.info


def _open_header(source: ImageInput, policy: MediaPolicy) -> Image.Image:
    """As `_open`, of the first bytes where these are enough: what lies in an archive is not read whole."""
    head = getattr(source, "head", None)
    if head is not None:
        with contextlib.suppress(Exception):  # the header is longer, or the file is broken: the whole of it tells
            return _identify(head(_HEADER_BYTES))
    return _open(source, policy)


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if width == 0 or height == 0:
        raise ValueError(f"it is empty ({width}x{height} pixels)")
    decoders = [str(tile[0]) for tile in getattr(image, "tile", ())[:1]]
    weight = max(_DECODER_WEIGHT.get(name, 1) for name in (image.format or "", *decoders))
    limit = MAX_PIXELS // weight
    if width * height > limit:
        kind = f" for {image.format} of this kind" if weight > 1 else ""
        raise ValueError(
            f"it has {width}x{height} pixels, more than the limit of {limit}{kind} (FLORENCE_VL_MAX_PIXELS changes it)"
        )
    tags = getattr(image, "tag_v2", None) or {}
    tile = tags.get(TiffImagePlugin.TILEWIDTH, 0) * tags.get(TiffImagePlugin.TILELENGTH, 0)
    if tile > _MAX_TILE:
        raise ValueError(f"its tiles have {tile} pixels each, more than the limit of {_MAX_TILE}")
    if max(width, height) > max(MAX_STRIP, MAX_ASPECT * min(width, height)):
        raise ValueError(f"it has {width}x{height} pixels: one side is more than {MAX_ASPECT} times the other")


def _is_jpeg(image: Image.Image) -> bool:
    return image.format in ("JPEG", "MPO") and getattr(image, "fp", None) is not None  # None: it was decoded before


def _is_reduced(jpeg: Image.Image) -> bool:
    return jpeg.width * jpeg.height > REDUCED_PIXELS


def _check_scans(image: Any) -> None:
    position = image.fp.tell()
    image.fp.seek(0)
    data = image.fp.read()
    image.fp.seek(position)
    scans, at = 0, 2
    while (marker := _JPEG_MARKER.search(data, at)) and data[marker.start() + 1] != 0xD9:
        scans += data[marker.start() + 1] == 0xDA
        if scans > _MAX_SCANS:
            raise ValueError(f"it has more than {_MAX_SCANS} scans")
        at = marker.end() + max(2, int.from_bytes(data[marker.end() : marker.end() + 2], "big"))


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return f"not an image of a supported format ({', '.join(FORMATS)})"
    return str(error) or type(error).__name__


def _open(source: ImageInput, policy: MediaPolicy) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        return Image.fromarray(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _identify(bytes(source))
    if isinstance(source, str) and source.startswith("data:"):
        return _identify(_decode_data_url(source, policy.max_bytes))
    if isinstance(source, str) and source.lower().startswith(("http://", "https://")):
        return _identify(fetch(source, policy))
    if isinstance(source, str) and source.startswith("file:"):
        source = _path_of(source)
    if isinstance(source, (str, os.PathLike)):
        return Image.open(_allowed_path(Path(source), policy), formats=_known_formats())
    if isinstance(source, ReadableImage):
        return _identify(source.read())
    raise ValueError(f"expected a path, bytes, a PIL image or an array, found {type(source).__name__}")


def _identify(data: bytes) -> Image.Image:
    if not data:
        raise ValueError("it is empty (0 bytes)")
    return Image.open(io.BytesIO(data), formats=_known_formats())


@lru_cache(maxsize=1)
def _known_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _path_of(url: str) -> str:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise ValueError(f"a file: URL must name a local file, found the host {parts.netloc!r}")
    return unquote(parts.path)


def _allowed_path(path: Path, policy: MediaPolicy) -> Path:
    if policy.allowed_paths is not None:
        real = path.resolve()
        if not any(real.is_relative_to(folder.resolve()) for folder in policy.allowed_paths):
            raise ValueError("local files are not allowed, or not from this folder")
        path = real
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise ValueError("it is a directory")
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a regular file")  # a named pipe would block
    if status.st_size > MAX_FILE_BYTES:
        raise ValueError(f"it has {status.st_size} bytes, more than the limit of {MAX_FILE_BYTES}")
    return path


def _decode_data_url(url: str, max_bytes: int) -> bytes:
    header, _, payload = url.partition(",")
    if not header.endswith(";base64"):
        raise ValueError("a data: URL must be base64 (data:image/png;base64,...)")
    if len(payload) > math.ceil(max_bytes / 3) * 4:
        raise ValueError(f"it has more than {max_bytes} bytes")
    try:
        return base64.b64decode(payload, validate=True)
    except binascii.Error as error:
        raise ValueError(f"its base64 is invalid ({error})") from error


# ------------------------------------------------------------------ network


def fetch(url: str, policy: MediaPolicy) -> bytes:
    """Fetch the bytes of an http(s) URL that the policy allows.

    The host is resolved once, all of its addresses must be public, and the connection uses the checked address. Each
    redirect is checked in the same way.

    Raises:
        ValueError: Not allowed, not public, too large, too slow, or a status other than 200.
    """
    deadline = time.monotonic() + policy.timeout
    for _ in range(_MAX_REDIRECTS + 1):
        status, location, body = _get(url, policy, deadline)
        if status in (301, 302, 303, 307, 308) and location:
            url = urljoin(url, location)
            continue
        if status != 200:
            raise ValueError(f"the server answered {status}")
        return body
    raise ValueError(f"more than {_MAX_REDIRECTS} redirects")


def _get(url: str, policy: MediaPolicy, deadline: float) -> tuple[int, str, bytes]:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"a redirect to {parts.scheme or 'nothing'}: only http and https are fetched")
    if parts.username or parts.password:
        raise ValueError("a URL with a user name or a password is not fetched")
    host = parts.hostname.rstrip(".").lower()
    _check_domain(host, policy)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    address = _resolve(host, port, policy)
    connection = _Pinned(host, port, address, parts.scheme == "https", _left(deadline))
    try:
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request(
            "GET", quote(path, safe=_URL_SAFE), headers={"Accept": "image/*", "User-Agent": "florence-vl"}
        )
        answer = connection.getresponse()
        if answer.status != 200:
            # http.client decodes header bytes as Latin-1
            location = quote(answer.getheader("Location") or "", safe=_URL_SAFE, encoding="latin-1")
            return answer.status, location, b""
        return 200, "", _read(answer, connection, policy.max_bytes, deadline)
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"cannot fetch it: {error or type(error).__name__}") from error
    finally:
        connection.close()


def _check_domain(host: str, policy: MediaPolicy) -> None:
    for domain in policy.allowed_domains:
        domain = domain.lower()
        if host == domain or (domain.startswith(".") and host.endswith(domain)):
            return
    if not policy.allowed_domains:
        raise ValueError("http(s) URLs are not fetched; download the picture, or allow its domain")
    raise ValueError(f"the domain {host!r} is not among the allowed ones ({', '.join(policy.allowed_domains)})")


def _resolve(host: str, port: int, policy: MediaPolicy) -> str:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(f"cannot resolve {host!r}: {error}") from error
    addresses = [str(entry[4][0]) for entry in found]
    for address in addresses:
        if not policy.allow_private and not is_public(address):
            raise ValueError(f"{host!r} resolves to {address}, which is not a public address")
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether an IP address is reachable from the public internet; embedded IPv4 addresses are checked themselves."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        if ip.sixtofour is not None or ip.teredo is not None or ip in ipaddress.ip_network("64:ff9b::/96"):
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


class _Pinned(http.client.HTTPConnection):
    """A connection to the checked address, whatever the name resolves to now."""

    def __init__(self, host: str, port: int, address: str, tls: bool, timeout: float) -> None:
        super().__init__(host, port, timeout=timeout)
        self._address, self._tls = address, tls

    def connect(self) -> None:
        self.sock = socket.create_connection((self._address, self.port), self.timeout)
        if self._tls:
            self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise ValueError("it took too long")
    return left


def _read(answer: http.client.HTTPResponse, connection: _Pinned, max_bytes: int, deadline: float) -> bytes:
    body = bytearray()
    while len(body) <= max_bytes:
        if connection.sock is not None:
            connection.sock.settimeout(_left(deadline))
        chunk = answer.read1(1 << 16)
        _left(deadline)
        if not chunk:
            return bytes(body)
        body += chunk
    raise ValueError(f"it has more than {max_bytes} bytes")


# ------------------------------------------------------------------ pixels


def _upright(image: Image.Image, own: bool) -> Image.Image:
    """The image rotated as its EXIF data specifies; a copy unless it is our own, which saves memory."""
    try:
        if own:
            ImageOps.exif_transpose(image, in_place=True)
            return image
        return ImageOps.exif_transpose(image)
    except Exception:  # an unreadable EXIF header does not affect the pixels
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    scale = _float_scale(image) if image.mode == "F" else 1.0
    if image.width * image.height <= _STRIP_PIXELS:
        return _convert(image, scale)
    canvas = Image.new("RGB", image.size)
    step = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, step):
        strip = image.crop((0, top, image.width, min(top + step, image.height)))
        strip.info = image.info
        canvas.paste(_convert(strip, scale), (0, top))
    return canvas


def _float_scale(image: Image.Image) -> float:
    levels = np.asarray(image)
    low, high = float(levels.min()), float(levels.max())
    if not np.isfinite(levels).all() or low < 0 or high > 255:
        raise ValueError("its floating-point pixels are outside [0, 1] and [0, 255], or not finite")
    return 255.0 if high <= 1 else 1.0


def _convert(image: Image.Image, scale: float) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grayscale: "I;16", "I;16B", or "I" in older Pillow
        levels = np.asarray(image.convert("I") if image.mode != "I" else image)
        return Image.fromarray((levels.clip(0, 65535) / 257.0).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        return Image.fromarray((np.asarray(image) * scale).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (*TRANSPARENT_ON, 255))
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")


def data_url(image: Image.Image, kind: str = "png", longest: int | None = None) -> str:
    """An image as a `data:` URL.

    Args:
        image: The image; written as RGB, with white behind transparent pixels.
        kind: `png` or `jpeg`.
        longest: Longest side in pixels; larger images are reduced.
    """
    image = _to_rgb(image)
    if longest is not None:
        image = image.copy()
        image.thumbnail((longest, longest))
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 85} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


# Pillow's filters: half of the width in source pixels at scale 1.
_SUPPORT = {
    Image.Resampling.NEAREST: 0.0,
    Image.Resampling.BOX: 0.5,
    Image.Resampling.BILINEAR: 1.0,
    Image.Resampling.HAMMING: 1.0,
    Image.Resampling.BICUBIC: 2.0,
    Image.Resampling.LANCZOS: 3.0,
}


def pad_and_resize(
    image: Image.Image,
    size: tuple[int, int],
    background: tuple[int, int, int],
    resample: int = Image.Resampling.BICUBIC,
    proportions: tuple[int, int] = (1, 1),
) -> Image.Image:
    """Center an image on the smallest square, or other rectangle, that holds it, and resize that.

    Equals LLaVA's `expand2square` followed by `Image.resize` pixel for pixel, without creating the square: Pillow
    resamples rows first and columns second, so the two passes can be made separately, and only where the image is.

    Args:
        image: RGB image of any size.
        size: Height and width of the result, px.
        background: Color of the padding.
        resample: Pillow's filter.
        proportions: Height to width of the rectangle.

    Returns:
        RGB image of `size`.
    """
    height, width = size
    full_height = max(image.height, round(image.width * proportions[0] / proportions[1]))
    full_width = max(image.width, round(image.height * proportions[1] / proportions[0]))
    if (full_width, full_height) == image.size:
        return image.resize((width, height), resample)
    canvas = Image.new("RGB", (width, full_height), background)
    if full_width == image.width:
        canvas.paste(image.resize((width, image.height), resample), (0, (full_height - image.height) // 2))
    else:
        _paste_columns(canvas, image, full_width, background, resample)
    return canvas.resize((width, height), resample)


def _paste_columns(
    canvas: Image.Image, image: Image.Image, side: int, background: tuple[int, int, int], resample: int
) -> None:
    """Resample the rows of an image centered on a rectangle `side` wide, at the columns that the image affects."""
    width = canvas.width
    scale = side / width
    support = _SUPPORT[Image.Resampling(resample)] * max(scale, 1.0)
    left = (side - image.width) // 2
    first = max(0, math.floor((left - support) / scale) - 1)
    last = min(width, math.ceil((left + image.width + support) / scale) + 1)
    # The source columns that affect these output columns, as the box of a strip.
    start = max(0, math.floor(first * scale - support) - 1)
    end = min(side, math.ceil(last * scale + support) + 1)
    box = (first * scale - start, last * scale - start)
    step = max(1, _STRIP_PIXELS // (end - start))
    for top in range(0, image.height, step):
        bottom = min(top + step, image.height)
        strip = Image.new("RGB", (end - start, bottom - top), background)
        strip.paste(image.crop((0, top, image.width, bottom)), (left - start, 0))
        rows = strip.resize((last - first, bottom - top), resample, box=(box[0], 0, box[1], bottom - top))
        canvas.paste(rows, (first, top))
