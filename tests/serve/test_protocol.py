"""What the endpoints answer, held against the session that they stand on."""

import importlib.util
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracles import tiny
from serving import NAME, Place, model_of, serving, tokenizer_of
from special import KINDS

from hybrid.law import Law
from hybrid.sampling import Request, decode_all
from hybrid.sampling.display.pieces import visible
from hybrid.sampling.serve.text import Stops, Text, TokenBytes
from hybrid.texts import chat_text, decode, encode, encode_behind, encode_gaps

MODES = ("ar", "block", "diffusion", "speculative")
PROMPT = "def add(a, b):"


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with serving(model_of(), tokenizer_of(), limits={"canvas": 64}) as found:
        yield found


def alone(ids: list[int], **options: Any) -> list[int]:
    seed = options.pop("seed", None)
    return decode_all(model_of(), [Request(ids, seed=seed, **options)], budget=10_000)[0][0].tokens


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sampled", [False, True])
def test_a_completion_is_what_the_session_makes(place: Place, mode: str, sampled: bool) -> None:
    ids = encode(tokenizer_of(), PROMPT)
    options: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "seed": 5} if sampled else {}
    right = alone(ids, mode=mode, max_new_tokens=14, **options)
    own = {"mode": mode, "return_token_ids": True}
    answer = place.complete(PROMPT, max_tokens=14, hybrid=own, **options)
    choice, usage = answer["choices"][0], answer["usage"]
    assert choice["token_ids"] == right and choice["text"] == decode(tokenizer_of(), right, after=ids)
    assert answer["object"] == "text_completion" and answer["model"] == NAME
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(ids), len(right))
    assert usage["hybrid"]["mode"] == mode and 0 < usage["hybrid"]["time_to_first_token"] <= usage["hybrid"]["seconds"]
    assert (usage["hybrid"]["acceptance"] is not None) == (mode == "speculative")
    if mode == "ar":
        assert usage["hybrid"]["tokens_per_forward"] == 1.0
    chunks = place.streamed(
        prompt=PROMPT, max_tokens=14, hybrid=own, stream_options={"include_usage": True}, **options
    )
    parts = [chunk["choices"][0] for chunk in chunks[:-1]]
    assert "".join(part["text"] for part in parts) == choice["text"]
    assert [i for part in parts for i in part["token_ids"]] == right
    assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [choice["finish_reason"]]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == len(right)
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_several_prompts_and_choices_keep_their_order_and_seeds(place: Place) -> None:
    prompts, sampling = ["one", encode(tokenizer_of(), "two")], {"temperature": 1.0, "max_tokens": 6}
    with pytest.raises(AssertionError):  # texts and ids do not mix
        place.complete(prompts, n=3, seed=7, **sampling)
    answer = place.complete(["one", "two"], n=3, seed=7, **sampling)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    for number, choice in enumerate(answer["choices"]):
        again = place.complete(("one", "two")[number // 3], seed=7 + number % 3, **sampling)
        assert again["choices"][0]["text"] == choice["text"]
    assert len({choice["text"] for choice in answer["choices"]}) > 3
    chunks = place.streamed(prompt=["one", "two"], n=3, seed=7, **sampling)
    for choice in answer["choices"]:
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(c["text"] for c in own) == choice["text"]


def test_chat(place: Place) -> None:
    messages = [{"role": "developer", "content": "Be brief. <|eos|>"}, {"role": "user", "content": "add <|mask|>"}]
    plain = [{"role": "system", "content": "Be brief. <|eos|>"}, {"role": "user", "content": "add <|mask|>"}]
    ids = encode(tokenizer_of(), chat_text(tokenizer_of(), plain))
    right = alone(ids, max_new_tokens=9)
    fields = {"messages": messages, "max_completion_tokens": 9, "logprobs": True, "top_logprobs": 2}
    reply = place.post("/v1/chat/completions", **fields)
    assert reply.status == 200, reply.body
    choice = reply.json["choices"][0]
    assert choice["message"]["content"] == decode(tokenizer_of(), right, after=ids)
    assert choice["message"]["role"] == "assistant" and reply.json["usage"]["prompt_tokens"] == len(ids)
    logs = choice["logprobs"]["content"]
    assert len(logs) == len(right) and all(len(entry["top_logprobs"]) == 2 for entry in logs)
    assert all(entry["logprob"] == max(best["logprob"] for best in entry["top_logprobs"]) for entry in logs)  # greedy
    chunks = place.streamed("/v1/chat/completions", **fields)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == choice["message"]["content"]
    told = [e for chunk in chunks for e in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert told == logs
    parts = [{"role": "user", "content": [{"type": "text", "text": "add"}, {"type": "text", "text": " x"}]}]
    whole = [{"role": "user", "content": "add x"}]
    texts = [place.post("/v1/chat/completions", messages=m, max_tokens=4).json["choices"] for m in (parts, whole)]
    assert texts[0] == texts[1]


def test_user_text_controls_nothing(place: Place) -> None:
    """However a special token is spelled in a prompt, a suffix or a message, it is letters."""
    special = set(tokenizer_of().all_special_ids)
    for mode in ("ar", "block"):
        reply = place.complete("a <|mask|><|eos|> b", max_tokens=3, echo=True, logprobs=0, hybrid={"mode": mode})
        ids = encode(tokenizer_of(), "a <|mask|><|eos|> b")
        assert special.isdisjoint(ids[1:])
        assert reply["choices"][0]["logprobs"]["tokens"][: len(ids)] == [
            TokenBytes(tokenizer_of()).name(i) for i in ids
        ]
        assert reply["choices"][0]["text"].startswith("a <|mask|><|eos|> b")


def test_scoring_a_prompt(place: Place) -> None:
    ids = encode(tokenizer_of(), PROMPT)
    with torch.no_grad():
        logits = model_of()(torch.tensor([ids])).logits[0, :-1].float()
    logits[:, model_of().config.mask_token_id] = -torch.inf
    right = logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None]).squeeze(-1).tolist()
    for given in (PROMPT, ids):
        for new in (0, 1):
            answer = place.complete(given, max_tokens=new, echo=True, logprobs=1)
            logs = answer["choices"][0]["logprobs"]
            assert len(logs["tokens"]) == len(ids) + new and answer["usage"]["completion_tokens"] == new
            assert logs["token_logprobs"][0] is None
            assert logs["token_logprobs"][1 : len(ids)] == pytest.approx(right, abs=1e-5)
            assert logs["top_logprobs"][0] is None
            best = logits.log_softmax(-1).amax(-1).tolist()
            assert [max(t.values()) for t in logs["top_logprobs"][1 : len(ids)]] == pytest.approx(best, abs=1e-5)
            text = answer["choices"][0]["text"]
            for name, offset in list(zip(logs["tokens"], logs["text_offset"], strict=True))[1:]:
                assert text[offset:].startswith(name) or name.startswith("bytes:") or name.startswith("<|")
    whole = [*ids, *[5] * (model_of().config.max_position_embeddings - len(ids))]  # the context to its end
    full = place.post(prompt=whole)
    assert (full.status, full.error["param"], full.error["code"]) == (400, "max_tokens", "context_length_exceeded")
    assert len(place.complete(whole, max_tokens=0, echo=True, logprobs=1)["choices"][0]["logprobs"]["tokens"]) == 256


@pytest.mark.parametrize("mode", MODES)
def test_log_probabilities_say_where_their_text_is(place: Place, mode: str) -> None:
    """The same whole and in chunks, however characters are spread over tokens and stop strings hold text back."""
    free = place.complete("one two", max_tokens=24, hybrid={"mode": mode})["choices"][0]["text"]
    for options in ({"seed": 1, "temperature": 1.5}, {"stop": free[8:11]}, {"stop": ["\x00", free[5:] + "\x00"]}):
        fields = {"max_tokens": 24, "logprobs": 1, "hybrid": {"mode": mode}, **options}
        choice = place.complete("one two", **fields)["choices"][0]
        logs, told = choice["logprobs"], list[Any]()
        for chunk in place.streamed(prompt="one two", **fields):
            told += [chunk["choices"][0]["logprobs"]] if chunk["choices"][0]["logprobs"] else []
        assert {name: [x for part in told for x in part[name]] for name in logs} == logs
        broken = "\ufffd" in choice["text"]
        for name, offset in zip(logs["tokens"], logs["text_offset"], strict=True):
            whole = not (name.startswith(("bytes:", "<|")) or "stop" in options or broken)
            assert choice["text"][offset:].startswith(name) or not whole
        assert broken or max(logs["text_offset"]) <= len(choice["text"]) + len("".join(options.get("stop", ())))
    echoed = place.complete("naïve ☕", max_tokens=0, echo=True, logprobs=0)["choices"][0]
    assert max(echoed["logprobs"]["text_offset"]) <= len("naïve ☕")


def test_gaps(place: Place) -> None:
    tokenizer, mask = tokenizer_of(), model_of().config.mask_token_id
    ids = encode(tokenizer, "def f(") + [mask] * 5 + encode_behind(tokenizer, "): <|mask|>")
    right = alone(ids, mode="infill")
    answer = place.complete("def f(", suffix="): <|mask|>", max_tokens=5, logprobs=1)
    choice = answer["choices"][0]
    before = len(encode(tokenizer, "def f("))
    assert choice["text"] == decode(tokenizer, right[before : before + 5], after=right[:before])
    assert answer["usage"]["completion_tokens"] == 5 and answer["usage"]["prompt_tokens"] == len(ids) - 5
    assert len(choice["logprobs"]["tokens"]) == 5 and choice["finish_reason"] == "stop"
    chunks = place.streamed(prompt="def f(", suffix="): <|mask|>", max_tokens=5, logprobs=1)
    assert "".join(c["choices"][0]["text"] for c in chunks) == choice["text"]
    assert chunks[-1]["choices"][0]["logprobs"] == choice["logprobs"]
    own = {"mode": "infill", "return_token_ids": True}
    for fields in ({}, {"logprobs": 0}):  # whole and in chunks, all tokens are told once
        whole = place.complete("a<mask:2> b<mask> c", hybrid=own, **fields)["choices"][0]
        chunks = [chunk["choices"][0] for chunk in place.streamed(prompt="a<mask:2> b<mask> c", hybrid=own, **fields)]
        assert [i for chunk in chunks for i in chunk["token_ids"]] == whole["token_ids"]
        assert [chunk["logprobs"] for chunk in chunks if chunk["logprobs"]] == [whole["logprobs"]] * len(fields)
    text = "a<mask:2> b<mask> c"
    whole = alone(encode_gaps(tokenizer, text, mask), mode="infill")
    found = place.complete(text, hybrid={"mode": "infill"})["choices"][0]
    assert found["text"] == decode(tokenizer, whole) and len(found["hybrid"]["gaps"]) == 2
    for fields in (
        {"stop": "x"}, {"echo": True}, {"presence_penalty": 1}, {"response_format": {"type": "json_object"}},
        {"hybrid": {"mode": "block"}},
    ):  # fmt: skip
        reply = place.post(prompt="a", suffix="b", **fields)
        assert reply.status == 400 and next(iter(fields)).split(".")[0] in reply.error["message"] + "suffix hybrid"
    for gap in ("<mask:999999999>", "<mask:9999999999999>", "<mask:2> b<mask:9999999999999>", f"<mask:{'9' * 5000}>"):
        assert place.post(prompt=f"a{gap}", hybrid={"mode": "infill"}).status == 400
    for ids, more in (([5, *[mask] * 65], {}), ([5, *[mask] * 60], {"suffix": "b"})):  # bare ids are counted as well
        reply = place.post(prompt=ids, hybrid={"mode": "infill"}, **more)
        assert reply.status == 400 and "1 to 64 may be" in reply.error["message"]
    assert place.post(prompt="no gap", hybrid={"mode": "infill"}).status == 400
    assert place.post(prompt="a<mask>", max_tokens=3, hybrid={"mode": "infill"}).status == 400


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_a_text_before_them(place: Place, mode: str, stream: bool) -> None:
    free = place.complete("one two", max_tokens=24, hybrid={"mode": mode})["choices"][0]["text"]
    assert len(free) > 8
    for begin, end in ((5, 8), (3, 4), (6, 12)):  # across tokens, too
        stop = free[begin:end]
        fields = {"prompt": "one two", "max_tokens": 24, "stop": ["\x00never", stop], "hybrid": {"mode": mode}}
        if stream:
            parts = [chunk["choices"][0] for chunk in place.streamed(**fields)]
            text, reason = "".join(part["text"] for part in parts), parts[-1]["finish_reason"]
        else:
            choice = place.post(**fields).json["choices"][0]
            text, reason = choice["text"], choice["finish_reason"]
        assert (text, reason) == (free[: free.index(stop)], "stop")


def test_penalties_and_biases(place: Place) -> None:
    ids = encode(tokenizer_of(), "one")
    free = place.complete("one", max_tokens=20, hybrid={"return_token_ids": True})["choices"][0]["token_ids"]
    common = max(set(free), key=free.count)
    banned = place.complete("one", max_tokens=20, logit_bias={str(common): -100}, hybrid={"return_token_ids": True})
    assert common not in banned["choices"][0]["token_ids"]
    forced = place.complete("one", max_tokens=5, logit_bias={"9": 100}, hybrid={"return_token_ids": True})
    assert forced["choices"][0]["token_ids"] == [9] * 5
    for mode in MODES:
        own = {"mode": mode, "return_token_ids": True}
        fields = {"presence_penalty": 2, "frequency_penalty": 1.5, "max_tokens": 16}
        found = place.complete("one", hybrid=own, **fields)["choices"][0]["token_ids"]
        if mode in ("ar", "speculative"):
            text, expected = list(ids), []
            for _ in range(16):
                with torch.no_grad():
                    law = model_of()(torch.tensor([text])).logits[0, -1].clone()
                law[model_of().config.mask_token_id] = -torch.inf
                for token in set(expected):
                    law[token] -= 2 + 1.5 * expected.count(token)
                expected.append(int(law.argmax()))
                text.append(expected[-1])
                if expected[-1] == tokenizer_of().eos_token_id:
                    break
            assert found == expected
        assert len(set(found)) > 1


@pytest.mark.skipif(importlib.util.find_spec("outlines_core") is None, reason="outlines-core is not installed")
def test_structured_output(place: Place) -> None:
    schema = {
        "type": "object", "properties": {"a": {"enum": ["x", "yy"]}, "b": {"type": "boolean"}},
        "required": ["a", "b"], "additionalProperties": False,
    }  # fmt: skip
    asked = {"type": "json_schema", "json_schema": {"name": "pair", "schema": schema, "strict": True}}
    texts = {}
    for mode in MODES:
        for sampled in ({}, {"temperature": 1.5, "seed": 1}):
            answer = place.complete("one", max_tokens=60, response_format=asked, hybrid={"mode": mode}, **sampled)
            choice = answer["choices"][0]
            if choice["finish_reason"] == "stop":
                found = json.loads(choice["text"])
                assert set(found) == {"a", "b"} and found["a"] in ("x", "yy") and isinstance(found["b"], bool)
            texts[mode, bool(sampled)] = choice["text"]
        format_ = {"type": "regex", "regex": "[0-9]{3}-(yes|no)"}
        found = place.complete("one", max_tokens=20, response_format=format_, hybrid={"mode": mode})["choices"][0]
        digits, word = found["text"].split("-")
        assert digits.isdigit() and len(digits) == 3 and word in ("yes", "no") and found["finish_reason"] == "stop"
    assert texts["ar", False] == texts["speculative", False]
    plain = place.complete("one", max_tokens=5)["choices"][0]["text"]
    assert place.complete("one", max_tokens=5, response_format={"type": "text"})["choices"][0]["text"] == plain
    for bad in (
        {"type": "regex", "regex": "("}, {"type": "regex"}, {"type": "json_schema"}, {"type": "xml"},
        {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}},
        {"type": "json_schema", "json_schema": {"schema": {"$ref": "file:///etc/passwd"}}},
    ):  # fmt: skip
        reply = place.post(prompt="one", response_format=bad)
        assert reply.status == 400 and reply.error["param"].startswith("response_format"), reply.body


@pytest.mark.parametrize("mode", MODES)
def test_drafts_come_as_events_of_their_own(place: Place, mode: str) -> None:
    fields: dict[str, Any] = {"prompt": "one", "max_tokens": 12}
    plain = place.complete(hybrid={"mode": mode, "return_token_ids": True}, **fields)["choices"][0]
    events = list(place.events(hybrid={"mode": mode, "drafts": True}, **fields))
    text = "".join(data["choices"][0]["text"] for kind, data in events if kind == "message")
    assert text == plain["text"]
    shown = list[str]()
    for kind, data in events:
        if kind == "draft":
            assert len(shown) - 3 <= data["place"] <= len(shown)  # the rest of a character changes what was before it
            assert len(data["confidence"]) == len(data["settled"]) + len(data["window"])
            shown[data["place"] :] = data["settled"]
    assert len(shown) == len(plain["token_ids"]) and "".join(shown) == visible(plain["text"])
    hidden = [d for kind, d in events if kind == "draft" and d["window"]]
    assert bool(hidden) == (mode != "ar")


def test_what_it_is_said_to_be(place: Place) -> None:
    card = place.get("/v1/models").json["data"][0]
    assert card["id"] == NAME and card["hybrid"]["modes"] == list(Law.of(model_of().config).modes)
    assert place.get(f"/v1/models/{NAME}").json == card and place.get("/v1/models/x").status == 404
    assert place.get("/health").json["status"] == "ok"
    place.complete("one", max_tokens=4, hybrid={"mode": "speculative"})
    page = place.get("/metrics").body.decode()
    for name in (
        "hybrid_queue", "hybrid_active_rows", "hybrid_tokens_per_second", "hybrid_time_to_first_token_seconds_bucket",
        "hybrid_time_per_token_seconds_bucket", "hybrid_acceptance_bucket", "hybrid_tokens_per_forward_bucket",
        "hybrid_requests_total", "hybrid_forwards_total",
    ):  # fmt: skip
        assert f"\n{name}" in page, name


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_a_stream_are_the_text(kind: str) -> None:
    """Token by token, with characters that are spread over several, and whatever a model may write."""
    tokenizer = tokenizer_of(kind)
    source = torch.Generator().manual_seed(0)
    sample = "one two  def f(x):\n  café ☕ 漢字 <s> a" if kind not in ("characters", "unigram") else "one two  def a"
    prompt = encode(tokenizer, "a b")
    special = set(tokenizer.all_special_ids)
    cases = [encode_behind(tokenizer, sample)]
    cases += [torch.randint(len(tokenizer), (30,), generator=source).tolist() for _ in range(20)]
    for tokens in cases:
        text = Text(tokenizer, prompt)
        pieces = []
        for token in tokens:
            text.add([token])
            pieces.append(text.take())
        pieces.append(text.take(last=True))
        whole = "".join(pieces)
        right = decode(tokenizer, tokens, after=prompt)
        # SentencePiece takes back characters when bytes follow that make none.
        if special.isdisjoint(tokens) and not (kind == "llama_2" and "\ufffd" in right):
            assert whole == right
        assert all(not piece.endswith("\N{REPLACEMENT CHARACTER}") for piece in pieces[:-1]) or "\ufffd" in right
    spelled = b"".join(map(TokenBytes(tokenizer), cases[0])).decode()
    assert spelled in (sample, " " + sample)


def test_what_may_become_a_stop_string_is_held_back() -> None:
    tokenizer = tokenizer_of("characters")
    letters = {letter: tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "abdeo"}
    text = Text(tokenizer, (), ["aab", "od"])
    said = []
    for letter in "aaaobdaab":
        text.add([letters[letter]])
        said.append(text.take())
    assert said == ["", "", "a", "aa", "ob", "d", "", "", ""]
    assert "".join(said) == "aaaobd" and text.stopped and text.take(last=True) == ""
    held = Text(tokenizer, (), ["aab"])
    criterion = Stops(held, 2)
    assert not criterion(torch.tensor([[0, 0, letters["a"], letters["a"]]]), None)
    assert held.take() == "" and held.take(last=True) == "aa"


def test_other_kinds_of_models() -> None:
    for clean in ("block", "full"):
        with serving(model_of(clean=clean), tokenizer_of(), limits={"canvas": 32}) as place:
            card = place.get("/v1/models").json["data"][0]["hybrid"]
            for mode in card["modes"]:
                choice = place.complete("one two", max_tokens=10, hybrid={"mode": mode})["choices"][0]
                assert isinstance(choice["text"], str)
            assert place.post(prompt="a", max_tokens=0, echo=True, logprobs=1).status == 400
            if clean == "full":
                assert place.post(prompt="a", hybrid={"mode": "ar"}).status == 400
    bare = tiny(3)
    with serving(bare, None) as place:
        answer = place.complete([1, 2, 3], max_tokens=6, logprobs=1)["choices"][0]
        assert len(answer["token_ids"]) <= 6 and answer["text"] == "" and answer["logprobs"]["tokens"][0].isdigit()
        ids = [i for c in place.streamed(prompt=[1, 2, 3], max_tokens=6) for i in c["choices"][0]["token_ids"]]
        assert ids == answer["token_ids"]
        assert place.post(prompt=[1, 2, 3], echo=True).error["param"] == "echo"
        assert place.post(prompt="text").error["message"].startswith("prompt: this model has no tokenizer")
        assert place.post("/v1/chat/completions", messages=[{"role": "user", "content": "a"}]).status == 400
    pure = tiny(3, mask_token_id=None)
    with serving(pure, None) as place:
        assert place.complete([1, 2], max_tokens=3)
        assert "mask token" in place.post(prompt=[1, 2], hybrid={"mode": "block"}).error["message"]
