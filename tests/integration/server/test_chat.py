"""Chats over a real server, a real Valkey, a worker's thread and its real engine process, by the official client."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import redis
import torch
import transformers

from jobs import chat as wire
from jobs.db import Database
from local.postgres import Postgres
from local.valkey import Valkey
from lomo_core import events as engine
from tests.support.tiny_model import TOOL_TEMPLATE, make_tiny_model
from worker.chat import _BASE_BYTES, ChatService
from worker.settings import WorkerSettings

from ...conftest import KnownShapes, WaitUntil, fresh_database
from .conftest import HOST, MODEL, Site, make_settings, register_host, running_site

pytestmark = pytest.mark.slow

CHAT_MODEL = "tiny-chat"
PLAIN_MODEL = "plain"  # without a template
LONG_MODEL = "tiny-long"  # with a context for answers that take long
QUESTION = [{"role": "user", "content": "what goes with sun?"}]
# A greedy answer of the untrained model repeats itself, so stop texts and comparisons take a sampled one.
SAMPLED = {"model": CHAT_MODEL, "messages": QUESTION, "seed": 7, "temperature": 1.0, "max_tokens": 24}
_WAIT_S = 60.0

StartChats = Callable[..., ChatService]


@dataclass(frozen=True, slots=True)
class Chats:
    """A site and the part of a worker that answers its chats; a model that is loaded stays for the next test."""

    site: Site
    service: ChatService


@pytest.fixture(scope="module")
def chats(
    postgres_server: Postgres,
    template_database: str,
    known_shapes: KnownShapes,
    wait_until: WaitUntil,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Chats]:
    """What most of these tests share, with a broker that no other test empties; each model takes some 3 s to load."""
    folder = tmp_path_factory.mktemp("chats")
    broker = Valkey(folder / "valkey", log_path=folder / "valkey.log")
    broker.start()
    with fresh_database(postgres_server, template_database) as database_url:
        settings = make_settings(database_url, broker.broker_url, data_dir=folder / "data", known_shapes=known_shapes)
        with running_site(settings, wait_until) as site, answering(site, available_bytes=2**36) as service:
            yield Chats(site, service)
    broker.stop()


@pytest.fixture
def start_chats(site: Site) -> Iterator[StartChats]:
    """Start the part of a worker that answers chats, with settings of the test's own."""
    with ExitStack() as started:
        yield lambda **changes: started.enter_context(answering(site, **changes))


@contextmanager
def answering(site: Site, *, available_bytes: int = 2**36, **changes: Any) -> Iterator[ChatService]:
    """A service on a host with so much room, and the models that the tests chat with."""
    models = site.settings.data_dir / "models"
    # Of this seed the likeliest tokens are not all the same one.
    make_tiny_model(models / CHAT_MODEL, seed=12)
    (make_tiny_model(models / PLAIN_MODEL) / "chat_template.jinja").unlink()
    give_long_context(make_tiny_model(models / LONG_MODEL, seed=12))
    register_host(site.db, HOST, available_bytes=available_bytes)
    names = ("database_url", "broker_url", "data_dir")
    settings = WorkerSettings(
        **{name: getattr(site.settings, name) for name in names}, worker_name=HOST, engine_threads=1, **changes
    )
    db = Database(settings.database_url)
    service = ChatService(db, settings)
    service.start()
    with valkey(site) as broker:
        site.wait_until(lambda: broker.zcard(wire.HOSTS_KEY), _WAIT_S, "the worker")
    yield service
    service.close()
    db.dispose()


def give_long_context(folder: Path) -> None:
    """Let the model write 4096 tokens, which takes it far longer than what is waited for here."""
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 8192}))


@pytest.fixture
def client(chats: Chats) -> Iterator[openai.OpenAI]:
    """The official client with its strict validation on, without retries."""
    with openai.OpenAI(
        api_key=chats.site.key, base_url=f"{chats.site.url}/v1", _strict_response_validation=True, max_retries=0
    ) as client:
        yield client


def valkey(site: Site) -> Any:
    return redis.Redis.from_url(wire.client_url(site.settings.broker_url), decode_responses=True)


def post(site: Site, **body: Any) -> httpx.Response:
    return site.client(timeout=_WAIT_S).post("/v1/chat/completions", json={"model": CHAT_MODEL, **body})


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    return error


def greedy_answer(folder: Path, *, num_tokens: int) -> tuple[int, str]:
    """Tokens of the prompt and the answer's text, by transformers alone, token by token without a cache."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=True)["input_ids"]
    num_prompt = len(ids)
    with torch.inference_mode():
        for _ in range(num_tokens):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return num_prompt, tokenizer.decode(ids[num_prompt:], skip_special_tokens=True)


def test_the_official_client_plain_and_streaming(chats: Chats, client: openai.OpenAI) -> None:
    create: Any = client.chat.completions.create

    greedy = create(model=CHAT_MODEL, messages=QUESTION, temperature=0, max_tokens=10)
    num_prompt, text = greedy_answer(chats.site.settings.data_dir / "models" / CHAT_MODEL, num_tokens=10)
    assert greedy.choices[0].message.content == text
    assert greedy.choices[0].finish_reason == "length"
    assert (greedy.usage.prompt_tokens, greedy.usage.completion_tokens) == (num_prompt, 10)
    assert (greedy.object, greedy.model) == ("chat.completion", CHAT_MODEL)

    plain = create(**SAMPLED)
    chunks = list(create(**SAMPLED, stream=True, stream_options={"include_usage": True}))
    content = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert content == plain.choices[0].message.content
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-2:] == [None, "length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == plain.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert create(**(SAMPLED | {"seed": 8})).choices[0].message.content != content

    stop = content[5:8]
    stopped = create(**SAMPLED, stop=[stop, "never written"])
    assert stopped.choices[0].message.content == content[: content.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    assert create(**(SAMPLED | {"top_p": 1e-6, "max_tokens": 10})).choices[0].message.content == text
    assert chats.service.is_loaded


def test_several_answers_to_one_question(chats: Chats, client: openai.OpenAI) -> None:
    create: Any = client.chat.completions.create
    one, next_one = (create(**(SAMPLED | {"seed": seed})) for seed in (7, 8))
    both = create(**SAMPLED, n=2)
    texts = [one.choices[0].message.content, next_one.choices[0].message.content]
    assert [(choice.index, choice.message.content) for choice in both.choices] == list(enumerate(texts))
    assert both.usage.prompt_tokens == one.usage.prompt_tokens
    assert both.usage.completion_tokens == one.usage.completion_tokens + next_one.usage.completion_tokens

    chunks = list(create(**SAMPLED, n=2, stream=True, stream_options={"include_usage": True}))
    streamed, ends = ["", ""], []
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        streamed[choice.index] += choice.delta.content or ""
        ends += [choice.index] * (choice.finish_reason is not None)
    assert (streamed, ends) == (texts, [0, 1])
    assert chunks[-1].usage == both.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_bytes_of_a_stream(chats: Chats) -> None:
    response = post(chats.site, messages=QUESTION, stream=True, max_completion_tokens=2, temperature=0)
    assert response.headers["content-type"].startswith("text/event-stream")
    frames = response.text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    bodies = [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]
    assert {body["object"] for body in bodies} == {"chat.completion.chunk"}
    assert bodies[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert bodies[-1]["choices"] == [{"index": 0, "delta": {}, "finish_reason": "length", "logprobs": None}]
    assert not any("usage" in body for body in bodies)


@pytest.mark.parametrize(
    ("changes", "param", "text"),
    [
        ({"n": 9}, "n", "less than or equal to 8"),
        ({"moderation": {"model": "x"}}, "moderation", "nothing is moderated"),
        ({"tool_choice": "required"}, "tool_choice", "the model alone decides"),
        ({"functions": [{"name": "look"}]}, "functions", "give the functions as tools"),
        ({"logprobs": True}, "logprobs", "not returned"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "penalties are not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "only plain text"),
        ({"max_tokens": 5000}, "max_tokens", "4096"),
        ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4"),
        ({"temprature": 1}, "temprature", "Unknown key"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0", "needs a tool_call_id"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages.0", "needs content"),
    ],
)
def test_what_would_change_the_answer_is_refused(site: Site, changes: dict[str, Any], param: str, text: str) -> None:
    response = post(site, **({"messages": QUESTION} | changes))
    assert response.status_code == 400
    assert error_of(response)["param"] == param
    assert text in error_of(response)["message"]


def test_what_changes_nothing_is_accepted(chats: Chats) -> None:
    echoed = {"role": "assistant", "content": "day", "refusal": None, "tool_calls": None, "annotations": []}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "what goes "}, {"type": "text", "text": "with sun?"}]},
        echoed,
        *QUESTION,
    ]
    response = post(
        chats.site,
        messages=messages,
        max_tokens=1,
        n=1,
        user="u",
        metadata={"a": "b"},
        store=False,
        frequency_penalty=0,
        presence_penalty=0.0,
        logit_bias=None,
        moderation=None,
        prompt_cache_options={"mode": "auto"},
        tools=[],
        tool_choice="auto",
        response_format={"type": "text"},
    )
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["completion_tokens"] == 1


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def teach(folder: Path, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> None:
    """Train a model until it goes through this conversation by heart."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer.apply_chat_template(messages, tools=tools, return_dict=True)["input_ids"]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(300):
            loss = model(ids, labels=ids).loss
            if loss < 0.02:
                break
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert loss < 0.02
    model.save_pretrained(folder)


def test_a_model_that_calls_a_function(chats: Chats, client: openai.OpenAI) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": {"word": "sun"}}}
    answered = {"role": "tool", "tool_call_id": "call_1", "content": "day"}
    conversation = [*QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}, answered]
    folder = make_tiny_model(chats.site.settings.data_dir / "models" / "caller", template=TOOL_TEMPLATE)
    teach(folder, [*conversation, {"role": "assistant", "content": "It is day."}], [TOOL])
    create: Any = client.chat.completions.create
    body = {"model": "caller", "tools": [TOOL], "temperature": 0, "max_tokens": 128}

    asked = create(**body, messages=QUESTION)
    assert asked.choices[0].finish_reason == "tool_calls"
    message = asked.choices[0].message
    assert (message.content, [each.function.name for each in message.tool_calls]) == (None, ["look"])
    assert json.loads(message.tool_calls[0].function.arguments) == {"word": "sun"}
    told = create(
        **body, messages=[*QUESTION, message.to_dict(), answered | {"tool_call_id": message.tool_calls[0].id}]
    )
    assert (told.choices[0].message.content, told.choices[0].finish_reason) == ("It is day.", "stop")

    *_, called, end = create(**body, messages=QUESTION, stream=True)
    assert called.choices[0].delta.tool_calls[0].function.to_dict() == message.tool_calls[0].function.to_dict()
    assert end.choices[0].finish_reason == "tool_calls"


def test_a_template_without_tools_is_told_of_none(chats: Chats) -> None:
    for model in (CHAT_MODEL, PLAIN_MODEL):
        refused = post(chats.site, model=model, messages=QUESTION, tools=[TOOL])
        assert (refused.status_code, error_of(refused)["code"]) == (400, "invalid_messages")
        assert "template" in error_of(refused)["message"]
    unasked = post(chats.site, messages=QUESTION, tools=[TOOL], tool_choice="none", max_tokens=1)
    assert unasked.status_code == 200


def test_what_only_the_model_can_tell(chats: Chats) -> None:
    long = post(chats.site, messages=[{"role": "user", "content": "word " * 2000}])
    assert (long.status_code, error_of(long)["code"]) == (400, "context_length_exceeded")
    assert "context is 512 tokens" in error_of(long)["message"]
    asked = post(chats.site, messages=QUESTION, max_tokens=510, stream=True)
    assert (asked.status_code, error_of(asked)["code"]) == (400, "context_length_exceeded")
    unknown = chats.site.client().post("/v1/chat/completions", json={"model": "no/such", "messages": QUESTION})
    assert (unknown.status_code, error_of(unknown)["code"]) == (404, "model_not_found")
    broken = post(chats.site, model=MODEL, messages=QUESTION)  # its weights are no weights
    assert (broken.status_code, error_of(broken)["code"]) == (400, "invalid_model")


def test_a_base_model_without_a_template_gets_a_plain_one(chats: Chats) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(chats.site.settings.data_dir / "models" / PLAIN_MODEL)
    assert tokenizer.chat_template is None
    messages = [{"role": "system", "content": "Be brief."}, *QUESTION]
    response = post(chats.site, model=PLAIN_MODEL, messages=messages, max_tokens=1)
    expected = "System: Be brief.\n\nUser: what goes with sun?\n\nAssistant:"
    assert response.json()["usage"]["prompt_tokens"] == len(tokenizer(expected).input_ids)


def test_a_job_that_needs_the_room_gets_it(chats: Chats) -> None:
    site, service = chats.site, chats.service
    assert post(site, model=PLAIN_MODEL, messages=QUESTION, max_tokens=1).is_success
    service.make_room()
    assert post(site, model=PLAIN_MODEL, messages=QUESTION, max_tokens=1).is_success
    assert service.is_loaded  # there was room for both
    register_host(site.db, HOST, available_bytes=2**28)
    try:
        service.make_room()
        site.wait_until(lambda: not service.is_loaded, 10, "the model to go")
    finally:
        register_host(site.db, HOST, available_bytes=2**36)


def ask_in_turn(site: Site, service: ChatService, *models: str) -> list[psutil.Process]:
    """The processes that answer one question after the other."""
    processes = []
    for model in models:
        assert post(site, model=model, messages=QUESTION, max_tokens=1).is_success
        processes.append(psutil.Process(service.engine_pid))
    return processes


def test_a_model_and_its_base_stay_loaded_side_by_side(chats: Chats) -> None:
    site, service = chats.site, chats.service
    tuned, base, tuned_again, base_again = ask_in_turn(site, service, *[CHAT_MODEL, PLAIN_MODEL] * 2)
    assert (tuned_again, base_again) == (tuned, base)
    assert tuned != base
    # A third takes the place of the one that nobody has asked for longest.
    third, base_again = ask_in_turn(site, service, LONG_MODEL, PLAIN_MODEL)
    assert base_again == base
    assert third.is_running()
    assert not tuned.is_running()


def test_a_job_that_needs_the_room_of_one_gets_that_of_the_one_used_before(chats: Chats) -> None:
    site, service = chats.site, chats.service
    first, second = ask_in_turn(site, service, CHAT_MODEL, PLAIN_MODEL)
    register_host(site.db, HOST, available_bytes=_BASE_BYTES * 3 // 2)
    try:
        service.make_room()
        site.wait_until(lambda: not first.is_running(), 10, "the first model to go")
        assert second.is_running()
    finally:
        register_host(site.db, HOST, available_bytes=2**36)


def test_a_second_model_stays_only_where_there_is_room_for_both(site: Site, start_chats: StartChats) -> None:
    # A tiny model takes the process around it: of some 700 MiB there is room for one, and not for two.
    service = start_chats(available_bytes=_BASE_BYTES * 3 // 2)
    first, second = ask_in_turn(site, service, CHAT_MODEL, LONG_MODEL)
    assert second.is_running()
    assert not first.is_running()


def test_a_tuned_model_and_a_checkpoint_answer(chats: Chats) -> None:
    site = chats.site
    run = site.run(suffix="docs")
    run.start()
    data_dir = site.settings.data_dir
    checkpoint = f"runs/{run.job_id}/attempt-1/checkpoints/step-5"
    make_tiny_model(data_dir / checkpoint, seed=6)
    make_tiny_model(data_dir / f"runs/{run.job_id}/model", seed=9)
    run.say(engine.Checkpoint(step=5, path=checkpoint, manifest_sha256="0" * 64, num_bytes=7, train_loss=2.0))
    name = run.succeed()
    texts = []
    for model, folder in ((f"{name}:ckpt-step-5", checkpoint), (name, f"runs/{run.job_id}/model")):
        response = post(site, model=model, messages=QUESTION, max_tokens=6, temperature=0)
        assert response.status_code == 200, response.text
        texts.append(response.json()["choices"][0]["message"]["content"])
        assert texts[-1] == greedy_answer(data_dir / folder, num_tokens=6)[1]
    assert texts[0] != texts[1]
    absent = post(site, model=f"{name}:ckpt-step-6", messages=QUESTION)
    assert (absent.status_code, error_of(absent)["code"]) == (404, "model_not_found")


def test_a_client_that_leaves_ends_the_generation(chats: Chats) -> None:
    site = chats.site
    body = {"model": LONG_MODEL, "messages": QUESTION, "stream": True, "max_tokens": 4096, "temperature": 0}
    with site.client(timeout=_WAIT_S).stream("POST", "/v1/chat/completions", json=body) as response:
        first = json.loads(next(response.iter_lines()).removeprefix("data: "))

    def last_event() -> Any:
        with valkey(site) as broker:
            found = broker.xrevrange(wire.answer_key(first["id"]), count=1)
        return json.loads(found[0][1]["event"]) if found else {}

    site.wait_until(lambda: last_event().get("code") == "reader_gone", 10, "the worker to notice")
    short = body | {"stream": False, "max_tokens": 1}
    assert site.client(timeout=10).post("/v1/chat/completions", json=short).is_success


def test_an_answer_that_takes_too_long_ends(chats: Chats, monkeypatch: pytest.MonkeyPatch) -> None:
    site, service = chats.site, chats.service
    assert post(site, model=LONG_MODEL, messages=QUESTION, max_tokens=1).is_success
    engine = psutil.Process(service.engine_pid)
    monkeypatch.setattr("worker.chat.ANSWER_TIMEOUT_S", 0.5)
    response = post(site, model=LONG_MODEL, messages=QUESTION, max_tokens=4096, temperature=0)
    assert (response.status_code, error_of(response)["code"]) == (504, "timeout")
    assert not engine.is_running()
    broken = post(site, model=LONG_MODEL, messages=QUESTION, max_tokens=4096, temperature=0, stream=True)
    assert broken.status_code == 504  # while it is loaded again, nothing has been sent yet


def test_a_killed_engine_costs_one_answer(chats: Chats) -> None:
    site, service = chats.site, chats.service
    assert post(site, model=LONG_MODEL, messages=QUESTION, max_tokens=1).is_success
    assert service.engine_pid is not None
    os.kill(service.engine_pid, signal.SIGSTOP)  # so that the answer certainly has not begun when it dies
    body = {"model": LONG_MODEL, "messages": QUESTION, "stream": True}
    follower = site.client(timeout=_WAIT_S)
    with valkey(site) as broker:
        # Answers of chats before this one stay for a while.
        known = set(broker.keys("lomo:chat:answer:*"))
        results: list[httpx.Response] = []
        thread = threading.Thread(
            target=lambda: results.append(follower.post("/v1/chat/completions", json=body)), daemon=True
        )
        thread.start()
        site.wait_until(lambda: set(broker.keys("lomo:chat:answer:*")) - known, 10, "the worker to take it")
        os.kill(service.engine_pid, signal.SIGKILL)
        thread.join(_WAIT_S)
    assert (results[0].status_code, error_of(results[0])["code"]) == (500, "engine_failed")
    assert post(site, model=LONG_MODEL, messages=QUESTION, max_tokens=1).is_success


def test_an_error_after_the_first_words_reaches_the_official_client(chats: Chats, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=LONG_MODEL, messages=QUESTION, max_tokens=4096, temperature=0, stream=True
    )
    next(stream)
    assert chats.service.engine_pid is not None
    os.kill(chats.service.engine_pid, signal.SIGKILL)
    with pytest.raises(openai.APIError, match="has ended"):
        list(stream)


def test_without_a_worker(site: Site) -> None:
    make_tiny_model(site.settings.data_dir / "models" / CHAT_MODEL)
    response = post(site, messages=QUESTION)
    assert (response.status_code, error_of(response)["code"]) == (503, "no_worker")
    assert response.headers["retry-after"] == "5"


def test_a_full_queue(site: Site) -> None:
    make_tiny_model(site.settings.data_dir / "models" / CHAT_MODEL)
    with valkey(site) as broker:
        broker.zadd(wire.HOSTS_KEY, {"slow": 2**40})
        broker.rpush(wire.QUEUE_KEY, *["{}"] * wire.MAX_QUEUED)
        response = post(site, messages=QUESTION)
        assert (response.status_code, error_of(response)["code"]) == (429, "busy")
        assert response.headers["retry-after"] == "5"
        assert broker.llen(wire.QUEUE_KEY) == wire.MAX_QUEUED


def test_a_queued_chat_that_nobody_waits_for_is_taken_back(site: Site) -> None:
    make_tiny_model(site.settings.data_dir / "models" / CHAT_MODEL)
    with valkey(site) as broker:
        broker.zadd(wire.HOSTS_KEY, {"slow": 2**40})
        with pytest.raises(httpx.ReadTimeout):
            site.client(timeout=1.5).post("/v1/chat/completions", json={"model": CHAT_MODEL, "messages": QUESTION})
        site.wait_until(lambda: broker.llen(wire.QUEUE_KEY) == 0, 10, "the queue to be empty")


def test_a_model_that_does_not_fit_beside_the_jobs(site: Site, start_chats: StartChats) -> None:
    service = start_chats(available_bytes=2**28)
    response = post(site, messages=QUESTION)
    assert (response.status_code, error_of(response)["code"]) == (503, "no_room")
    assert f"{HOST} has 0.2 GiB free beside its running jobs" in error_of(response)["message"]
    assert not service.is_loaded


def test_an_idle_model_goes(site: Site, start_chats: StartChats) -> None:
    service = start_chats(chat_idle_s=0)
    assert post(site, messages=QUESTION, max_tokens=1).is_success
    site.wait_until(lambda: not service.is_loaded, 10, "the model to go")
