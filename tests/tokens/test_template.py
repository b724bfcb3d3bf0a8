"""Chat templates: user text stays text, pictures have places, bad templates fail cleanly."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from momaserve.errors import CheckpointError, PromptError
from momaserve.tokens.prompt import ChatMessage, ImagePart, TextPart
from momaserve.tokens.template import (
    CLOSE,
    DEFAULT_TEMPLATE,
    OPEN,
    ChatTemplate,
    ImagePlace,
    Markup,
    UserText,
)
from tests.tokens.builders import TEMPLATE

PICTURE = ImagePart(Image.new("RGB", (8, 8)))


def make(source: str) -> ChatTemplate:
    return ChatTemplate(source, bos_token="<|bos|>", eos_token="<|eos|>")


def user(*parts: str | ImagePart) -> ChatMessage:
    return ChatMessage("user", tuple(TextPart(p) if isinstance(p, str) else p for p in parts))


def assistant(text: str) -> ChatMessage:
    return ChatMessage("assistant", (TextPart(text),))


def test_the_demo_template() -> None:
    messages = [user("What is ", PICTURE, "?"), assistant("A cat."), user("Really?")]
    assert make(TEMPLATE).render(messages) == [
        Markup("<|bos|>"),
        UserText("What is "),
        ImagePlace(),
        UserText("?"),
        Markup("<|sep|>"),
        UserText("A cat."),
        Markup("<|eos|>"),
        UserText("Really?"),
        Markup("<|sep|>"),
    ]


def test_default_template() -> None:
    assert make(DEFAULT_TEMPLATE).render([user("a"), user(PICTURE)]) == [
        Markup("<|bos|>"),
        UserText("a"),
        Markup("\n"),
        ImagePlace(),
    ]


def test_generation_prompt_and_loop_variables() -> None:
    template = make(
        "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{% if loop.last %}!{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}go{% endif %}{% if tools %}no{% endif %}"
    )
    assert template.render([user("a"), user("b")]) == [Markup("1/22/2!go")]
    assert template.render([user("a")], add_generation_prompt=False) == [Markup("1/1!")]


@pytest.mark.parametrize(
    "text",
    [
        "<|eos|><|sep|><|bos|>",
        "<|image|><|begin_image|>",
        "{{ bos_token }}{% raw %}",
        "a\nb\x00",
        "",
    ],
)
def test_user_text_is_never_markup(text: str) -> None:
    assert make(TEMPLATE).render([user(text)]) == [
        Markup("<|bos|>"),
        UserText(text),
        Markup("<|sep|>"),
    ]


def test_fences_in_user_text_are_removed() -> None:
    text = f"{CLOSE}<|eos|>{OPEN}{OPEN}x{CLOSE}"
    assert make(TEMPLATE).render([user(text)])[1] == UserText("<|eos|>x")


@given(st.lists(st.text(st.sampled_from("a<|>{}" + OPEN + CLOSE)), min_size=1, max_size=4))
def test_user_text_comes_out_as_it_went_in(texts: list[str]) -> None:
    segments = make(TEMPLATE).render([user(*texts)])
    assert [s.text for s in segments if isinstance(s, UserText)] == [
        text.replace(OPEN, "").replace(CLOSE, "") for text in texts
    ]
    assert [s for s in segments if isinstance(s, Markup)] == [Markup("<|bos|>"), Markup("<|sep|>")]


@pytest.mark.parametrize("role", ["tool", "", "<|eos|>", "user ", "x" * 10_000, None, ["user"]])
def test_unknown_roles(role: str) -> None:
    with pytest.raises(PromptError, match="role must be one of") as caught:
        ChatMessage(role, ())
    assert len(str(caught.value)) < 150


def test_no_messages() -> None:
    with pytest.raises(PromptError, match="must not be empty"):
        make(TEMPLATE).render([])


def test_a_message_without_parts() -> None:
    assert make(TEMPLATE).render([user()]) == [Markup("<|bos|><|sep|>")]


def test_a_template_may_refuse() -> None:
    message = ChatMessage("system", (TextPart("secret"),))
    with pytest.raises(PromptError, match="^the chat template says: no role system$"):
        make(TEMPLATE).render([message])
    chatty = make("{{ raise_exception(messages[0].content * 1000) }}")
    with pytest.raises(PromptError, match="says: x") as caught:
        chatty.render([user("x" * 1000)])
    assert len(str(caught.value)) < 300
    assert OPEN not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ '{0.__class__}'.format(1) }}{{ 1 / 0 }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n }}{% endmacro %}{{ f(60) }}",
        "{% for i in range(90000) %}{{ 'xxxxxxxxxx' }}{% endfor %}",
        "{{ messages[0].nothing.at_all }}",
        "{{ messages[7].content }}",
        "{% include 'x' %}",
        "{% for i in messages recursive %}{{ loop(messages) }}{% endfor %}",
    ],
)
def test_templates_that_fail_do_so_when_loaded(source: str) -> None:
    with pytest.raises(CheckpointError, match="fails on a plain message"):
        make(source)


@pytest.mark.parametrize(
    "source", ["{% for %}", "{{ x", "{% endif %}", "{{ 1|nofilter }}", "{{ (" * 5000]
)
def test_templates_that_do_not_compile(source: str) -> None:
    with pytest.raises(CheckpointError, match="does not compile"):
        make(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% if messages|length > 1 %}{{ ''.__class__.x }}{% endif %}", "SecurityError"),
        ("{% for m in messages %}{{ 1 // (2 - loop.index) }}{% endfor %}", "ZeroDivisionError"),
        (
            "{% for a in messages[1:] %}{% for i in messages * 99999 %}{% endfor %}{% endfor %}",
            "more than 100000 steps",
        ),
    ],
)
def test_templates_that_fail_on_a_request(source: str, message: str) -> None:
    with pytest.raises(PromptError, match=f"fails on these messages: .*{message}") as caught:
        make(source).render([user("secret"), user("secret")])
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "expression",
    ["raise_exception.__globals__", "messages.__class__", "cycler.__init__", "self._x"],
)
def test_attributes_of_python_show_nothing(expression: str) -> None:
    assert make("{{ " + expression + " }}").render([user("a")]) == []


def test_each_rendering_has_its_own_budget() -> None:
    template = make("{% for i in range(60000) %}{% endfor %}ok")
    for _ in range(3):
        assert template.render([user("a")]) == [Markup("ok")]


def test_long_user_text_is_not_counted_as_markup() -> None:
    text = "long " * 100_000
    assert make(TEMPLATE).render([user(text)])[1] == UserText(text)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content[2:] }}",
        "{{ messages[0].content[:-1] }}",
        "{{ messages[0].content ~ '\\ue000' }}",
        "{{ messages[0].content | reverse }}",
    ],
)
def test_torn_text_is_refused(source: str) -> None:
    with pytest.raises(PromptError, match="tears"):
        make(source).render([user("abc")])


@pytest.mark.parametrize(
    "source",
    [
        "no place",
        "{{ messages[0].content }}<|image|>",
        "{{ messages[0].content }}{{ messages[0].content }}",
    ],
)
def test_every_picture_has_one_place(source: str) -> None:
    with pytest.raises(PromptError, match="places to 1 pictures"):
        make(source).render([user(PICTURE)])


def test_tojson_keeps_the_fences() -> None:
    segments = make("{{ messages[0] | tojson }}").render([user("<é>")])
    assert segments == [Markup('{"role": "user", "content": "'), UserText("<é>"), Markup('"}')]
