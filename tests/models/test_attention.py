"""Packed rows, with shared prompts and without, are read as each of their texts is alone, and at no greater cost."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import BloomConfig

from tests.models.families import CONFIGS, POSITIONS, VOCABULARY, WINDOW, make, plain_attention
from tests.models.shapes import Shapes
from wpn_ds.data.batch import collate
from wpn_ds.data.plan import Item, Segment
from wpn_ds.models import attention, kernels
from wpn_ds.models.attention import KERNELS, per_segment_sdpa
from wpn_ds.models.check import candidates, kernel_fault, supported
from wpn_ds.models.generate import generate_ids
from wpn_ds.models.kernels import Pieces
from wpn_ds.models.packed import PackedLM
from wpn_ds.objectives.terms import Role

CPU = torch.device("cpu")
several = settings(max_examples=60)
WINDOWS = st.none() | st.integers(1, 20)


@st.composite
def pieces_of_a_row(draw: st.DrawFn) -> Pieces:
    """Texts of up to twelve tokens, each with up to three branches that share some of its first tokens."""
    pieces: list[tuple[int, int, int, int]] = []
    at = 0
    for _ in range(draw(st.integers(1, 4))):
        n = draw(st.integers(1, 12))
        holder, at = at, at + n
        pieces.append((holder, at, holder, holder))
        for _ in range(draw(st.integers(0, 3))):
            branch, shared = draw(st.integers(1, 8)), draw(st.integers(1, n))
            pieces.append((at, at + branch, holder, holder + shared))
            at += branch
    return tuple(pieces)


def dense(pieces: Pieces, window: int | None) -> Tensor:
    """[L, L] True where a token sees another one: itself and what comes before it in its own text, pair by pair."""
    mask = torch.zeros(pieces[-1][1], pieces[-1][1], dtype=torch.bool)
    for start, stop, low, high in pieces:
        text = [*range(low, high), *range(start, stop)]
        for i in range(high - low, len(text)):
            for j in range(i + 1):
                mask[text[i], text[j]] = window is None or i - j < window
    return mask


def heads(length: int, seed: int = 0) -> Tensor:
    """Query, key and value: [3, 1, H, L, D]."""
    return torch.randn(3, 1, 2, length, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masked_attention(qkv: Tensor, mask: Tensor, scale: float) -> Tensor:
    query, key, value = qkv
    scores = (query @ key.mT * scale).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


def with_gradient(function: Callable[[Tensor], Tensor], inputs: Tensor) -> tuple[Tensor, Tensor]:
    leaf = inputs.clone().requires_grad_()
    out = function(leaf)
    (gradient,) = torch.autograd.grad((out * torch.arange(out.numel()).reshape(out.shape).cos()).sum(), leaf)
    return out.detach(), gradient


# ---- kernels ----


@several
@given(pieces=pieces_of_a_row(), window=WINDOWS, scale=st.sampled_from([1.0, 0.3]))
def test_a_call_a_piece_is_masked_attention_forward_and_backward(pieces, window, scale) -> None:
    inputs, mask = heads(pieces[-1][1]), dense(pieces, window)
    got = with_gradient(lambda qkv: per_segment_sdpa(*qkv, pieces, scale, window, 0.0), inputs)
    plain = with_gradient(lambda qkv: masked_attention(qkv, mask, scale), inputs)
    for mine, its in zip(got, plain, strict=True):
        assert mine.shape == its.shape and torch.allclose(mine, its, rtol=1e-9, atol=1e-12)


@several
@given(n=st.integers(1, 40), before=st.integers(0, 40), window=WINDOWS)
def test_a_window_s_blocks_are_a_dense_band(n, before, window) -> None:
    m = before + n
    distance = torch.arange(before, m)[:, None] - torch.arange(m)
    band = (distance >= 0) & (distance < (window or m))
    query, key, value = heads(m)
    got = attention._lower_right_causal(query[:, :, before:], key, value, 0.3, window, 0.0)
    scores = (query[:, :, before:] @ key.mT * 0.3).masked_fill(~band, float("-inf"))
    assert torch.allclose(got, scores.softmax(-1) @ value, rtol=1e-9, atol=1e-12)


def test_a_long_text_costs_its_length_times_the_window() -> None:
    length, window = 512, 16
    inputs = heads(length)
    with Shapes() as seen:
        per_segment_sdpa(*inputs, ((0, length, 0, 0),), 1.0, window, 0.0)
    assert seen.entries <= inputs[0].numel(), "nothing is larger than the result"


@several
@given(pieces=pieces_of_a_row(), window=WINDOWS)
def test_varlen_s_sequences_are_the_dense_mask(pieces, window) -> None:
    index, starts_q, starts_k, longest_q, longest_k = kernels._varlen_layout(pieces, CPU)
    assert starts_q.dtype == starts_k.dtype == torch.int32
    assert (index is None) == (starts_q.tolist() == starts_k.tolist())
    mask = torch.zeros(pieces[-1][1], pieces[-1][1], dtype=torch.bool)
    sizes = []
    for s in range(len(pieces)):
        (q, q_stop), (k, k_stop) = starts_q[s : s + 2].tolist(), starts_k[s : s + 2].tolist()
        sizes.append((q_stop - q, k_stop - k))
        behind = (k_stop - k) - (q_stop - q)  # the last query sees the last key
        for i in range(q_stop - q):
            for j in range(k_stop - k):
                key = k + j if index is None else index[k + j]
                mask[q + i, key] |= 0 <= i + behind - j < (window or 10_000)
    assert torch.equal(mask, dense(pieces, window))
    assert (longest_q, longest_k) == tuple(map(max, zip(*sizes, strict=True)))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("branch", [(), ((9, 12, 0, 5),)])
def test_varlen_hands_the_kernel_what_it_takes(monkeypatch, branch, window) -> None:
    """By a stand-in with the arguments' meaning that torch documents, since the kernel needs a GPU."""
    pieces = ((0, 9, 0, 0), *branch)

    def stand_in(q, k, v, starts_q, starts_k, longest_q, longest_k, *, scale, window_size):
        assert window_size[1] == 0, "causal"
        width = None if window_size[0] < 0 else window_size[0] + 1
        outputs = []
        for s in range(len(starts_q) - 1):
            own = slice(*starts_q[s : s + 2].tolist()), slice(*starts_k[s : s + 2].tolist())
            parts = (x[at].transpose(0, 1)[None] for x, at in ((q, own[0]), (k, own[1]), (v, own[1])))
            outputs.append(attention._lower_right_causal(*parts, scale, width, 0.0)[0].transpose(0, 1))
        return torch.cat(outputs)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    inputs = heads(pieces[-1][1])
    got = kernels.varlen(*inputs, pieces, 0.3, window, 0.0)
    assert torch.allclose(got, masked_attention(inputs, dense(pieces, window), 0.3))


@several
@given(pieces=pieces_of_a_row(), window=WINDOWS)
def test_flex_s_mask_function_is_the_dense_mask(pieces, window) -> None:
    place, zero = torch.arange(pieces[-1][1]), torch.tensor(0)
    sees = kernels._sees(pieces, window, CPU)
    assert torch.equal(sees(zero, zero, place[:, None], place[None, :]), dense(pieces, window))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_without_its_compiler_gives_masked_attention(monkeypatch) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(kernels, "_compiled_flex", lambda: flex_attention)
    pieces = ((0, 9, 0, 0), (9, 12, 0, 5), (12, 20, 12, 12))
    inputs = heads(20)
    got = kernels.flex(*inputs, pieces, 0.3, 3, 0.0)
    assert torch.allclose(got, masked_attention(inputs, dense(pieces, 3), 0.3))


@pytest.mark.parametrize("kernel", ["varlen", "flex"])
@pytest.mark.parametrize("extras", [{"softcap": 2.0}, {"sinks": torch.zeros(2)}])
def test_kernels_without_soft_caps_and_sinks_say_so(kernel, extras) -> None:
    module = make(CONFIGS["llama"], "wpn_packed").model.layers[0].self_attn
    module.config._attn_implementation = f"wpn_{kernel}"
    inputs = (x.float() for x in heads(4))
    with pytest.raises(NotImplementedError, match=f"{kernel} attention has neither soft caps nor sinks"):
        attention._attention(module, *inputs, torch.tensor([[[[0, 4, 0, 0]]]]), **extras)


@pytest.mark.parametrize("pieces", [None, torch.tensor([[[[0, 9, 0, 0]]]])], ids=["any mask", "pieces"])
@pytest.mark.parametrize(
    "given",
    [
        {"indices": torch.zeros(1, 9, 3)},
        {"position_bias": torch.zeros(1, 2, 9, 9)},
        {"a_name_of_next_year": 1.0},
        {"is_causal": False},
    ],
)
def test_what_an_attention_is_given_and_would_ignore_is_refused_by_its_name(given, pieces) -> None:
    module = make(CONFIGS["llama"], "wpn_packed").model.layers[0].self_attn
    inputs = (x.float() for x in heads(9))
    reason = "is not causal" if "is_causal" in given else f"is given {next(iter(given))}"
    with pytest.raises(NotImplementedError, match=rf"LlamaAttention {reason}"):
        attention._attention(module, *inputs, pieces, **given)


@pytest.mark.parametrize("given", [{}, {"position_bias": None, "output_attentions": False, "use_cache": True}])
def test_what_changes_nothing_is_taken(given) -> None:
    module = make(CONFIGS["llama"], "wpn_packed").model.layers[0].self_attn
    query = heads(9)[0].float()
    key = query[:, :1]  # repeated for the second head
    out, _ = attention._attention(
        module, query, key, key, torch.tensor([[[[0, 9, 0, 0]]]]), position_ids=query, **given
    )
    assert out.shape == (1, 9, 2, 4)


@pytest.mark.parametrize("kernel", [kernels.varlen, kernels.flex])
def test_kernels_without_dropout_say_so(kernel) -> None:
    with pytest.raises(NotImplementedError, match="no dropout"):
        kernel(*heads(4), ((0, 4, 0, 0),), 1.0, None, 0.1)


def test_a_cpu_s_bf16_attention_is_that_of_fp32_but_for_what_comes_in_and_out() -> None:
    inputs = [x.bfloat16().requires_grad_() for x in heads(9)]
    pieces = ((0, 5, 0, 0), (5, 9, 0, 2))
    out = per_segment_sdpa(*inputs, pieces, 0.5, None, 0.0)
    wide = [x.detach().float().requires_grad_() for x in inputs]
    expected = per_segment_sdpa(*wide, pieces, 0.5, None, 0.0)
    assert torch.equal(out, expected.bfloat16())
    seed = torch.randn_like(out)
    got, plain = (torch.autograd.grad(o, i, seed.to(o)) for o, i in ((out, inputs), (expected, wide)))
    assert all(torch.equal(mine, its.bfloat16()) for mine, its in zip(got, plain, strict=True))


# ---- which kernel ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_route_of_a_cpu_works_here(dtype) -> None:
    assert kernel_fault("wpn_packed", 16, dtype, CPU) is None


def test_a_kernel_that_fails_or_gives_wrong_numbers_is_found_out(monkeypatch) -> None:
    def raises(*_):
        raise RuntimeError("no such kernel")

    def forgets_the_prefix(query, key, value, pieces, *rest):
        return per_segment_sdpa(query, key, value, tuple((a, b, a, a) for a, b, *_ in pieces), *rest)

    def forgets_the_window(query, key, value, pieces, scale, window, *rest):
        return per_segment_sdpa(query, key, value, pieces, scale, None, *rest)

    def has_no_gradient(*inputs):
        return per_segment_sdpa(*inputs).detach()

    def has_half_a_gradient(query, key, value, *rest):
        return per_segment_sdpa(query, key.detach(), value, *rest)

    def is_nan_somewhere(*inputs):
        return per_segment_sdpa(*inputs) + torch.tensor([float("nan")] + [0.0] * 15)  # its gradient is right

    wrong = (forgets_the_prefix, forgets_the_window, has_no_gradient, has_half_a_gradient, is_nan_somewhere)
    for kernel in (raises, *wrong):
        monkeypatch.setitem(KERNELS, "wpn_flex", kernel)
        assert kernel_fault("wpn_flex", 16, torch.float32, CPU), kernel.__name__
    monkeypatch.setitem(KERNELS, "wpn_flex", lambda *inputs: per_segment_sdpa(*inputs))
    assert kernel_fault("wpn_flex", 16, torch.float32, CPU) is None


@pytest.mark.parametrize(
    ("wanted", "device", "dropout", "tried"),
    [
        ("auto", "cpu", 0.0, ["wpn_packed"]),
        ("auto", "cuda", 0.0, ["wpn_varlen", "wpn_flex", "wpn_packed"]),
        ("auto", "cuda", 0.1, ["wpn_packed"]),
        ("varlen", "cuda", 0.0, ["wpn_varlen"]),
        ("packed", "cuda", 0.0, ["wpn_packed"]),
        ("sdpa", "cuda", 0.0, []),
        ("eager", "cpu", 0.0, []),
    ],
)
def test_the_fastest_kernel_is_tried_first_and_a_named_one_alone(wanted, device, dropout, tried) -> None:
    assert candidates(wanted, torch.device(device), dropout) == tried


def test_a_family_that_has_no_exchangeable_attention_is_not_supported() -> None:
    assert all(map(supported, CONFIGS.values()))
    assert not supported(BloomConfig())


# ---- families ----


def texts(share: bool) -> list[Item]:
    """A row longer than the models' positions, of texts longer than their windows; three of them share a prompt."""
    generator = torch.Generator().manual_seed(1)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(VOCABULARY, (n,), generator=generator).tolist())

    items = [Item(Segment(ids(n), 0, 1), Role.RETAIN, k) for k, n in enumerate((20, 3, 29, 40, 41))]
    prompt = ids(9)
    for k, n in enumerate((5, 14, 8)):
        segment = Segment((*prompt, *ids(n)), 0, len(prompt))
        items.append(Item(segment, Role.RETAIN, len(items), shared=len(prompt) if share and k else 0))
    return items


def weighted(states: Tensor, number: int) -> Tensor:
    """A loss that tells every entry of a text's states [n, d] from every other."""
    generator = torch.Generator().manual_seed(number)
    return (states * torch.randn(states.shape, generator=generator, dtype=states.dtype)).sum()


def packed_loss(lm, items: list[Item]) -> tuple[list[Tensor], Tensor]:
    """Every text's states, in the order of its tokens, and the loss on them, from one flat row."""
    batch = collate((tuple(items),), 0, roles=frozenset(), flat=True)
    row = PackedLM(lm, packed=True).backbone(batch)[0]
    states = [torch.cat([row[low:high], row[start:stop]]) for start, stop, low, high in batch.pieces[0, 0].tolist()]
    return states, torch.stack([weighted(own, k) for k, own in enumerate(states)]).sum()


def gradients(lm, loss: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in lm.base_model.named_parameters()}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@pytest.mark.parametrize("share", [False, True], ids=["apart", "shared"])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_flat_row_gives_the_states_and_gradients_of_single_sequences(family, share) -> None:
    items = texts(share)
    assert sum(item.tokens for item in items) > POSITIONS and max(len(i.segment) for i in items) > 2 * WINDOW
    plain = make(CONFIGS[family], plain_attention(family), torch.float64)
    alone = [plain.base_model(torch.tensor([i.segment.ids]), use_cache=False).last_hidden_state[0] for i in items]
    expected = gradients(plain, torch.stack([weighted(own, k) for k, own in enumerate(alone)]).sum())
    lm = make(CONFIGS[family], "wpn_packed", torch.float64)
    states, loss = packed_loss(lm, items)
    for own, its in zip(states, alone, strict=True):
        assert torch.allclose(own, its, rtol=1e-6, atol=1e-6)
    norm = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in gradients(lm, loss).items():
        assert (gradient - expected[name]).abs().max() <= 1e-6 * norm, name


@pytest.mark.parametrize("family", CONFIGS)
def test_no_table_of_all_tokens_by_all_tokens_is_made_forward_or_backward(family) -> None:
    items = texts(share=True)
    length = sum(item.tokens for item in items)
    with Shapes() as seen:
        lm = make(CONFIGS[family], "wpn_packed")
        gradients(lm, packed_loss(lm, items)[1])
    assert seen.score_like(length) == [] and (1, length, 32) in seen.shapes
    batch = collate((tuple(items[:3]),), 0, roles=frozenset())
    with Shapes() as seen:
        PackedLM(make(CONFIGS[family], plain_attention(family)), packed=True).backbone(batch)
    square = (batch.input_ids.shape[1],) * 2
    assert any(shape[-2:] == square for shape in seen.shapes), "the dense route makes one, so one would be seen"


@pytest.mark.parametrize("family", CONFIGS)
def test_left_padded_generation_under_packed_attention_is_that_of_the_model_s_own(family) -> None:
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(4, VOCABULARY, (n,), generator=generator).tolist() for n in (12, 7, 2)]
    tokenizer, settings = SimpleNamespace(eos_token_id=2, pad_token_id=0), {"max_new_tokens": 16, "batch_size": 3}
    packed, plain = (make(CONFIGS[family], name) for name in ("wpn_packed", plain_attention(family)))
    answers = generate_ids(packed, tokenizer, prompts, **settings)
    assert answers == generate_ids(plain, tokenizer, prompts, **settings)
    assert answers == [generate_ids(packed, tokenizer, [prompt], **settings)[0] for prompt in prompts]
    assert len(set(map(tuple, answers))) > 1 and all(map(len, answers)), "nothing was told apart"


@pytest.mark.parametrize("family", CONFIGS)
def test_a_plain_batch_under_packed_attention_is_read_as_by_the_model_s_own(family) -> None:
    ids = torch.randint(4, VOCABULARY, (2, 15), generator=torch.Generator().manual_seed(3))
    got, plain = (make(CONFIGS[family], name, torch.float64)(ids).logits for name in ("wpn_packed", "eager"))
    assert torch.allclose(got, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["opt", "gpt_neo", "llama"])
def test_dropout_reaches_the_attention_of_a_training_model_only(family) -> None:
    lm = make(CONFIGS[family], "wpn_packed")
    for module in lm.modules():
        if "Attention" in type(module).__name__:
            module.dropout = module.attention_dropout = 0.5  # as each family calls it
            module.attn_dropout = torch.nn.Dropout(0.5)
    model, batch = PackedLM(lm, packed=True), collate((tuple(texts(share=True)),), 0, roles=frozenset(), flat=True)
    assert torch.equal(model.backbone(batch), model.backbone(batch))
    model.train()
    assert not torch.equal(model.backbone(batch), model.backbone(batch))
