"""The evaluator: what it reads, what its rows say, and what it never mixes up."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipelines.batches import Batch
from data_pipelines.tokenizer import Tokenizer
from hope_train.errors import UserError
from hope_train.evaluate.loop import Evaluator, validation_loss
from hope_train.evaluate.protocols import score_pages, score_tokens, word_figures
from hope_train.evaluate.wikitext import UNVERIFIED, VERIFIED, join_pages, wikitext_text
from tests.evaluate.tiny import run_config, scorer, tiny_model, wikitext_like

WORD_KEYS = {"word_ppl", "byte_ppl", "bits_per_byte"}


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOPE_WIKITEXT", raising=False)


def evaluator(tokenizer: Tokenizer, folder: Path | str | None, arch: str = "hope", **settings: Any) -> Evaluator:
    wikitext = None if folder is None else str(folder)
    config = run_config(arch, tokenizer.vocab_size, eval={"wikitext": wikitext, **settings})
    return Evaluator(config, tokenizer, "cpu")


def test_a_word_row(tokenizer: Tokenizer, wikitext_folder: Path) -> None:
    model = tiny_model("hope", tokenizer.vocab_size)
    (row,) = evaluator(tokenizer, wikitext_folder).evaluate(model, "validation", 7, 448)
    pages = wikitext_text(wikitext_like(0), "validation", "").pages
    numbered = [(number, page, tokenizer.encode(page.scored)) for number, page in enumerate(pages)]
    expected = word_figures(score_pages(scorer(model, tokenizer.eot_id), numbered, 32))
    assert {key: row[key] for key in WORD_KEYS} == pytest.approx(expected, rel=1e-12)
    assert row["seconds"] >= 0
    assert {key: row[key] for key in row.keys() - WORD_KEYS - {"seconds"}} == {
        "step": 7,
        "tokens": 448,
        "split": "validation",
        "source": UNVERIFIED,
        "protocol": "word",
        "pages": 5,
        "context_length": 32,
        "scored_tokens": sum(len(tokens) for *_, tokens in numbered),
        "denominators": {"words": sum(p.words for p in pages), "bytes": sum(p.bytes for p in pages)},
        "tokenizer": tokenizer.fingerprint,
    }
    json.dumps(row, allow_nan=False)


def test_each_protocol_has_its_own_row_and_its_own_keys(tokenizer: Tokenizer, wikitext_folder: Path) -> None:
    model = tiny_model("hope", tokenizer.vocab_size)
    made = evaluator(tokenizer, wikitext_folder, protocols=["word", "token"], stateful=True)
    word, token, stateful = made.evaluate(model, "test", 1, 64)
    assert word["protocol"] == stateful["protocol"] == "word"
    assert word.keys() >= WORD_KEYS
    assert not {"token_ppl", "stateful", "stateful_word_ppl"} & word.keys()
    assert token["protocol"] == "token"
    assert not [key for key in token if "word" in key or "byte" in key]
    assert token["denominators"] == {"tokens": token["scored_tokens"]}
    assert stateful["stateful"] is True
    assert not WORD_KEYS & stateful.keys()
    assert {f"stateful_{key}" for key in WORD_KEYS} <= stateful.keys()
    assert stateful["stateful_word_ppl"] != pytest.approx(word["word_ppl"], rel=1e-6)
    assert stateful["denominators"] == word["denominators"]


def test_the_token_row_is_of_the_joined_raw_text(tokenizer: Tokenizer, wikitext_folder: Path) -> None:
    model = tiny_model("transformer_pp", tokenizer.vocab_size)
    (row,) = evaluator(tokenizer, wikitext_folder, "transformer_pp", protocols=["token"]).evaluate(
        model, "validation", 1, 64
    )
    nll, count = score_tokens(scorer(model, tokenizer.eot_id), tokenizer.encode(wikitext_like(0)), 32)
    assert row["token_ppl"] == pytest.approx(math.exp(nll / count), rel=1e-12)
    assert row["scored_tokens"] == count
    assert row["context_length"] == 32
    assert row["tokenizer"] == tokenizer.fingerprint


def test_some_pages_are_marked_partial(tokenizer: Tokenizer, wikitext_folder: Path) -> None:
    model = tiny_model("transformer_pp", tokenizer.vocab_size)
    made = evaluator(tokenizer, wikitext_folder, "transformer_pp", pages=2, protocols=["word", "token"])
    pages = wikitext_text(wikitext_like(0), "validation", "").pages[:2]
    word, token = made.evaluate(model, "validation", 1, 64)
    assert (word["pages"], word["partial"], token["partial"]) == (2, True, True)
    assert word["denominators"]["words"] == sum(page.words for page in pages)
    joined = tokenizer.encode(join_pages([page.text for page in pages]))
    assert token["scored_tokens"] == len(joined) - -(-len(joined) // 32)
    assert "2 of 5 pages" in made.sources()
    (whole,) = evaluator(tokenizer, wikitext_folder, "transformer_pp", pages=5).evaluate(model, "validation", 1, 64)
    assert "partial" not in whole


@pytest.mark.parametrize("length", [8, 33, 2000])
def test_any_context_length(length: int, tokenizer: Tokenizer, wikitext_folder: Path) -> None:
    config = run_config("hope", tokenizer.vocab_size, eval={"wikitext": str(wikitext_folder), "pages": 2})
    model = tiny_model("hope", tokenizer.vocab_size)
    (row,) = Evaluator(config, tokenizer, "cpu", context_length=length).evaluate(model, "validation", 1, 64)
    assert row["context_length"] == length
    assert math.isfinite(row["word_ppl"])
    with pytest.raises(UserError, match="context_length=1"):
        Evaluator(config, tokenizer, "cpu", context_length=1)


def test_the_environment_names_the_folder(
    tokenizer: Tokenizer, wikitext_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOPE_WIKITEXT", str(wikitext_folder))
    made = evaluator(tokenizer, None)
    assert str(wikitext_folder) in made.sources()
    assert "unverified" in made.sources()
    assert made.evaluate(tiny_model("hope", tokenizer.vocab_size), "test", 1, 64)


def test_what_is_missing_is_said_before_any_work(tokenizer: Tokenizer, wikitext_folder: Path) -> None:
    (wikitext_folder / "wiki.test.raw").unlink()
    with pytest.raises(UserError, match=r"has no wiki\.test\.raw"):
        evaluator(tokenizer, wikitext_folder)
    evaluator(tokenizer, wikitext_folder, test_at_end=False)
    with pytest.raises(UserError, match="protocol classic needs"):
        evaluator(tokenizer, wikitext_folder, test_at_end=False, protocols=["word", "classic"])


def test_without_wikitext_there_are_no_rows_and_one_line_says_so(tokenizer: Tokenizer) -> None:
    made = evaluator(tokenizer, None)
    for split in ("validation", "test"):
        assert made.evaluate(tiny_model("hope", tokenizer.vocab_size), split, 1, 64) == []
    assert made.sources().startswith("no WikiText")
    assert "\n" not in made.sources()


def test_held_out_text_is_never_called_word_ppl(tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = {
        "sources": [{"builtin": "python-docs", "max_bytes": 200_000}],
        "cache_dir": str(tmp_path),
        "validation_fraction": 0.2,
    }
    config = run_config(
        "transformer_pp",
        tokenizer.vocab_size,
        data=data,
        eval={"pages": 2, "protocols": ["word", "token"], "stateful": True},
    )
    made = Evaluator(config, tokenizer, "cpu")
    model = tiny_model("transformer_pp", tokenizer.vocab_size, torch.float32)
    rows = made.evaluate(model, "validation", 1, 64)
    assert [row["source"] for row in rows] == ["held-out python-docs"] * 2
    assert {f"heldout_{key}" for key in WORD_KEYS} <= rows[0].keys()
    assert {f"heldout_stateful_{key}" for key in WORD_KEYS} <= rows[1].keys()
    assert not [key for row in rows for key in row if key in {*WORD_KEYS, "token_ppl"} or key.startswith("stateful_")]
    assert made.evaluate(model, "test", 1, 64) == []
    assert "heldout_word_ppl" in made.sources()


def test_an_unknown_split_is_an_error_of_ours(tokenizer: Tokenizer, wikitext_folder: Path) -> None:
    with pytest.raises(ValueError, match="split 'train'"):
        evaluator(tokenizer, wikitext_folder).evaluate(tiny_model("hope", tokenizer.vocab_size), "train", 1, 64)


def make_batches(starts: bool) -> list[Batch]:
    rng = np.random.default_rng(0)
    batches = []
    for rows in (2, 0, 3):
        tokens = rng.integers(2, 50, (rows, 20))
        targets = rng.integers(2, 50, (rows, 20))
        targets[:, 5] = -100
        batches.append(Batch(tokens, targets, rng.random((rows, 20)) < 0.2 if starts else None))
    return batches


@pytest.mark.parametrize("starts", [False, True])
def test_validation_loss_is_the_models_own_loss(starts: bool) -> None:
    model = tiny_model("hope", 50)
    batches = make_batches(starts)
    total, count = 0.0, 0
    for batch in batches:
        if len(batch.tokens):
            where = None if batch.starts is None else torch.from_numpy(batch.starts)
            nll, scored = model.loss(torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets), where)
            total, count = total + nll.item(), count + int(scored)
    assert count == 5 * 19
    assert validation_loss(model, batches, "cpu", "fp32") == pytest.approx(total / count, rel=1e-12)
    assert math.isnan(validation_loss(model, [], "cpu", "fp32"))


def test_the_validation_row(tokenizer: Tokenizer, wikitext_folder: Path) -> None:
    model = tiny_model("hope", tokenizer.vocab_size)
    row = evaluator(tokenizer, wikitext_folder).validation_row(model, make_batches(False), 3, 192)
    assert row["validation_loss"] == validation_loss(model, make_batches(False), "cpu", "fp32")
    assert (row["step"], row["tokens"], row["split"], row["scored_tokens"]) == (3, 192, "validation", 95)
    assert not WORD_KEYS & row.keys()


def test_the_real_text_by_the_loop(tokenizer: Tokenizer, wikitext_dir: Path) -> None:
    """The denominators in the row are the published ones; a model that knows nothing has the uniform perplexity."""
    config = run_config("transformer_pp", tokenizer.vocab_size, eval={"wikitext": str(wikitext_dir), "batch_size": 64})
    model = tiny_model("transformer_pp", tokenizer.vocab_size, torch.float32)
    with torch.no_grad():
        model.head_weight_VD.zero_()
    (row,) = Evaluator(config, tokenizer, "cpu", context_length=256).evaluate(model, "test", 1, 64)
    assert row["source"] == VERIFIED
    assert row["denominators"] == {"words": 241_335, "bytes": 1_290_527}
    assert row["pages"] == 62
    assert "partial" not in row
    bits = row["scored_tokens"] * math.log2(tokenizer.vocab_size) / 1_290_527
    assert row["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    assert row["byte_ppl"] == pytest.approx(2**bits, rel=1e-6)
    assert row["word_ppl"] == pytest.approx(2 ** (bits * 1_290_527 / 241_335), rel=1e-5)


def test_packed_files_do_as_well(tokenizer: Tokenizer, wikitext_folder: Path) -> None:
    model = tiny_model("hope_attention", tokenizer.vocab_size)
    (plain,) = evaluator(tokenizer, wikitext_folder, "hope_attention").evaluate(model, "test", 1, 64)
    for file in wikitext_folder.glob("*.raw"):
        (wikitext_folder / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    (packed,) = evaluator(tokenizer, wikitext_folder, "hope_attention").evaluate(model, "test", 1, 64)
    assert {**plain, "seconds": 0} == {**packed, "seconds": 0}
