"""The chunked head's losses and gradients are those of the full logits, of which no more than a chunk ever exists."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig, MptConfig

from tests.models.shapes import Shapes
from wpn_ds.losses.likelihood import UNFINISHED, Distribution, Finish, Tokens, TopK
from wpn_ds.models import packed as head_module
from wpn_ds.models.packed import AnswerHead, Parts, finish_of

WIDTH, VOCABULARY = 3, 23
several = settings(max_examples=40)
PARTS = st.lists(st.tuples(st.sampled_from(["tokens", "distribution", "topk"]), st.integers(0, 9)), max_size=4)


@dataclass
class Case:
    """A head, states to predict from, and parts with the plain fp64 losses of each from full logits."""

    head: AnswerHead
    hidden: Tensor
    parts: Parts
    plain: list[Callable[[Tensor], Tensor]]

    @classmethod
    def make(
        cls,
        kinds: list[tuple[str, int]],
        bias: bool,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        finish: Finish = UNFINISHED,
    ) -> Case:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).clamp(-1.5, 1.5).to(dtype)

        linear = nn.Linear(WIDTH, VOCABULARY, bias=bias)
        linear.weight, other = nn.Parameter(random(VOCABULARY, WIDTH)), random(VOCABULARY, WIDTH)
        if bias:
            linear.bias = nn.Parameter(random(VOCABULARY))
        parts, plain, at = [], [], 0
        for kind, n in kinds:
            own, ids, states = slice(at, at + n), torch.randint(VOCABULARY, (n,), generator=generator), random(n, WIDTH)
            logp = torch.log_softmax((states @ other.T).double(), 1)
            if kind == "tokens":
                parts.append((own, Tokens(ids)))
                plain.append(lambda logp, ids=ids: -logp.gather(1, ids[:, None]).squeeze(1))
            elif kind == "distribution":
                parts.append((own, Distribution(states, other)))
                plain.append(lambda logp, t=logp: (t.exp() * (t - logp)).sum(1))
            else:  # all tokens but one: the full divergence
                best = logp.topk(VOCABULARY - 1)
                parts.append((own, TopK(best.indices, best.values)))
                plain.append(lambda logp, t=logp: (t.exp() * (t - logp)).sum(1))
            at += n
        return cls(AnswerHead(linear, finish), random(at, WIDTH).requires_grad_(), parts, plain)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.hidden, *self.head.parameters()]

    def expected(self) -> Tensor:
        bias = None if self.head.bias is None else self.head.bias.double()
        logits = nn.functional.linear(self.hidden.double(), self.head.weight.double(), bias) * self.head.finish.scale
        if (cap := self.head.finish.cap) is not None:
            logits = cap * torch.tanh(logits / cap)
        logp = torch.log_softmax(logits, 1)
        return torch.cat([of(logp[own]) for (own, _), of in zip(self.parts, self.plain, strict=True)])


@pytest.fixture(params=[1, 4, 100])
def chunk(request, monkeypatch) -> int:
    monkeypatch.setattr(head_module, "CHUNK", request.param)
    return request.param


def close(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    assert len(got) == len(expected)
    for mine, its in zip(got, expected, strict=True):
        assert mine.shape == its.shape
        assert (mine.double() - its.double()).abs().max() <= tolerance * its.double().abs().max().clamp(min=1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("fused", [False, True], ids=["recomputed", "fused"])
def test_losses_and_gradients_are_those_of_full_logits_for_any_mixture_of_parts(chunk, bias, fused) -> None:
    @several
    @given(kinds=PARTS.filter(lambda kinds: sum(n for _, n in kinds) > 0), seed=st.integers(0, 99))
    def holds(kinds, seed) -> None:
        case = Case.make(kinds, bias, seed)
        expected = case.expected()
        weights = torch.randn(len(expected), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        plain = torch.autograd.grad(3 * (weights * expected).sum(), case.leaves)
        losses, total = case.head(case.hidden, case.parts, weights if fused else None)
        assert (losses.requires_grad, total.requires_grad) == (not fused, fused)
        close([losses], [expected], 1e-9)
        if fused:
            close([total], [(weights * expected).sum()], 1e-9)
        else:
            assert total == 0
        loss = total if fused else (weights * losses).sum()
        close(list(torch.autograd.grad(3 * loss, case.leaves)), list(plain), 1e-8)

    holds()


@pytest.mark.parametrize("finish", [Finish(0.25), Finish(cap=2.0), Finish(0.5, 1.5)])
@pytest.mark.parametrize("fused", [False, True], ids=["recomputed", "fused"])
def test_what_a_model_makes_of_its_head_s_output_is_in_losses_and_gradients(fused, finish) -> None:
    case = Case.make([("tokens", 3), ("distribution", 2), ("topk", 4)], bias=True, finish=finish)
    expected = case.expected()
    assert not torch.allclose(expected, Case.make([("tokens", 3), ("distribution", 2), ("topk", 4)], True).expected())
    weights = torch.randn(len(expected), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plain = torch.autograd.grad((weights * expected).sum(), case.leaves)
    losses, total = case.head(case.hidden, case.parts, weights if fused else None)
    close([losses], [expected], 1e-9)
    loss = total if fused else (weights * losses).sum()
    close(list(torch.autograd.grad(loss, case.leaves)), list(plain), 1e-8)


def test_a_starting_model_s_distribution_is_that_of_its_finished_logits() -> None:
    finish = Finish(0.5, 1.5)
    case = Case.make([("tokens", 4)], bias=False, finish=finish)
    own = Distribution(case.hidden.detach(), case.head.weight.detach(), finish=finish)
    losses, _ = case.head(case.hidden, [(slice(0, 4), own)])
    assert losses.abs().max() < 1e-12


@pytest.mark.parametrize(
    ("config", "finish"),
    [
        (LlamaConfig(), UNFINISHED),
        (Gemma2Config(final_logit_softcapping=30.0), Finish(cap=30.0)),
        (CohereConfig(logit_scale=0.0625), Finish(0.0625)),
        (GraniteConfig(logits_scaling=8.0), Finish(0.125)),
        (MptConfig(), UNFINISHED),
    ],
    ids=lambda x: getattr(x, "model_type", ""),
)
def test_what_a_family_makes_of_its_head_s_output_is_read_from_its_configuration(config, finish) -> None:
    assert finish_of(config) == finish


@pytest.mark.parametrize("weights", [None, torch.ones(5)], ids=["recomputed", "fused"])
def test_without_gradient_only_the_losses_are_made(weights) -> None:
    case = Case.make([("tokens", 3), ("distribution", 2)], bias=True)
    with torch.no_grad():
        losses, total = case.head(case.hidden, case.parts, weights)
    assert torch.allclose(losses, case.expected()) and not losses.requires_grad and not total.requires_grad


def test_frozen_states_and_a_frozen_head_have_no_gradient() -> None:
    case = Case.make([("tokens", 3)], bias=True)
    for frozen in (case.head.parameters(), [case.hidden]):
        for leaf in case.leaves:
            leaf.requires_grad_(True)
        for leaf in frozen:
            leaf.requires_grad_(False)
        trained = [leaf for leaf in case.leaves if leaf.requires_grad]
        for weights in (None, torch.ones(3, dtype=torch.float64)):
            losses, total = case.head(case.hidden, case.parts, weights)
            got = torch.autograd.grad(losses.sum() if weights is None else total, trained)
            close(list(got), list(torch.autograd.grad(case.expected().sum(), trained)), 1e-9)


@pytest.mark.parametrize("bias", [False, True])
def test_logits_are_the_output_layer_s_own_and_its_weights_stay_the_same_objects(bias) -> None:
    linear = nn.Linear(WIDTH, VOCABULARY, bias=bias)
    head, hidden = AnswerHead(linear), torch.randn(2, 3, WIDTH)
    assert torch.equal(head(hidden), linear(hidden))
    assert head.weight is linear.weight and head.bias is linear.bias


@pytest.mark.parametrize("fused", [False, True], ids=["recomputed", "fused"])
def test_bf16_is_close_to_fp32_in_losses_and_gradients(chunk, fused, monkeypatch) -> None:
    monkeypatch.setattr(head_module, "ROWS", 7)  # the vocabulary is no multiple of it
    case = Case.make([("tokens", 40), ("distribution", 30)], bias=True, dtype=torch.bfloat16)
    expected = case.expected()
    weights = torch.linspace(0.1, 1, len(expected))
    plain = torch.autograd.grad((weights * expected).sum(), case.leaves)
    losses, total = case.head(case.hidden, case.parts, weights if fused else None)
    assert losses.dtype == total.dtype == torch.float32
    got = torch.autograd.grad(total if fused else (weights * losses).sum(), case.leaves)
    assert {gradient.dtype for gradient in got} == {torch.bfloat16}
    close([losses, *got], [expected, *plain], 2e-2)


@pytest.mark.parametrize("kind", ["tokens", "distribution", "topk"])
@pytest.mark.parametrize("fused", [False, True], ids=["recomputed", "fused"])
def test_never_more_than_a_chunk_of_logits_exists(monkeypatch, kind, fused) -> None:
    monkeypatch.setattr(head_module, "CHUNK", 4)
    case = Case.make([(kind, 50)], bias=True)
    with Shapes() as seen:
        losses, total = case.head(case.hidden, case.parts, torch.ones(50) if fused else None)
        torch.autograd.grad(total if fused else losses.sum(), case.leaves)
    rows = {shape[0] for shape in seen.shapes if len(shape) == 2 and shape[1] in (VOCABULARY, VOCABULARY - 1)}
    assert max(rows - {50 if kind == "topk" else 0}) == 4, "of the targets, the k likeliest are given whole"
