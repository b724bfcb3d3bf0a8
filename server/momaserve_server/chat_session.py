"""One conversation with a server: what was said, what comes next, what becomes of answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from momaserve.errors import DeadlineError, PromptError
from momaserve_client import (
    ChatEvent,
    Client,
    FinishChunk,
    ImageChunk,
    Message,
    Model,
    Options,
    Png,
    TextChunk,
    message,
)
from momaserve_client.images import media_type
from momaserve_server.chat_files import FileError, read_picture, save_new, stem_of
from momaserve_server.chat_options import MODES
from momaserve_server.chat_view import View

NUM_PARTIAL_IMAGES = 16
"""How often a picture that can be shown is shown before it is whole."""
MAX_IMAGE_BYTES = 1 << 26
"""For a server that tells no limit."""
CUT_OFF = {"length": "it reached its longest length", "timeout": "its time was over"}


class Conversation:
    """What was said. Only whole exchanges are in it: a question has its answer."""

    def __init__(self, system: str | None) -> None:
        self._system = system
        self._said: list[Message] = []
        self.pictures: list[bytes] = []
        """Attached; they go with the next question."""

    def messages(self) -> list[Message]:
        first = [] if self._system is None else [message("system", self._system)]
        return [*first, *self._said]

    def question(self, text: str) -> Message:
        """The next message. Raises PromptError for text that cannot be sent."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise PromptError("that is not UTF-8 text") from None
        return message("user", *self.pictures, *([text] if text or not self.pictures else []))

    def add(self, question: Message, answer: Sequence[str | Png]) -> None:
        self._said += [question, message("assistant", *_joined(answer))]
        self.pictures.clear()

    def forget(self) -> None:
        """All but the system's message."""
        self._said.clear()
        self.pictures.clear()


def _joined(parts: Sequence[str | Png]) -> list[str | Png]:
    """Pieces of text that follow each other as one."""
    joined: list[str | Png] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return joined or [""]


class Session:
    """Asks, shows the answers and keeps their pictures."""

    def __init__(
        self,
        client: Client,
        model: Model,
        conversation: Conversation,
        view: View,
        *,
        tell: Callable[[str], None],
        directory: Path,
        options: Options,
        modalities: Sequence[str] | None,
    ) -> None:
        """
        Args:
            tell: says a line that is not part of the answer, such as a picture's path.
            directory: for pictures.
            modalities: of answers; None is all that the model can show.
        """
        self._client = client
        self._view = view
        self._tell = tell
        self._directory = directory
        self._options = options
        self.model = model
        self.conversation = conversation
        self.modalities = tuple(modalities or (MODES["both" if self.can_draw else "text"]))
        self.has_saved_all = True
        """False once a picture could not be written."""

    @property
    def can_draw(self) -> bool:
        """Whether the model has pictures, and a tokenizer that makes pixels of them."""
        image = self.model.raw.get("image")
        return isinstance(image, dict) and image.get("size") is not None

    def attach(self, path: Path) -> None:
        """A picture for the next question. Raises FileError if it is none."""
        limits = self.model.raw.get("limits")
        limit: Any = limits.get("image_bytes") if isinstance(limits, dict) else None
        data = read_picture(path, limit if isinstance(limit, int) else MAX_IMAGE_BYTES)
        if media_type(data) is None:
            raise FileError(path, "not a PNG, JPEG, WebP, GIF or BMP file")
        self.conversation.pictures.append(data)

    def ask(self, text: str) -> None:
        """Send a question, show and keep the answer.

        An answer that is interrupted stays in the conversation as far as it came. One that
        failed is not part of it, nor is its question.

        Raises:
            ClientError: the server refused, failed or went away.
            PromptError: text that cannot be sent.
            DeadlineError: `timeout_s` passed before there was any answer.
            KeyboardInterrupt: the answer was interrupted; the server has been told.
        """
        question = self.conversation.question(text)
        parts: list[str | Png] = []
        reason = "stop"
        self._view.start()
        try:
            with self._client.stream_chat(
                [*self.conversation.messages(), question],
                modalities=self.modalities,
                partial_images=self._num_partial_images(),
                **self._options,
            ) as stream:
                for event in stream:
                    self._take(event, parts, stem_of(text))
                    if isinstance(event, FinishChunk):
                        reason = event.reason
        except KeyboardInterrupt:
            if parts:
                self.conversation.add(question, parts)
            raise
        if not parts and reason == "timeout":  # a 408, had it not been streamed
            raise DeadlineError("timeout_s passed before the answer began")
        self.conversation.add(question, parts)
        self._view.end_line()
        if reason != "stop":
            self._tell(f"the answer is cut off: {CUT_OFF.get(reason, reason)}")

    def _num_partial_images(self) -> int | None:
        if "image" not in self.modalities:
            return None
        return NUM_PARTIAL_IMAGES if self._view.draws else 0

    def _take(self, event: ChatEvent, parts: list[str | Png], stem: str) -> None:
        if isinstance(event, TextChunk):
            parts.append(event.text)
            self._view.text(event.text)
        elif isinstance(event, ImageChunk):
            self._view.picture(event.index, event.png)
            if event.is_whole:
                parts.append(event.png)
                self._keep(event.png, stem)

    def _keep(self, png: Png, stem: str) -> None:
        self._view.end_line()
        try:
            self._tell(f"wrote {save_new(png, self._directory, stem)}")
        except FileError as error:
            self.has_saved_all = False
            self._tell(f"error: {error}")
