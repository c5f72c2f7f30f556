"""`hope generate` under a launcher: the text of one process, printed once, whatever divides the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipelines.tokenizer import Tokenizer
from tests.evaluate.tiny import make_run, run_config, tiny_tokenizer
from tests.parallel import jobs
from tests.parallel.harness import Gang

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

LAYOUTS = (
    (2, ["parallel.tp=2"]),
    (4, ["parallel.tp=4"]),
    (4, ["parallel.tp=2"]),
    (3, []),
    (2, ["parallel.tp=2", "parallel.sequence_parallel=false"]),
    (2, ["parallel.pp=2"]),
    (4, ["parallel.pp=2", "parallel.tp=2"]),
    (2, ["parallel.dp_shard=2"]),
    (4, ["parallel.dp_shard=2", "parallel.pp=2"]),
    (4, ["parallel.dp_shard=2", "parallel.tp=2", "parallel.keep_gathered=never"]),
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """With a vocabulary that neither 2 nor 4 ranks divide evenly."""
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), pieces=401)


@pytest.mark.parametrize(
    ("arch", "temperature"),
    [
        ("hope_attention", "0.9"),
        pytest.param("hope_attention", "0", marks=pytest.mark.slow),
        pytest.param("hope", "0.9", marks=pytest.mark.slow),
        pytest.param("hope", "0", marks=pytest.mark.slow),
    ],
)
def test_the_text_is_that_of_one_process(
    gang: Gang, tmp_path: Path, tokenizer: Tokenizer, arch: str, temperature: str
) -> None:
    assert tokenizer.vocab_size % 2 == 1
    four = {"n_heads": 4, "tie_embeddings": arch == "hope"}
    make_run(tmp_path, run_config(arch, tokenizer.vocab_size, model=four), tokenizer)
    how = ["--max-tokens", "40", "--seed", "5", "--temperature", temperature]
    arguments = ["generate", str(tmp_path), "--prompt", "The café ", *how]
    ((code, text, said),) = gang.run(jobs.command, 1, arguments=arguments)
    assert (code, said) == (0, "")
    assert len(text) > len("The café \n")
    for ranks, layout in LAYOUTS:
        first, *others = gang.run(jobs.command, ranks, arguments=[*arguments, *layout])
        assert first == (0, text, ""), (ranks, layout)
        assert others == [(0, "", "")] * (ranks - 1), (ranks, layout)


def test_one_object_at_the_end_and_one_line_of_error(gang: Gang, tmp_path: Path, tokenizer: Tokenizer) -> None:
    make_run(tmp_path, run_config("hope", tokenizer.vocab_size), tokenizer)
    arguments = ["generate", str(tmp_path), "--prompt", "a", "--max-tokens", "3", "--json"]
    first, second = gang.run(jobs.command, 2, arguments=[*arguments, "parallel.tp=2"])
    assert json.loads(first[1])["tokens"] == 3
    assert second == (0, "", "")
    for wrong, named in (
        (["parallel.tp=3"], "cannot be divided"),
        (["model.d_model=8"], "the checkpoint fixes that"),
        (["--temperature", "nan"], "temperature"),
    ):
        first, second = gang.run(jobs.command, 2, arguments=[*arguments, *wrong])
        assert first[:2] == second[:2] == (2, ""), wrong
        assert named in first[2], first
        assert first[2].count("\n") == 1
