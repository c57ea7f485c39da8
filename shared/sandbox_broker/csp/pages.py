"""Pages of a listing: find the total that an answer states, and the page that follows it."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import httpx

KEYS = frozenset(
    {
        *(CONTAINERS := ("page", "paging", "pagination", "meta", "links", "_links")),
        *(_TOTALS := ("total_size", "total_count", "total", "count")),
        *(_TOKENS := ("next_page_token", "page_token")),
        "next",
        "href",
        "has_more",
        "is_last_page",
    }
)
"""Keys of a listing that this module reads."""

_LINK = re.compile(r'<([^<>]*)>[^,]*;\s*rel="?next"?(?=$|[\s;,])', re.IGNORECASE)
_END = (None, "", "null")
"""Values of a page token behind the last page. Infoblox sends the text."""


class InvalidLink(Exception):
    """The link to the next page must not be followed. The message is one line and holds no part of the link."""


def read_total(document: Mapping[str, Any]) -> int | None:
    """Return the number of records of all pages, None if the answer does not state it."""
    totals = [value for key in _TOTALS for value in _values(document, key) if type(value) is int]
    return max(totals, default=None)


def find_next(
    current: httpx.URL, document: Mapping[str, Any], link_header: str | None, *, received: int, total: int | None
) -> httpx.URL | None:
    """Return the URL of the page behind `current`, None behind the last one. Raises InvalidLink.

    `received` counts the records up to this page. A stated `total` decides where the listing ends. The token of the
    client goes to the host of `current` only, so a link to another host is invalid, and its scheme and port are not
    used: behind a proxy, servers name the wrong ones.
    """
    if total is not None and received >= total:
        return None
    if link := _find_link(document, link_header):
        try:
            url = current.join(link)
        except (httpx.InvalidURL, ValueError):
            raise InvalidLink("the link to the next page is not a URL") from None
        if url.host != current.host:
            raise InvalidLink("the link to the next page names another host")
        return current.copy_with(raw_path=url.raw_path)
    for key in _TOKENS:
        for token in _values(document, key):
            if token not in _END and isinstance(token, str | int):
                return current.copy_merge_params({"_page_token": str(token)})
    if total is not None or True in _values(document, "has_more") or False in _values(document, "is_last_page"):
        return current.copy_merge_params({"_offset": str(received)})
    return None


def _find_link(document: Mapping[str, Any], link_header: str | None) -> str | None:
    for value in _values(document, "next"):
        link = value.get("href") if isinstance(value, dict) else value
        if isinstance(link, str) and link:
            return link
    match = _LINK.search(link_header or "")
    return match[1] if match else None


def _values(document: Mapping[str, Any], key: str) -> Iterator[Any]:
    """Yield the values of the key in the document and in the objects that describe its page."""
    for container in (document, *(document.get(name) for name in CONTAINERS)):
        if isinstance(container, dict) and key in container:
            yield container[key]
