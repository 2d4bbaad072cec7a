"""Clients that people have: OpenAI's own, and lm-eval's local-completions. Skipped where they are not installed."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import NAME, Place, model_of, serving, tokenizer_of

from hybrid.evals.likelihood import ar_nll
from hybrid.training.callbacks import save_folder


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with serving(model_of(), tokenizer_of(), api_key="secret", limits={"canvas": 64}) as found:
        yield found


@pytest.fixture(scope="module")
def client(place: Place) -> Any:
    openai = pytest.importorskip("openai", reason="the client of OpenAI's is not installed")
    return openai.OpenAI(base_url=f"http://127.0.0.1:{place.port}/v1", api_key="secret", max_retries=0)


def test_openais_client_completes(client: Any) -> None:
    assert [model.id for model in client.models.list()] == [NAME] and client.models.retrieve(NAME).id == NAME
    fields: dict[str, Any] = {"model": NAME, "prompt": "one", "max_tokens": 12, "temperature": 0, "logprobs": 2}
    for mode in ("ar", "block", "diffusion", "speculative"):
        fields["extra_body"] = {"hybrid": {"mode": mode}}
        whole = client.completions.create(**fields)
        chunks = list(client.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
        text = whole.choices[0].text
        assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == text != ""
        assert whole.usage.completion_tokens == chunks[-1].usage.completion_tokens > 0
        assert whole.usage.hybrid["mode"] == mode
        parts = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices]
        told = [log for part in parts if part for log in part.token_logprobs]
        assert told == whole.choices[0].logprobs.token_logprobs
        if mode != "ar":
            fields["extra_body"] = {"hybrid": {"mode": mode, "drafts": True}}
            kinds = [chunk.object for chunk in client.completions.create(**fields, stream=True)]
            assert {"draft", "text_completion"} == set(kinds)
    gap = client.completions.create(model=NAME, prompt="def f(", suffix="):", max_tokens=4)
    assert gap.usage.completion_tokens == 4


def test_openais_client_chats(client: Any) -> None:
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "one"}]
    fields: dict[str, Any] = {"model": NAME, "messages": messages, "max_completion_tokens": 10, "n": 2, "seed": 4}
    fields |= {"temperature": 1, "logprobs": True, "top_logprobs": 1}
    whole = client.chat.completions.create(**fields)
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**fields, stream=True)]
    for choice in whole.choices:
        own = [chunk for chunk in chunks if chunk.index == choice.index]
        assert "".join(chunk.delta.content or "" for chunk in own) == choice.message.content
        assert own[-1].finish_reason == choice.finish_reason
        told = [x.token for chunk in own if chunk.logprobs for x in chunk.logprobs.content]
        assert told == [x.token for x in choice.logprobs.content]


@pytest.mark.skipif(importlib.util.find_spec("outlines_core") is None, reason="outlines-core is not installed")
def test_openais_client_parses_what_a_model_of_pydantics_says(client: Any) -> None:
    from pydantic import BaseModel

    class Answer(BaseModel):
        right: bool

    messages = [{"role": "user", "content": "one"}]
    found = client.chat.completions.parse(model=NAME, messages=messages, response_format=Answer, max_tokens=40)
    assert isinstance(found.choices[0].message.parsed, Answer)


def test_openais_client_knows_the_errors(client: Any, place: Place) -> None:
    import openai

    for raises, fields in (
        (openai.BadRequestError, {"model": NAME, "prompt": "a", "best_of": 3}),
        (openai.NotFoundError, {"model": "gpt-4", "prompt": "a"}),
        (openai.BadRequestError, {"model": NAME, "prompt": [1, 100_000]}),
    ):
        with pytest.raises(raises) as caught:
            client.completions.create(**fields)
        assert caught.value.body["message"]
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=client.base_url, api_key="wrong", max_retries=0).models.list()


def test_lm_eval_scores_and_generates(
    client: Any, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    for needed in ("tenacity", "aiohttp", "requests"):
        pytest.importorskip(needed, reason=f"{needed}, which lm-eval's client needs, is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    folder = tmp_path / "model"
    save_folder(model_of(), tokenizer_of(), folder)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    pairs = [("one", " two"), ("def add(a, b):\n", "    return a"), ("a  b", "  c"), ("one", " two three")]
    for options in ({"batch_size": 1}, {"batch_size": 3}, {"num_concurrent": 3}):
        harness = LocalCompletionsAPI(
            base_url=f"http://127.0.0.1:{place.port}/v1/completions", model=NAME, tokenizer=str(folder),
            tokenizer_backend="huggingface", max_length=256, max_retries=1, **options,
        )  # fmt: skip
        asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        scores = harness.loglikelihood(asked, disable_tqdm=True)
        for (context, target), (score, greedy) in zip(pairs, scores, strict=True):
            # It scores the white space at a context's end with what follows.
            before, whole = (harness.tok_encode(text) for text in (context.rstrip(), context + target))
            goal = torch.arange(len(whole))[None] >= len(before)
            assert score == pytest.approx(-float(ar_nll(model_of(), torch.tensor([whole]), goal)), abs=1e-4)
            assert isinstance(greedy, bool)
        rolling = harness.loglikelihood_rolling([Instance("r", {}, ("one two three",), 0)], disable_tqdm=True)
        assert rolling[0] < 0
        until = [Instance("generate_until", {}, ("one", {"until": ["e"], "max_gen_toks": 9}), 0)]
        [text] = harness.generate_until(until, disable_tqdm=True)
        ids = harness.tok_encode("one")
        assert text == client.completions.create(model=NAME, prompt=ids, max_tokens=9, stop="e").choices[0].text
