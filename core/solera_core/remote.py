"""Tensors of a model on the hub, known from the headers of its files before any weight is downloaded.

Of every file two ranges of bytes are asked for: the eight that say how long its header is, and the header. The size of
the file, against which the header is checked, comes from the hub's list of files and from the answer itself.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from solera_core.errors import CheckpointError, HubError
from solera_core.headers import PREFIX_BYTES, TensorInfo, header_length, parse_header
from solera_core.hub import Listing, download, explained, missing_bytes
from solera_core.shards import Weights, join_headers, read_headers
from solera_core.sources import SafetensorsSource

__all__ = ["RemoteSource"]

_CONNECTIONS: Final = 8
_CONTENT_RANGE: Final = re.compile(r"bytes (?P<first>\d+)-(?P<last>\d+)/(?P<total>\d+|\*)")


class RemoteSource:
    """`solera_core.sources.Source` of files on the hub. No tensor can be read; `fetch` gives a source that can.

    Args:
        listing: the commit.
        weights: its weight files, by their future paths in the cache.

    Raises:
        CheckpointError: a header is damaged, disagrees with the size of its file, or with the index.
        HubError: the hub cannot be reached, refuses, or answers with other bytes than those asked for.
    """

    def __init__(self, listing: Listing, weights: Weights) -> None:
        self._listing = listing
        self._weights = weights
        with ThreadPoolExecutor(_CONNECTIONS, "headers") as pool:
            headers = pool.map(partial(_read_header, listing), weights.files)
            self.tensors: Mapping[str, TensorInfo] = join_headers(weights, headers)

    @property
    def missing_bytes(self) -> int:
        """What `fetch` would download."""
        return missing_bytes(self._listing)

    def read_raw(self, info: TensorInfo, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Refused: a caller that needs weights must `fetch` first."""
        raise RuntimeError(f"{info.file}: tensor {info.name!r} [{start}, {stop}): not downloaded yet; call fetch()")

    def peek(self, infos: Sequence[TensorInfo]) -> dict[str, bytes]:
        """The bytes of small tensors, by name: a range request each.

        Raises:
            HubError: the hub cannot be reached or refuses.
        """

        def read(info: TensorInfo) -> bytes:
            return _read(self._listing, info.file.name, info.begin, info.end)

        with ThreadPoolExecutor(_CONNECTIONS, "peek") as pool:
            return dict(zip([info.name for info in infos], pool.map(read, infos), strict=True))

    def fetch(self) -> SafetensorsSource:
        """Download the weights, and open them.

        Raises:
            HubError: as `solera_core.hub.download`.
            CheckpointError: what was downloaded is not what the headers said.
        """
        download(self._listing)
        local = read_headers(self._weights)
        for name in dict.fromkeys([*self.tensors, *local]):
            planned, found = self.tensors.get(name), local.get(name)
            if planned != found:
                raise CheckpointError(
                    f"{self._listing.path}: tensor {name!r} is {_shown(found)} in the download, but was "
                    f"{_shown(planned)} in the header that {self._listing.endpoint} gave for the same commit before; "
                    "delete this snapshot and its blobs, and run again"
                )
        return SafetensorsSource(local)


def _shown(info: TensorInfo | None) -> str:
    return "absent" if info is None else f"{info.dtype} {info.shape} in {info.file.name} from byte {info.begin} on"


def _read_header(listing: Listing, file: Path) -> dict[str, TensorInfo]:
    size = listing.sizes[file.name]
    way_out = f"{listing.endpoint}/{listing.repo} itself is damaged: choose another revision, or tell its owner"
    prefix = _read(listing, file.name, 0, min(PREFIX_BYTES, size))
    length = header_length(file, prefix, size, way_out=way_out)
    return parse_header(file, _read(listing, file.name, PREFIX_BYTES, PREFIX_BYTES + length), size, way_out=way_out)


def _read(listing: Listing, name: str, begin: int, end: int) -> bytes:
    """The bytes [begin, end) of a file on the hub; never more than `end` bytes are taken from the connection.

    Raises:
        HubError: the hub cannot be reached, refuses, or answers with other bytes than those asked for.
    """
    import huggingface_hub.utils
    from huggingface_hub import constants, hf_hub_url

    client: Any = huggingface_hub.utils  # exports these without saying so to type checkers
    if begin == end:
        return b""
    url = hf_hub_url(listing.repo, name, revision=listing.commit, endpoint=listing.endpoint)
    headers = client.build_hf_headers() | {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
    where = f"{url}: bytes {begin} to {end - 1} asked for"
    with (
        explained(listing.repo, listing.commit, "not in the cache", listing.endpoint),
        # Streamed, so that an answer is looked at before it is read: it could be a file of gigabytes.
        client.http_stream_backoff(
            "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, follow_redirects=True
        ) as response,
    ):
        if response.status_code == 416:
            raise HubError(f"{where}, but the file is shorter than the {listing.sizes[name]} bytes of the hub's list")
        client.hf_raise_for_status(response)
        if (encoding := response.headers.get("Content-Encoding", "identity")) != "identity":
            raise HubError(f"{where}, but they come encoded ({encoding}), which makes ranges meaningless")
        if response.status_code == 206:
            found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if found is None or (int(found["first"]), int(found["last"])) != (begin, end - 1):
                raise HubError(f"{where}, but {response.headers.get('Content-Range')!r} came; is a proxy in between?")
            total, skip = found["total"], 0
        elif response.status_code == 200:
            # No ranges here: take the file from its start and hang up behind what is needed.
            total, skip = response.headers.get("Content-Length", "*"), begin
        else:
            raise HubError(f"{where}, but the answer is status {response.status_code}")
        if total not in ("*", str(listing.sizes[name])):
            raise HubError(
                f"{url}: the file has {total} bytes, but {listing.sizes[name]} by the hub's list of files; "
                f"{listing.repo} is damaged there, or a proxy in between is wrong: try another revision or endpoint"
            )
        return _take(response.iter_raw(), skip, skip + end - begin, where)


def _take(body: Iterator[bytes], begin: int, end: int, where: str) -> bytes:
    """The bytes [begin, end) of a body, which is not read any further."""
    from huggingface_hub import errors

    transport: type[BaseException] = errors.HfHubHTTPError.__bases__[0]  # httpx's HTTPError
    taken, position = bytearray(), 0
    try:
        for chunk in body:
            taken += chunk[max(begin - position, 0) : max(end - position, 0)]
            position += len(chunk)
            if position >= end:
                break
    except transport as e:
        raise HubError(f"{where}, and the connection broke: {e}; run again") from e
    if len(taken) < end - begin:
        raise HubError(f"{where}, but the answer ended after {position} bytes; run again")
    return bytes(taken)
