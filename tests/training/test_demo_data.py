"""What demo training is made of: code variants, and the whole dictionary's prompts."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from momaserve.errors import DataError
from momaserve.models.image_tokenizer import ImageAutoencoder, ImageTokenizerConfig
from momaserve.training.data import open_corpus
from momaserve.training.demo import code_variants, encode_pictures
from momaserve.training.dictionary import sources
from momaserve.training.dictionary.build import build
from momaserve.training.dictionary.corpus import Corpus, train_text_tokenizer
from momaserve.training.dictionary.phrases import MAX_SHARED
from momaserve.training.dictionary.plain_words import PLAIN_WORDS, accepts, is_kept_out
from momaserve.training.dictionary.taste import is_fit_word
from momaserve.training.image_tokenizer import to_pixels
from momaserve.training.recipe import Recipe
from momaserve.training.tasks import DictionaryTasks
from tests.models.factory import make_config

SIZE = 16
FIRST = 50
NEEDED = {
    sources.FONT_PACKAGE: sources.FONT_FILE,
    sources.CLDR_PACKAGE: sources.CLDR_FOLDER / "annotations/en.xml",
    sources.WORDNET_PACKAGE: sources.WORDNET_FOLDER / "data.noun",
}
MISSING = [package for package, path in NEEDED.items() if not path.is_file()]


@pytest.fixture
def model() -> ImageAutoencoder:
    torch.manual_seed(0)
    config = ImageTokenizerConfig(
        image_size=SIZE, encoder_channels=(8, 8), decoder_channels=(8, 8), blocks_per_stage=1
    )
    return ImageAutoencoder(config).eval()


def test_code_variants_are_of_the_picture_read_back_and_moved(model: ImageAutoencoder) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (70, SIZE, SIZE, 3), dtype=np.uint8)
    before = pictures.copy()
    variants = code_variants(model, pictures, FIRST)
    assert np.array_equal(pictures, before)
    assert [len(codes) for codes in variants] == [6] * 70
    assert [codes[0] for codes in variants] == encode_pictures(model, pictures, FIRST)

    drawn = model.decode(torch.tensor([codes[0] for codes in variants]) - FIRST)
    drawn = ((drawn + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    again = model.encode(to_pixels(drawn)) + FIRST
    assert [codes[1] for codes in variants] == again.tolist()

    left, right, up, down = (np.full_like(pictures, 255) for _ in range(4))
    left[:, :, :-1] = pictures[:, :, 1:]
    right[:, :, 1:] = pictures[:, :, :-1]
    up[:, :-1] = pictures[:, 1:]
    down[:, 1:] = pictures[:, :-1]
    for number, moved in enumerate((left, right, up, down), start=2):
        assert [codes[number] for codes in variants] == encode_pictures(model, moved, FIRST)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    if MISSING:
        pytest.skip(f"Debian packages {MISSING} are not installed")
    folder: Path = tmp_path_factory.mktemp("dictionary")
    build(folder, size=SIZE)
    with pytest.raises(DataError, match=f"have {SIZE} pixels a side, the recipe's"):
        open_corpus(folder, Recipe.load("demo"))
    return Corpus.load(folder)


def test_every_plain_word_has_its_pictures(corpus: Corpus) -> None:
    names = {item.name for item in corpus.items if item.split == "train"}
    for word, accepted in PLAIN_WORDS.items():
        assert set(accepted) <= names, word
        assert any(accepts(word, item) for item in corpus.items)


def test_phrases_of_the_whole_dictionary(corpus: Corpus) -> None:
    names = {item.name for item in corpus.items}
    owners: dict[str, int] = {}
    for item in corpus.items:
        assert len(set(item.phrases)) == len(item.phrases)
        assert not {item.name, *item.keywords} & set(item.phrases)
        for phrase in item.phrases:
            assert is_fit_word(phrase)
            assert not is_kept_out(phrase)
            assert phrase not in names
            owners[phrase] = owners.get(phrase, 0) + 1
    assert max(owners.values()) <= MAX_SHARED
    by_name = {item.name: set(item.phrases) for item in corpus.items}
    assert {"puppy dog", "domestic dog"} <= by_name["dog"]
    assert "french flag" in by_name["flag: france"]
    assert "cellphone" in by_name["mobile phone"]
    assert sum(map(bool, by_name.values())) > 0.8 * len(by_name)


def test_no_question_of_training_is_kept_out(corpus: Corpus) -> None:
    items = [item for item in corpus.items if item.split == "train"]
    texts: list[str] = []
    first = 1000

    def encode(text: str) -> list[int]:
        texts.append(text)
        return [first + len(texts) - 1]

    tasks = DictionaryTasks(
        config=make_config(vocab_size=1000),
        items=items,
        codes=[[[4, 5, 6, 7]]] * len(items),
        glosses=corpus.glosses,
        encode=encode,
    )
    rng = random.Random(0)
    questions = [tasks.draw(rng).question for _ in range(50_000)]
    targets = [i for i, item in enumerate(items) if any(accepts(w, item) for w in PLAIN_WORDS)]
    questions += [tasks.name_to_picture(i, rng).question for i in targets for _ in range(20)]
    asked = {texts[token - first] for q in questions for token in q or () if token >= first}
    assert len(asked) > 20_000
    assert not {text for text in asked if is_kept_out(text)}


def test_the_tokenizer_knows_wrappers_and_phrases(corpus: Corpus) -> None:
    tokenizer = train_text_tokenizer(corpus, 2048)
    assert tokenizer.get_vocab_size() == 2048
    assert len(tokenizer.encode("can you draw a").ids) <= 5
    assert len(tokenizer.encode("show me a").ids) <= 4
    assert tokenizer.decode(tokenizer.encode("what does owl mean?").ids) == "what does owl mean?"
