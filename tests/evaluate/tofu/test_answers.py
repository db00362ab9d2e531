"""The numbers of items on a model, against the definition one text at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.evaluate.tofu.conftest import write_tofu
from wpn_ds.errors import UserError
from wpn_ds.evaluate.answering import Asking
from wpn_ds.evaluate.tofu.data import read_tofu
from wpn_ds.evaluate.tofu.task import CHUNK, TofuAnswers
from wpn_ds.evaluate.work import Ledger
from wpn_ds.judging.rouge import tokenize
from wpn_ds.models.generate import generate
from wpn_ds.settings.style import PromptStyle

ASKING = Asking(PromptStyle("Question: {prompt}\nAnswer:"), max_length=96, max_new_tokens=6, batch_size=4)


def measured(model, tokenizer, data, asking=ASKING):
    answers = TofuAnswers(data, asking, tokenizer)
    return answers.log({unit.key: unit.run(model, tokenizer) for unit in answers.units}, "m"), answers


def one_by_one(model, tokenizer, question: str, answer: str) -> tuple[float, list[bool]]:
    """(mean loss with EOS, whether each token but EOS is the likeliest), in double precision without padding."""
    before = tokenizer(ASKING.style.template.replace("{prompt}", question), add_special_tokens=False)["input_ids"]
    after = [*tokenizer(" " + answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    model.double()
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
    model.float()
    losses = -logits.log_softmax(-1)[range(len(after)), after]
    return losses.mean().item(), (logits.argmax(-1) == torch.tensor(after)).tolist()[:-1]


@pytest.mark.parametrize("batch_size", [1, 8])
def test_numbers_are_those_of_the_definition_whatever_the_batch(model, tokenizer, tofu_dir, batch_size) -> None:
    data = read_tofu(tofu_dir)
    log, answers = measured(model, tokenizer, data, replace(ASKING, batch_size=batch_size))
    assert not answers.notes and (log.split, log.max_new_tokens) == ("forget10", 6)
    for name, items in data.items.items():
        for item, found in zip(items, log.sets[name], strict=True):
            loss, hits = one_by_one(model, tokenizer, item.question, item.answer)
            others = [one_by_one(model, tokenizer, item.question, text)[0] for text in item.perturbed]
            paraphrased = one_by_one(model, tokenizer, item.question, item.paraphrased)[0]
            assert found.loss == pytest.approx(loss, rel=1e-5)
            assert found.paraphrased_loss == pytest.approx(paraphrased, rel=1e-5)
            assert found.perturbed_losses == pytest.approx(others, rel=1e-5)
            assert found.exact_memorization == pytest.approx(sum(hits) / len(hits))
            ids = tokenizer(ASKING.style.template.replace("{prompt}", item.question))["input_ids"]
            assert found.generated == generate(model, tokenizer, [ids], max_new_tokens=6, batch_size=1)[0]
            assert found.rouge_l_recall <= len(tokenize(found.generated)) / len(tokenize(item.answer))


def test_a_model_that_knows_an_answer_by_heart_has_it_exactly(model, tokenizer, tofu_dir) -> None:
    data = read_tofu(tofu_dir)
    item = data.items["forget"][0]
    read = [*tokenizer("Question: " + item.question + "\nAnswer:")["input_ids"]]
    told = [*tokenizer(" " + item.answer)["input_ids"], tokenizer.eos_token_id]
    ids = torch.tensor([read + told])
    labels = ids.clone()
    labels[0, : len(read)] = -100
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    found, *others = measured(model, tokenizer, data, replace(ASKING, max_new_tokens=len(told)))[0].sets["forget"]
    assert (found.exact_memorization, found.extraction_strength, found.rouge_l_recall) == (1.0, 1.0, 1.0)
    assert found.generated == item.answer and found.loss < 0.1 < found.paraphrased_loss
    for other in others:
        hits = one_by_one(model, tokenizer, other.question, other.answer)[1]
        assert other.exact_memorization == pytest.approx(sum(hits) / len(hits)) and 0 < sum(hits) < len(hits)
        right = "".join("1" if hit else "0" for hit in hits).rpartition("0")[2]
        assert other.extraction_strength == pytest.approx(max(1, len(right)) / len(hits))


def test_several_ranks_give_the_numbers_of_one(model, tokenizer, tmp_path) -> None:
    data = read_tofu(write_tofu(tmp_path / "data", CHUNK + 2))
    alone = measured(model, tokenizer, data)[0]
    answers = TofuAnswers(data, ASKING, tokenizer)
    for rank in range(3):
        Ledger(tmp_path / "out", rank).run(answers.units, lambda: (model, tokenizer), world=(rank, 3), label="after")
    assert answers.log(Ledger(tmp_path / "out").read(), "m") == alone


def test_answers_that_lose_their_end_are_counted(model, tokenizer, tofu_dir) -> None:
    data = read_tofu(tofu_dir)
    notes = measured(model, tokenizer, data, replace(ASKING, max_length=24))[1].notes
    assert any("answer that lost its end to fit into 24 tokens" in note for note in notes)
    assert any("lost their start" in note for note in notes)


def test_a_model_with_damaged_weights_is_refused(model, tokenizer, tofu_dir) -> None:
    answers = TofuAnswers(read_tofu(tofu_dir, limit=1), ASKING, tokenizer)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    scoring = next(unit for unit in answers.units if "losses" in unit.name)
    with pytest.raises(UserError, match=r"forget10_perturbed.json:\d: the loss of an answer is no number"):
        scoring.run(model, tokenizer)
