"""What is held out, and that carving loses no text."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.carving import Carving, carve, cut, is_held_out, survey, text_hash
from data_pipelines.documents import Document


def split_all(texts: list[str], fraction: float) -> tuple[Carving, dict[str, list[Document]]]:
    documents = [Document(f"d{number}", text) for number, text in enumerate(texts)]
    carving = survey(lambda: documents, fraction)
    sides: dict[str, list[Document]] = defaultdict(list)
    for number, document in enumerate(documents):
        for side, part in carve(carving, number, document, text_hash(document.text)):
            sides[side].append(part)
    return carving, sides


def test_many_documents_are_held_out_whole_by_their_text_alone(texts: list[str]) -> None:
    carving, sides = split_all(texts, 0.1)
    assert carving.piece_characters is None
    assert 25 <= len(sides["validation"]) <= 80
    held = {document.text for document in sides["validation"]}
    _, turned = split_all(texts[::-1], 0.1)
    assert {document.text for document in turned["validation"]} == held
    _, more = split_all([*texts, "one more text"], 0.1)
    assert {document.text for document in more["validation"]} - {"one more text"} == held


def test_a_larger_share_holds_out_what_a_smaller_one_does() -> None:
    hashes = [text_hash(str(number)) for number in range(2000)]
    counts = []
    for fraction in (0.0, 0.01, 0.1, 0.5):
        counts.append(sum(is_held_out(own, fraction) for own in hashes))
        assert counts[-1] == pytest.approx(2000 * fraction, abs=5 * (2000 * fraction) ** 0.5)
    assert counts == sorted(counts)
    assert all(is_held_out(own, 0.5) for own in hashes if is_held_out(own, 0.1))


def test_eighteen_books_give_a_validation_part(texts: list[str]) -> None:
    books = ["\n\n".join(texts[number::18]) * 3 for number in range(18)]
    carving, sides = split_all(books, 0.02)
    assert carving.piece_characters is not None
    held, trained = (sum(len(part.text) for part in sides[side]) for side in ("validation", "train"))
    assert held + trained == sum(map(len, books))
    assert 0.01 < held / (held + trained) < 0.03


@pytest.mark.parametrize("texts", [["word " * 2000], ["a\n" * 300, "b\n" * 300], ["x" * 4000]])
def test_one_long_document_is_enough(texts: list[str]) -> None:
    _, sides = split_all(texts, 0.01)
    assert sides["validation"]
    assert sides["train"]


def test_a_text_too_short_to_cut_stays_whole() -> None:
    _, sides = split_all(["short"], 0.5)
    assert dict(sides) == {"train": [Document("d0", "short")]}


def test_no_share_no_validation(texts: list[str]) -> None:
    for documents in (texts, texts[:3]):
        _, sides = split_all(documents, 0.0)
        assert list(sides) == ["train"]


@given(
    texts=st.lists(st.text("ab \n", min_size=1, max_size=3000), min_size=1, max_size=8), fraction=st.floats(0.0, 0.99)
)
def test_the_parts_are_the_whole_with_ids_that_say_where_they_were(texts: list[str], fraction: float) -> None:
    _, sides = split_all(texts, fraction)
    found: dict[int, dict[int, str]] = defaultdict(dict)
    for part in (*sides["train"], *sides["validation"]):
        name, _, place = part.id.partition("#")
        first, last = map(int, place.split("-")) if place else (0, len(part.text) - 1)
        assert last - first + 1 == len(part.text) > 0
        found[int(name[1:])][first] = part.text
    assert ["".join(text for _, text in sorted(found[n].items())) for n in range(len(texts))] == texts
    assert sides["train"]


@given(text=st.text("ab \n", max_size=500), size=st.integers(4, 60))
def test_pieces_join_to_the_text_and_have_about_the_size(text: str, size: int) -> None:
    pieces = list(cut(text, size))
    assert "".join(pieces) == text
    assert all(size // 2 <= len(piece) <= size + size // 2 for piece in pieces[:-1])


def test_pieces_end_where_paragraphs_lines_and_words_do() -> None:
    assert next(cut("one two\n\nthree four five six seven", 12)) == "one two\n\n"
    assert next(cut("one two three\nfour five six seven", 16)) == "one two three\n"
    assert next(cut("onetwothree fourfivesixseven", 14)) == "onetwothree "


def test_the_content_hash_sees_text_order_and_boundaries() -> None:
    def content(texts: list[str]) -> str:
        return survey(lambda: [Document("", text) for text in texts], 0.0).content

    assert len({content(texts) for texts in (["ab", "c"], ["a", "bc"], ["c", "ab"], ["abc"], [])}) == 5
    assert content(["ab", "c"]) == content(["ab", "c"])
