"""Pictures in requests: `data:` URLs, and those of allowed hosts, -> PIL images, inside the
operator's limits.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence

from momaserve.errors import PromptError
from momaserve.tokens.image import ImageLimits, open_image
from momaserve.tokens.prompt import ChatMessage, ImagePart, TextPart
from momaserve_server.context import ServerContext
from momaserve_server.fetch import checked_url, is_http_url
from momaserve_server.schemas_chat import ContentPart, Message
from momaserve_server.settings import ServerSettings

ROLE_ALIASES = {"developer": "system"}
"""OpenAI renamed a role; templates know the old name."""
NOTHING_FETCHED: Mapping[str, bytes] = {}


async def read_messages(messages: Sequence[Message], context: ServerContext) -> list[ChatMessage]:
    """Messages with their pictures fetched, where need be, and opened.

    Raises:
        PromptError: as `chat_messages`, or a picture that cannot be fetched.
    """
    settings = context.settings
    urls = _image_urls(messages)
    _check_count(len(urls), settings)
    fetched: dict[str, bytes] = {}
    if context.fetcher is not None:
        remote = [(url, param) for url, param in urls if is_http_url(url)]
        fetched = await context.fetcher.fetch_all(remote)
    return await context.workers.run(chat_messages, messages, settings, fetched)


def chat_messages(
    messages: Sequence[Message],
    settings: ServerSettings,
    fetched: Mapping[str, bytes] = NOTHING_FETCHED,
) -> list[ChatMessage]:
    """Messages with their pictures opened. Takes milliseconds: call it in a worker.

    Args:
        fetched: files of http(s) URLs; others are refused.

    Raises:
        PromptError: too many pictures, or one that is neither fetched nor a `data:` URL, too
            large or broken; `param` says which.
    """
    _check_count(len(_image_urls(messages)), settings)
    return [
        ChatMessage(
            role=ROLE_ALIASES.get(message.role, message.role),
            parts=_parts(message.content, f"messages.{at}.content", settings, fetched),
        )
        for at, message in enumerate(messages)
    ]


def _image_urls(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """(URL, name of the field that has it) of every picture."""
    return [
        (part.image_url.url, f"messages.{at}.content.{number}.image_url")
        for at, message in enumerate(messages)
        if not isinstance(message.content, str)
        for number, part in enumerate(message.content)
        if part.image_url is not None
    ]


def _check_count(num_images: int, settings: ServerSettings) -> None:
    limit = settings.max_images_per_request
    if num_images > limit:
        raise PromptError(
            f"the request has {num_images} pictures; the limit is {limit}", param="messages"
        )


def _parts(
    content: str | list[ContentPart],
    where: str,
    settings: ServerSettings,
    fetched: Mapping[str, bytes],
) -> tuple[TextPart | ImagePart, ...]:
    if isinstance(content, str):
        return (TextPart(content),)
    return tuple(_part(part, f"{where}.{at}", settings, fetched) for at, part in enumerate(content))


def _part(
    part: ContentPart, where: str, settings: ServerSettings, fetched: Mapping[str, bytes]
) -> TextPart | ImagePart:
    if part.image_url is None:
        return TextPart(part.text or "")
    limits = ImageLimits(max_bytes=settings.max_image_bytes, max_pixels=settings.max_image_pixels)
    param = f"{where}.image_url"
    data = fetched.get(part.image_url.url)
    if data is None:
        data = decode_data_url(part.image_url.url, settings.max_image_bytes, param)
    try:
        return ImagePart(open_image(data, limits))
    except PromptError as error:
        raise PromptError(str(error), param=param) from None


def decode_data_url(url: str, max_bytes: int, param: str) -> bytes:
    """The bytes of a `data:image/...;base64,...` URL.

    Raises:
        PromptError: another kind of URL, no base64, or more than `max_bytes`; no part of the
            data is repeated in the message.
    """
    if is_http_url(url):
        checked_url(url, frozenset(), param)  # refuses it
    head, comma, payload = url.partition(",")
    scheme = head.partition(":")[0].lower()
    if scheme != "data" or not comma or not head.lower().endswith(";base64"):
        raise PromptError(
            "a picture must be a 'data:image/...;base64,...' URL, got one that starts with "
            f"{url[:24]!r}",
            param=param,
        )
    media_type = head[len("data:") : -len(";base64")].partition(";")[0].lower()
    if media_type and not media_type.startswith("image/"):
        raise PromptError(f"a picture must be of type image/..., got {media_type!r}", param=param)
    num_bytes = len(payload) * 3 // 4 - payload[-2:].count("=")  # before anything is decoded
    if num_bytes > max_bytes:
        raise PromptError(
            f"a picture may have at most {max_bytes} bytes, got {num_bytes}", param=param
        )
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError):
        raise PromptError("the picture's data is not valid base64", param=param) from None
