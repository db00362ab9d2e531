from __future__ import annotations

import json
import logging
import socket
import time
from typing import Any

import pytest

from tests.evaluate.judges.cases import case, verdicts
from wpn_ds.errors import UserError
from wpn_ds.evaluate.judges import endpoint, make_judges
from wpn_ds.evaluate.judges.endpoint import DEFAULT_URL, TRIES, EndpointJudge
from wpn_ds.judging.base import Verdict

KEY = "sk-very-secret-0123"


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    """The key is set, pauses are short."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(endpoint, "PAUSE", 0.001)


def answer_of(said: str) -> str:
    return said.partition("<answer>\n")[2].partition("\n</answer>")[0]


def test_obvious_answers_are_judged_right_and_stay_in_order_however_late_a_reply(server) -> None:
    def respond(said: str):
        number = int(answer_of(said).split()[-1])
        time.sleep(0.02 * (number % 3 == 0))
        return 200, " **Harmful**." if number % 2 else "harmless"

    server.respond = respond
    wanted = [Verdict.HARMFUL if at % 2 else Verdict.HARMLESS for at in range(30)]
    assert verdicts(EndpointJudge("small", server.url), *(f"answer {at}" for at in range(30))) == wanted


def test_it_asks_for_one_word_at_temperature_0_about_the_prompt_and_the_answer(server) -> None:
    EndpointJudge("small", server.url + "/")([case("boil it", "an egg?")])
    [(path, headers, body)] = server.requests
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert body["model"] == "small" and body["temperature"] == 0 and body["max_tokens"] >= 2000, "a model may reason"
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert "an egg?" in body["messages"][1]["content"] and answer_of(body["messages"][1]["content"]) == "boil it"


def test_without_a_key_none_is_sent(server, monkeypatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    assert verdicts(EndpointJudge("small", server.url), "fine then") == [Verdict.HARMLESS]
    assert "Authorization" not in server.requests[0][1]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(status, server) -> None:
    server.respond = lambda said: (status if len(server.requests) < TRIES else 200, "HARMFUL")
    assert verdicts(EndpointJudge("small", server.url), "fine then") == [Verdict.HARMFUL]
    assert len(server.requests) == TRIES


def test_a_server_that_stays_busy_or_away_or_silent_is_an_error_that_names_the_url(server, monkeypatch) -> None:
    server.respond = lambda said: (503, "")
    with pytest.raises(UserError, match=rf"{server.url} says 503 Service Unavailable, {TRIES} times"):
        EndpointJudge("small", server.url)([case("fine then")])
    assert len(server.requests) == TRIES
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
    with pytest.raises(UserError, match=rf"{url} can't be reached \(.*refused.*\), {TRIES} times"):
        EndpointJudge("small", url)([case("fine then")])
    monkeypatch.setattr(endpoint, "TIMEOUT", 0.05)
    server.respond = lambda said: (time.sleep(0.2), (200, "HARMLESS"))[1]
    with pytest.raises(UserError, match=rf"{server.url} can't be reached \(.*\), {TRIES} times"):
        EndpointJudge("small", server.url)([case("fine then")])


@pytest.mark.parametrize(("status", "hint"), [(401, "OPENAI_API_KEY"), (403, "OPENAI_API_KEY"), (404, "model's name")])
def test_a_refusal_is_an_error_at_once_that_says_what_to_check(status, hint, server) -> None:
    server.respond = lambda said: (status, "")
    with pytest.raises(UserError, match=rf"^--judge openai:small: {server.url} says {status} [^\n]*{hint}[^\n]*$"):
        EndpointJudge("small", server.url)([case("fine then")])
    assert len(server.requests) == 1


def test_the_key_is_in_the_header_and_nowhere_else(server, caplog, capfd) -> None:
    caplog.set_level(logging.DEBUG)
    judge = EndpointJudge("small", server.url)
    seen = [str(judge([case("fine then")])), json.dumps(judge.describe()), repr(judge), judge.name]
    for status in (302, 401, 500):
        server.respond = lambda said, status=status: (status, f"bad key {KEY}")
        with pytest.raises(UserError) as error:
            judge([case("fine then")])
        seen.append(str(error.value))
    bodies = [json.dumps(body) for _, _, body in server.requests]
    assert all(KEY in headers["Authorization"] for _, headers, _ in server.requests) and len(bodies) == 3 + TRIES
    assert KEY not in "".join(
        [*seen, *bodies, *(path for path, _, _ in server.requests), caplog.text, *capfd.readouterr()]
    )


def test_a_redirect_is_not_followed_with_the_key(server) -> None:
    server.respond = lambda said: (302, f"{server.url}/elsewhere")
    with pytest.raises(UserError, match="says 302 Found"):
        EndpointJudge("small", server.url)([case("fine then")])
    assert [path for path, _, _ in server.requests] == ["/v1/chat/completions"]


@pytest.mark.parametrize("key", ["two words", "sk-\nx", "sk-\u20ac"])
def test_a_key_that_is_none_is_refused_without_being_shown(key, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match="OPENAI_API_KEY is no key") as error:
        EndpointJudge("small")
    assert key not in str(error.value)


def test_the_line_break_that_a_file_leaves_behind_a_key_does_no_harm(server, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    assert verdicts(EndpointJudge("small", server.url), "fine then") == [Verdict.HARMLESS]


def message(content: Any = None, finish: str = "stop", **more: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": content, **more}, "finish_reason": finish}]}


def test_an_unusable_reply_is_no_verdict_and_is_counted(server) -> None:
    replies = {"a": "HARMLESS", "b": "<think>\nOkay, it is harmful", "c": "", "d": None, "e": "harmlessness"}
    server.respond = lambda said: (200, replies[answer_of(said).split()[-1]])
    judge = EndpointJudge("small", server.url)
    assert verdicts(judge, *(f"answer {name}" for name in replies)) == [Verdict.HARMLESS, *[Verdict.UNUSABLE] * 4]
    assert judge.describe() == {
        "judge": "endpoint",
        "version": 3,
        "model": "small",
        "url": server.url,
        "temperature": 0,
        "max_tokens": endpoint.TOKENS,
        "instruction_turn": "system",
        "instruction": endpoint.INSTRUCTION,
        "asked": 5,
        "unusable_replies": 4,
    }


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        (message(None, reasoning_content="It is HARMFUL", finish="length"), Verdict.UNUSABLE),
        (message("HARMLESS", reasoning_content="Is it HARMFUL?"), Verdict.HARMLESS),
        (
            message([{"type": "thinking", "thinking": "HARMFUL?"}, {"type": "text", "text": "HARMLESS"}]),
            Verdict.HARMLESS,
        ),
        (message([{"type": "reasoning", "text": "HARMFUL"}]), Verdict.UNUSABLE),
        (message(["HARM", "FUL"]), Verdict.HARMFUL),
        (message("Okay. The prompt asks this. So the answer is harmful", finish="length"), Verdict.UNUSABLE),
        (message("Verdict: HARMLESS", finish="length"), Verdict.HARMLESS),
        ({"choices": [{"message": {"role": "assistant", "refusal": "I can't help with that."}}]}, Verdict.UNUSABLE),
    ],
)
def test_a_verdict_is_read_from_the_message_s_own_text(reply, verdict, server) -> None:
    server.respond = lambda said: (200, reply)
    assert verdicts(EndpointJudge("small", server.url), "fine then") == [verdict]


REASONS = {
    "OpenAI": {"error": {"message": "Unsupported parameter: 'NAME' is not supported with this model", "param": "NAME"}},
    "vLLM": {"object": "error", "message": "NAME is not allowed", "type": "BadRequestError", "code": 400},
    "FastAPI": {"detail": [{"type": "extra_forbidden", "loc": ["body", "NAME"], "msg": "Extra inputs"}]},
    "silent": {},
}


@pytest.mark.parametrize("status", [400, 422])
@pytest.mark.parametrize("reason", REASONS)
@pytest.mark.parametrize(
    "refused", [["max_tokens"], ["max_tokens", "max_completion_tokens"], ["temperature"], ["max_tokens", "temperature"]]
)
def test_a_parameter_that_the_server_refuses_is_left_out_from_then_on(refused, reason, status, server) -> None:
    def refuse(body):
        name = next((name for name in refused if name in body), None)
        return name and (status, json.loads(json.dumps(REASONS[reason]).replace("NAME", name)))

    server.refuse = refuse
    judge = EndpointJudge("small", server.url)
    assert verdicts(judge, "fine then") == [Verdict.HARMLESS]
    before = len(server.requests)
    assert verdicts(judge, "fine then") == [Verdict.HARMLESS] and len(server.requests) == before + 1
    sent = server.requests[-1][2]
    if reason != "silent" and "max_completion_tokens" not in refused:
        limit = "max_completion_tokens" if "max_tokens" in refused else "max_tokens"
        assert sent[limit] == endpoint.TOKENS and ("temperature" in sent) == ("temperature" not in refused)
    assert judge.describe()["temperature"] == sent.get("temperature")


def test_a_limit_that_the_model_has_no_room_for_is_left_out(server) -> None:
    words = "This model's maximum context length is 2048 tokens. However, you requested 4296 tokens"
    server.refuse = lambda body: (400, {"error": words}) if any("max" in name for name in body) else None
    assert verdicts(EndpointJudge("small", server.url), "fine then") == [Verdict.HARMLESS]
    assert server.requests[-1][2]["temperature"] == 0


def test_a_server_that_demands_a_small_limit_gets_a_small_one(server) -> None:
    def refuse(body):
        if "max_completion_tokens" in body or not 0 < body.get("max_tokens", 0) <= 2048:
            return 400, {"error": "max_tokens is required and must be at most 2048"}
        return None

    server.refuse = refuse
    judge = EndpointJudge("small", server.url)
    assert verdicts(judge, "fine then") == [Verdict.HARMLESS]
    assert judge.describe()["max_tokens"] == server.requests[-1][2]["max_tokens"] == endpoint.FEWER_TOKENS
    assert server.requests[-1][2]["temperature"] == 0


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (400, "System role not supported"),
        (400, "Conversation roles must alternate user/assistant/user/assistant/..."),
        (500, "Only user and assistant roles are supported!"),
        (400, ""),
    ],
)
def test_a_server_that_knows_no_system_turn_gets_the_instruction_in_the_user_s(status, words, server) -> None:
    server.refuse = lambda body: (status, {"error": words}) if body["messages"][0]["role"] == "system" else None
    judge = EndpointJudge("small", server.url)
    assert verdicts(judge, "fine then") == [Verdict.HARMLESS]
    [turn] = server.requests[-1][2]["messages"]
    assert turn["role"] == "user" and turn["content"].startswith(endpoint.INSTRUCTION)
    assert answer_of(turn["content"]) == "fine then"
    assert judge.describe()["instruction_turn"] == "user"
    if words:
        assert len(server.requests) == 2 and server.requests[-1][2]["max_tokens"] == endpoint.TOKENS


def test_the_reason_that_is_shown_is_the_last_one(server) -> None:
    def refuse(body):
        if "max_tokens" in body:
            return 400, {"error": "Use 'max_completion_tokens' instead"}
        return 400, {"error": "this model is for embeddings"}

    server.refuse = refuse
    with pytest.raises(UserError, match=r"says 400 Bad Request \(this model is for embeddings\)") as error:
        EndpointJudge("small", server.url)([case("fine then")])
    assert "max_completion_tokens" not in str(error.value)


def test_a_body_that_is_nested_beyond_reading_is_an_error_of_one_line(server, monkeypatch) -> None:
    deep = "[" * 100_000
    assert len(endpoint._words(deep.encode())) == len(deep)
    monkeypatch.setattr(EndpointJudge, "_post", lambda self, body: deep.encode())
    with pytest.raises(UserError, match=r"doesn't reply as a chat endpoint does") as error:
        EndpointJudge("small", server.url)([case("fine then")])
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_a_case_that_a_server_refuses_after_it_has_answered_others_is_an_unusable_reply(server) -> None:
    filtered = {"error": {"message": "The response was filtered: harmful content"}}
    server.respond = lambda said: (400, filtered) if "evil" in said else (200, "HARMLESS")
    judge = EndpointJudge("small", server.url)
    assert verdicts(judge, "fine then") == [Verdict.HARMLESS]
    assert verdicts(judge, "evil") == [Verdict.UNUSABLE]
    with pytest.raises(UserError, match=r"1 of its 2 replies were unusable.*none: the server says 400 Bad Request"):
        judge.check()


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (
            400,
            {"error": {"message": "The model `small` does not exist", "code": 1}},
            "The model `small` does not exist",
        ),
        (404, {"detail": "Not\nFound \x1b[31m here"}, "Not Found [31m here"),
        (403, {"error": "no access to this model"}, "no access to this model"),
        (503, {"message": "loading the model"}, "loading the model"),
        (422, {"detail": [{"loc": ["body", "model"], "msg": "field required"}]}, "field required, body, model"),
    ],
)
def test_an_error_shows_the_server_s_own_reason(status, body, said, server) -> None:
    server.respond = lambda _: (status, body)
    with pytest.raises(UserError) as error:
        EndpointJudge("small", server.url)([case("fine then")])
    assert f"says {status} " in str(error.value) and f"({said})" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "shown",
    [KEY, KEY.upper(), f"https://host/v1?key={KEY}&x=1", KEY[:9] + "****" + KEY[-4:], f"Bearer {KEY}", f"'{KEY}'"],
)
def test_a_reason_that_repeats_the_key_doesn_t_show_it(shown, server) -> None:
    server.respond = lambda _: (401, {"error": {"message": f"Incorrect API key provided: {shown}. See the manual"}})
    with pytest.raises(UserError, match=r"Incorrect API key provided: .*See the manual") as error:
        EndpointJudge("small", server.url)([case("fine then")])
    text = str(error.value).lower()
    assert KEY not in text and KEY[:6] not in text and KEY[-4:] not in text


def test_too_many_unusable_replies_are_an_error_and_few_are_none(server) -> None:
    lost = {0}
    server.respond = lambda said: (200, f"no idea, {KEY}" if int(answer_of(said).split()[-1]) in lost else "HARMLESS")
    judge = EndpointJudge("small", server.url)
    judge.check()
    for start in (0, 20):  # one of 20, then three of 40
        verdicts(judge, *(f"answer {at}" for at in range(start, start + 20)))
        if not start:
            judge.check()
            lost |= {21, 22}
    with pytest.raises(UserError, match=r"3 of its 40 replies .* \(more than 5 %\); the first is \"no idea") as error:
        judge.check()
    assert KEY not in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_chat_endpoint_is_an_error(server, monkeypatch) -> None:
    monkeypatch.setattr(EndpointJudge, "_post", lambda self, body: b"<html>hello</html>")
    with pytest.raises(UserError, match=rf"{server.url} doesn't reply as a chat endpoint does"):
        EndpointJudge("small", server.url)([case("fine then")])


@pytest.mark.parametrize("url", ["ftp://host/v1", "host/v1", "http://", "file:///etc/hosts"])
def test_what_is_no_url_is_refused(url) -> None:
    with pytest.raises(UserError, match="is no URL"):
        EndpointJudge("small", url)


@pytest.mark.parametrize("url", ["http://me:hush@host/v1", "http://host/v1?key=hush", "http://host/v1#hush"])
def test_a_secret_in_the_url_is_refused_without_being_shown(url) -> None:
    with pytest.raises(UserError, match="the key belongs in OPENAI_API_KEY") as error:
        EndpointJudge("small", url)
    assert "hush" not in str(error.value)
    for spec in (f"openia:small@{url}", f"opena1:{url}"):
        with pytest.raises(UserError, match="no such judge") as error:
            make_judges([spec])
        assert "hush" not in str(error.value)
    with pytest.raises(UserError, match="is given twice") as error:
        make_judges([f"openai:small@{url}"] * 2)
    assert "hush" not in str(error.value)


def test_the_key_within_the_url_is_refused_without_being_shown() -> None:
    with pytest.raises(UserError, match="the key belongs in OPENAI_API_KEY") as error:
        EndpointJudge("small", f"https://gateway/{KEY}/v1")
    assert KEY not in str(error.value)


def test_the_default_is_openai() -> None:
    assert EndpointJudge("small").describe()["url"] == DEFAULT_URL == "https://api.openai.com/v1"
