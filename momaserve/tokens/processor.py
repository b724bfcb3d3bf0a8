"""The one object between requests and token ids: text, pictures, chat template and grammar."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from momaserve.errors import CheckpointError, PromptError, SamplingError
from momaserve.models.config import ModelConfig
from momaserve.tokens.detokenize import OutputDecoder
from momaserve.tokens.grammar import Grammar, GrammarSpec
from momaserve.tokens.image import ImageCodec
from momaserve.tokens.prompt import ChatMessage, ImagePart, Prompt, TextPart
from momaserve.tokens.template import (
    DEFAULT_TEMPLATE,
    ChatTemplate,
    ImagePlace,
    Markup,
    UserText,
)
from momaserve.tokens.text import TextTokenizer

_NO_TEXT = "this checkpoint has no tokenizer.json: send token ids"
_NO_IMAGE = "this checkpoint has no image_tokenizer: send token ids"


class Processor:
    """Makes prompts out of requests, and events and pictures out of tokens.

    Immutable; may be shared between threads. Encoding and rendering pictures takes milliseconds:
    keep it off an event loop.
    """

    def __init__(
        self,
        spec: GrammarSpec,
        *,
        text: TextTokenizer | None = None,
        image: ImageCodec | None = None,
        template_source: str = DEFAULT_TEMPLATE,
    ) -> None:
        """
        Raises:
            CheckpointError: tokenizer or template do not fit the vocabulary.
        """
        self.spec = spec
        self.grammar = Grammar(spec)
        self.text = text
        self.image = image
        self._template = None
        if text is not None:
            bos, eos = (_spelling(text, i, spec) for i in (spec.bos, spec.eos))
            self._template = ChatTemplate(template_source, bos_token=bos, eos_token=eos)

    @classmethod
    def load(cls, directory: Path, config: ModelConfig) -> Processor:
        """Read what a checkpoint has of tokenizer.json, chat_template.jinja, image_tokenizer/.

        Raises:
            CheckpointError: a file is broken or does not fit `config`.
        """
        spec = GrammarSpec.from_config(config)
        text = image = None
        if (directory / "tokenizer.json").exists():
            controls = {
                spec.bos,
                spec.pad,
                spec.eos,
                spec.begin_image,
                spec.end_image,
                *spec.image_ids,
            }
            text = TextTokenizer.load(
                directory / "tokenizer.json",
                control_ids={i for i in controls if i is not None},
            )
        template_path = directory / "chat_template.jinja"
        template = DEFAULT_TEMPLATE
        if template_path.exists():
            try:
                template = template_path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise CheckpointError(f"{template_path} cannot be read: {error}") from error
        if (directory / "image_tokenizer").exists():
            if config.image is None:
                raise CheckpointError(
                    f"{directory / 'image_tokenizer'} exists, but config.json has no image"
                )
            image = ImageCodec.load(directory / "image_tokenizer", config.image)
        return cls(spec, text=text, image=image, template_source=template)

    def encode_chat(self, messages: Sequence[ChatMessage]) -> Prompt:
        """A conversation in the checkpoint's chat format, ready for the next answer.

        Raises:
            PromptError: the checkpoint lacks the tokenizer for words or pixels, the template
                refuses the messages, or a text or picture cannot be encoded.
        """
        if self.text is None or self._template is None:
            raise PromptError(_NO_TEXT, param="messages")
        pictures = [p.image for m in messages for p in m.parts if isinstance(p, ImagePart)]
        if pictures and self.image is None:
            raise PromptError(_NO_IMAGE, param="messages")
        ids: list[int] = []
        remaining = iter(pictures)
        for segment in self._template.render(messages):
            match segment:
                case Markup(text):
                    ids += self.text.encode_markup(text)
                case UserText(text):
                    ids += self.text.encode(text)
                case ImagePlace():
                    ids += self.encode_image(next(remaining))
        return self.encode_ids(ids)

    def encode_text(self, text: str) -> Prompt:
        """Text as the one message of a user. Raises PromptError as `encode_chat` does."""
        return self.encode_chat([ChatMessage("user", (TextPart(text),))])

    def encode_ids(self, token_ids: Sequence[int]) -> Prompt:
        """Token ids as they stand.

        Raises:
            PromptError: an id out of range or a malformed image span.
        """
        self.grammar.scan(token_ids)
        return Prompt(tuple(token_ids))

    def encode_image(self, image: Image.Image) -> tuple[int, ...]:
        """The span of a picture: begin_image, its image ids, end_image.

        Raises:
            PromptError: the checkpoint has no image tokenizer, or the picture is broken.
        """
        begin, end = self.spec.begin_image, self.spec.end_image
        if self.image is None or begin is None or end is None:
            raise PromptError(_NO_IMAGE, param="messages")
        return (begin, *self.image.encode(image), end)

    def decoder(
        self, stop: Sequence[str] = (), prompt: Prompt | None = None, *, every_code: bool = False
    ) -> OutputDecoder:
        """A fresh decoder for one answer.

        Args:
            stop: strings at which the answer ends.
            prompt: what is answered; needed when it may end inside a picture.
            every_code: as `OutputDecoder`.

        Raises:
            SamplingError: stop strings, but no tokenizer to find them with.
        """
        if stop and self.text is None:
            raise SamplingError(
                "this checkpoint has no tokenizer.json: use stop_token_ids, not stop", param="stop"
            )
        prefix = None if prompt is None else self._open_picture(prompt.token_ids)
        return OutputDecoder(self.text, self.spec, stop, image_prefix=prefix, every_code=every_code)

    def render(self, token_ids: Sequence[int]) -> Image.Image:
        """The picture of its image ids (without begin_image and end_image).

        Raises:
            PromptError: no image tokenizer, not exactly one picture's ids, or no image ids.
        """
        if self.image is None:
            raise PromptError("this checkpoint has no image_tokenizer: ask for token ids")
        return self.image.decode(token_ids)

    def render_partial(self, token_ids: Sequence[int]) -> Image.Image:
        """The same for a picture's first image ids; the rest is white."""
        if self.image is None:
            raise PromptError("this checkpoint has no image_tokenizer: ask for token ids")
        return self.image.decode_partial(token_ids)

    def _open_picture(self, token_ids: Sequence[int]) -> Sequence[int] | None:
        """Image ids after the begin_image that a prompt leaves open; None if it leaves none."""
        start, image_ids = len(token_ids), self.spec.image_ids
        while start and token_ids[start - 1] in image_ids:
            start -= 1
        is_open = start > 0 and token_ids[start - 1] == self.spec.begin_image
        return token_ids[start:] if is_open else None


def _spelling(text: TextTokenizer, token_id: int, spec: GrammarSpec) -> str:
    """How the tokenizer writes bos or eos; checks that it reads it back."""
    if text.max_token_id >= spec.vocab_size:
        raise CheckpointError(
            f"tokenizer.json has ids up to {text.max_token_id}, but vocab_size is {spec.vocab_size}"
        )
    token = text.id_to_token(token_id)
    if token is None or text.encode_markup(token) != [token_id]:
        raise CheckpointError(
            f"tokenizer.json has no special token with id {token_id} (bos or eos of config.json)"
        )
    return token
