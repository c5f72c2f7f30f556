"""lm-evaluation-harness over our model: its HFLM, none of whose methods is overridden, and its wikitext task's code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import bits_per_byte, weighted_perplexity
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer
from transformers.modeling_outputs import CausalLMOutput

from data_pipelines.tokenizer import END_OF_TEXT, Tokenizer
from hope_train.model.hope import HopeModel


class WrappedConfig(transformers.PretrainedConfig):  # type: ignore[misc]
    model_type = "hope_wrapped"


class WrappedModel(transformers.PreTrainedModel):  # type: ignore[misc]
    """What HFLM needs of a transformers model: a config, a device, and `forward(input_ids).logits`."""

    config_class = WrappedConfig

    def __init__(self, model: HopeModel) -> None:
        super().__init__(WrappedConfig(vocab_size=model.config.vocab_size))
        self.inner = model

    def forward(self, input_ids: torch.Tensor, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.inner(input_ids))

    def tie_weights(self, *_: Any, **__: Any) -> None:
        """Our model has its own way of sharing its embedding."""


class WrappedTokenizer(transformers.PreTrainedTokenizer):  # type: ignore[misc]
    """A transformers tokenizer whose tokens are the numbers of our pieces, written out. It has no BOS, like ours."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.inner = tokenizer
        super().__init__(eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)

    @property
    def vocab_size(self) -> int:
        return self.inner.vocab_size

    def get_vocab(self) -> dict[str, int]:
        return {self._convert_id_to_token(token): token for token in range(self.vocab_size)}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return [str(token) for token in self.inner.encode(text)]

    def _convert_token_to_id(self, token: str) -> int:
        return self.inner.eot_id if token == END_OF_TEXT else int(token)

    def _convert_id_to_token(self, index: int) -> str:
        return END_OF_TEXT if index == self.inner.eot_id else str(index)


def harness_model(model: HopeModel, tokenizer: Tokenizer, length: int) -> HFLM:
    """HFLM with windows of `length` tokens; it finds the prefix token itself (EOS, as there is no BOS)."""
    return HFLM(
        pretrained=WrappedModel(model),
        tokenizer=WrappedTokenizer(tokenizer),
        backend="causal",
        max_length=length,
        batch_size=2,
    )


def harness_loglikelihoods(model: HopeModel, tokenizer: Tokenizer, pages: Sequence[str], length: int) -> list[float]:
    """HFLM.loglikelihood_rolling of the pages, detokenised by the task's own function."""
    requests = [
        Instance(
            request_type="loglikelihood_rolling",
            doc={"page": page},
            arguments=(wikitext_detokenizer({"page": page}),),
            idx=number,
        )
        for number, page in enumerate(pages)
    ]
    return list(harness_model(model, tokenizer, length).loglikelihood_rolling(requests, disable_tqdm=True))


def harness_figures(loglikelihoods: Sequence[float], pages: Sequence[str]) -> dict[str, float]:
    """The task's process_results and the registered aggregations."""
    rows = [process_results({"page": page}, (ll,)) for page, ll in zip(pages, loglikelihoods, strict=True)]
    return {
        "word_ppl": weighted_perplexity([row["word_perplexity"] for row in rows]),
        "byte_ppl": weighted_perplexity([row["byte_perplexity"] for row in rows]),
        "bits_per_byte": bits_per_byte([row["bits_per_byte"] for row in rows]),
    }
