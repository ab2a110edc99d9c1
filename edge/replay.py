"""`scanside replay`: an MRD client that streams a file to a server and saves the images that come back."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import socket
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from edge.header import read_header
from edge.mrd import DEFAULT_LIMITS, IMAGE_HEADER, Image, MessageId, next_message, read_image, read_text
from edge.mrd_write import encode_close, encode_config_file, encode_header
from edge.rawfile import RawFile, open_raw
from edge.undersample import undersample
from recon.arrays import Array
from recon.errors import AcquisitionError, DeliveryError, ScanError, StreamError

DEFAULT_ADDRESS = "127.0.0.1:9002"
DEFAULT_ACS = 24

_CONNECT_TRIES, _CONNECT_S = 5, 10.0
_SIEMENS_TICK_S, _TICK_S = 2.5e-3, 1e-3
_ORDER = ("set", "repetition", "phase", "contrast", "average", "slice", "image_index")


@dataclass
class Replayed:
    """What came back, in the order of arrival. Times are in seconds since the first byte was sent.

    problem: why the answer is not whole, in words; "" where the server ended it with CLOSE.
    """

    images: list[Image] = field(default_factory=list)
    image_at_s: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    n_readouts: int = 0
    sent_s: float = 0.0
    total_s: float = 0.0
    problem: str = ""


def stream_file(
    raw: RawFile,
    host: str,
    port: int,
    *,
    config: str = "scanside",
    due_s: Iterable[float] | None = None,
    on_readout: Callable[[], None] | None = None,
    on_text: Callable[[str], None] | None = None,
    answer_s: float = 600.0,
) -> Replayed:
    """Send a scan as MRD, take what comes back meanwhile, and return it after the server's CLOSE.

    due_s: when each readout may go, in seconds since the start; None sends as fast as the server takes it.
    on_readout is called after each readout; on_text for each TEXT, from another thread. answer_s: the longest silence
    from a server, or refusal to take more, that is waited for.
    Raises DeliveryError where no server answers, and AcquisitionError where the file is broken.
    """
    result = Replayed()
    with ThreadPoolExecutor(1) as receiver, _connect(host, port) as connection:
        connection.settimeout(answer_s)
        start = time.monotonic()
        received = receiver.submit(_receive, connection, result, start, on_text)
        try:
            result.problem = _send(connection, raw, config, start, due_s, result, on_readout)
            result.sent_s = time.monotonic() - start
            result.problem = received.result() or result.problem
            result.total_s = time.monotonic() - start
        finally:
            with contextlib.suppress(OSError):  # wakes the receiver, whatever went wrong here
                connection.shutdown(socket.SHUT_RDWR)
    return result


def _connect(host: str, port: int) -> socket.socket:
    """Connect, trying for some seconds: a server may just be starting."""
    n_tries = 0
    while True:
        try:
            return socket.create_connection((host, port), _CONNECT_S)
        except OSError as error:
            n_tries += 1
            if n_tries == _CONNECT_TRIES or not isinstance(error, ConnectionRefusedError):
                raise DeliveryError(f"no server answers at {host}:{port}: {error.strerror or 'timed out'}") from error
        time.sleep(0.5)


def _send(
    connection: socket.socket,
    raw: RawFile,
    config: str,
    start: float,
    due_s: Iterable[float] | None,
    result: Replayed,
    on_readout: Callable[[], None] | None,
) -> str:
    """Send the scan; return why the server did not take all of it, "" where it did."""
    try:
        connection.sendall(encode_config_file(config) + encode_header(raw.header))
        for message in raw.waveforms():
            connection.sendall(message)
        for message, at_s in zip(raw.acquisitions(), due_s or itertools.repeat(0.0), strict=False):
            if (early_s := start + at_s - time.monotonic()) > 0:
                time.sleep(early_s)
            connection.sendall(message)
            result.n_readouts += 1
            if on_readout is not None:
                on_readout()
        connection.sendall(encode_close())
    except OSError:  # what the server said before tells why
        return "the server took no more of the scan"
    return ""


def _receive(connection: socket.socket, result: Replayed, start: float, on_text: Callable[[str], None] | None) -> str:
    """Take messages until CLOSE; return why it did not come, "" where it did."""
    buffer = bytearray()
    while True:
        try:
            while (message := next_message(buffer, 0, DEFAULT_LIMITS)) is not None:
                data = bytes(memoryview(buffer)[: message.end])
                del buffer[: message.end]
                if message.id is MessageId.CLOSE:
                    return ""
                if message.id is MessageId.IMAGE:
                    result.images.append(read_image(data, message))
                    result.image_at_s.append(time.monotonic() - start)
                elif message.id is MessageId.TEXT:
                    result.texts.append(read_text(data, message))
                    if on_text is not None:
                        on_text(result.texts[-1])
            chunk = connection.recv(1 << 20)
        except StreamError as error:
            return f"the server's answer cannot be read: {error}"
        except TimeoutError:
            return "the server fell silent"
        except OSError:
            chunk = b""
        if not chunk:
            return "the server ended the connection without CLOSE"
        buffer += chunk


def times_due(raw: RawFile, rate: str) -> list[float] | None:
    """Return when each readout is due, in seconds from the first.

    rate: "max" (None is returned), "real" (the scanner's own times), or how many a second.
    Raises AcquisitionError where the file has neither time stamps nor TR, or `rate` is none of these.
    """
    if rate == "max":
        return None
    n = len(raw.heads)
    if rate != "real":
        try:
            per_s = float(rate)
        except ValueError:
            per_s = 0.0
        if not 0 < per_s < 1e9:
            raise AcquisitionError(f"the rate is {rate!r}; max, real, or a number of readouts a second is needed")
        return [float(t) for t in np.arange(n) / per_s]
    scan, exam = read_header(raw.header, "")
    ticks = raw.heads["acquisition_time_stamp"].astype(np.float64)
    if np.ptp(ticks) > 0:
        tick_s = _SIEMENS_TICK_S if "siemens" in exam.equipment.manufacturer.lower() else _TICK_S
        return [float(t) for t in np.maximum.accumulate(ticks - ticks[0]) * tick_s]
    if not scan.tr_ms or not scan.tr_ms[0]:
        raise AcquisitionError("the file has neither time stamps nor TR; give a number of readouts a second instead")
    n_slices = len(np.unique(raw.heads["idx"]["slice"]))  # interleaved: each has its line once in a TR
    return [float(t) for t in np.arange(n) * scan.tr_ms[0] / 1000 / n_slices]


def series(images: list[Image]) -> dict[int, Array]:
    """Return each series' pixels by its number: (slice, y, x), or (repetition and the like, slice, y, x).

    Real pixels come as float32, complex ones as complex64. Raises AcquisitionError where the images of a series differ
    in size.
    """
    stacks: dict[int, Array] = {}
    for number, members in _by_series(images).items():
        if len({image.pixels.shape for image in members}) > 1:
            raise AcquisitionError(f"the images of series {number} differ in size; one size a series is needed")
        pixels = np.stack([image.pixels for image in members])  # (image, channel, z, y, x)
        pixels = pixels.astype(np.complex64 if np.iscomplexobj(pixels) else np.float32)
        n_slices = len({int(image.header["slice"]) for image in members})
        if pixels.shape[1] > 1:
            stacks[number] = pixels
        elif pixels.shape[2] > 1:
            stacks[number] = pixels[:, 0] if len(pixels) > 1 else pixels[0, 0]
        elif n_slices < len(members) and len(members) % n_slices == 0:
            stacks[number] = pixels[:, 0, 0].reshape(-1, n_slices, *pixels.shape[-2:])
        else:
            stacks[number] = pixels[:, 0, 0]
    return stacks


def _by_series(images: list[Image]) -> dict[int, list[Image]]:
    ordered = sorted(images, key=lambda image: [int(image.header[name]) for name in _ORDER])
    numbers = sorted({int(image.header["image_series_index"]) for image in images})
    return {n: [i for i in ordered if int(i.header["image_series_index"]) == n] for n in numbers}


def save_images(images: list[Image], folder: Path) -> list[Path]:
    """Write series_<n>.npy for each series, and images.h5 as ISMRMRD (dataset/image_<n>); return the paths.

    Raises AcquisitionError as `series`, and DeliveryError where the disk does not allow it.
    """
    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, stack in series(images).items():
            paths.append(folder / f"series_{number}.npy")
            np.save(paths[-1], stack)
        paths.append(folder / "images.h5")
        with h5py.File(paths[-1], "w") as file:
            for number, members in _by_series(images).items():
                group = file.create_group(f"dataset/image_{number}")
                group.create_dataset(
                    "header", data=np.array([i.header for i in members], IMAGE_HEADER), maxshape=(None,)
                )
                group.create_dataset("attributes", data=[i.attributes for i in members], maxshape=(None,),
                                     dtype=h5py.string_dtype())  # fmt: skip
                pixels = np.stack([i.pixels for i in members])
                group.create_dataset("data", data=pixels, maxshape=(None, *pixels.shape[1:]))
    except OSError as error:
        raise DeliveryError(f"the images cannot be written: {error.strerror or 'the disk refused'}") from error
    return paths


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `scanside replay`."""
    parser.add_argument("file", type=Path, metavar="FILE", help="ISMRMRD .h5, or a recorded MRD stream (raw.mrd)")
    parser.add_argument("--to", default=DEFAULT_ADDRESS, metavar="HOST:PORT", help="the server (%(default)s)")
    parser.add_argument("--config", default="scanside", metavar="NAME", help="configuration to ask for (%(default)s)")
    parser.add_argument("--accelerate", type=int, default=1, metavar="R", help="send every R-th phase-encode line only")
    parser.add_argument(
        "--acs", type=int, default=DEFAULT_ACS, metavar="N", help="and the N central ones (%(default)s)"
    )
    parser.add_argument("--rate", default="max", metavar="max|real|N", help="readouts a second (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="save the images as DIR/series_<n>.npy and images.h5")


def run(args: argparse.Namespace) -> int:
    """Do `scanside replay`: 0 where images came back, 1 with a reason where none did, 2 for wrong use."""
    host, _, port = args.to.rpartition(":")
    wrong = ""
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        wrong = f"--to {args.to}: HOST:PORT is needed"
    elif not args.file.is_file():
        wrong = f"{args.file}: there is no such file"
    elif args.accelerate < 1 or args.acs < 0:
        wrong = f"--accelerate {args.accelerate} --acs {args.acs}: R from 1 and N from 0 are needed"
    if wrong:
        return _fail(wrong, 2)
    try:
        raw = undersample(open_raw(args.file), args.accelerate, args.acs)
        try:
            due_s = times_due(raw, args.rate)
        except AcquisitionError as error:
            return _fail(f"--rate {args.rate}: {error}", 2)
        result = _stream_shown(raw, host.strip("[]"), int(port), args.config, due_s)
        if args.out is not None and result.images:
            for path in save_images(result.images, args.out):
                print(path)
    except ScanError as error:
        return _fail(str(error), 1)
    print(
        f"{result.n_readouts} readouts sent in {result.sent_s:.2f} s, {len(result.images)} images back, "
        f"the last {result.image_at_s[-1] - result.sent_s:.3f} s after the last readout"
        if result.images
        else f"{result.n_readouts} readouts sent in {result.sent_s:.2f} s"
    )
    if result.problem or not result.images:
        return _fail(result.problem or "the server sent no images", 1)
    return 0


def _stream_shown(raw: RawFile, host: str, port: int, config: str, due_s: list[float] | None) -> Replayed:
    """Stream with a progress bar, where standard error is a terminal, and the server's texts as they come."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("readouts", total=len(raw.heads))
        return stream_file(
            raw, host, port, config=config, due_s=due_s,
            on_readout=lambda: progress.advance(task),
            on_text=lambda text: console.print(text, markup=False, highlight=False),
        )  # fmt: skip


def _fail(reason: str, code: int) -> int:
    print(f"scanside replay: {reason}", file=sys.stderr)
    return code
