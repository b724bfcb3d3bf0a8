"""Pictures in requests: `data:` URLs -> PIL images, inside the operator's limits.

Nothing is fetched: a picture must come with the request.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence

from momaserve.errors import PromptError
from momaserve.tokens.image import ImageLimits, open_image
from momaserve.tokens.prompt import ChatMessage, ImagePart, TextPart
from momaserve_server.schemas_chat import ContentPart, Message
from momaserve_server.settings import ServerSettings

ROLE_ALIASES = {"developer": "system"}
"""OpenAI renamed a role; templates know the old name."""


def chat_messages(messages: Sequence[Message], settings: ServerSettings) -> list[ChatMessage]:
    """Messages with their pictures opened. Takes milliseconds: call it in a worker.

    Raises:
        PromptError: too many pictures, or one that is no `data:` URL, too large or broken;
            `param` says which.
    """
    num_images = sum(
        part.type == "image_url"
        for message in messages
        if not isinstance(message.content, str)
        for part in message.content
    )
    if num_images > settings.max_images_per_request:
        raise PromptError(
            f"the request has {num_images} pictures; the limit is "
            f"{settings.max_images_per_request}",
            param="messages",
        )
    return [
        ChatMessage(
            role=ROLE_ALIASES.get(message.role, message.role),
            parts=_parts(message.content, f"messages.{at}.content", settings),
        )
        for at, message in enumerate(messages)
    ]


def _parts(
    content: str | list[ContentPart], where: str, settings: ServerSettings
) -> tuple[TextPart | ImagePart, ...]:
    if isinstance(content, str):
        return (TextPart(content),)
    return tuple(_part(part, f"{where}.{at}", settings) for at, part in enumerate(content))


def _part(part: ContentPart, where: str, settings: ServerSettings) -> TextPart | ImagePart:
    if part.image_url is None:
        return TextPart(part.text or "")
    limits = ImageLimits(max_bytes=settings.max_image_bytes, max_pixels=settings.max_image_pixels)
    param = f"{where}.image_url"
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
    head, comma, payload = url.partition(",")
    scheme = head.partition(":")[0].lower()
    if scheme in ("http", "https"):
        raise PromptError(
            "this server does not fetch pictures: send the picture itself as a "
            "'data:image/png;base64,...' URL",
            param=param,
        )
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
