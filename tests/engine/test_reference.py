"""What retain labels are compared to is the starting model's word for exactly these labels, however it is kept."""

from __future__ import annotations

import pytest
import torch

from tests.data.made import FORMS
from tests.engine.gradient_cases import VOCABULARY, make_examples
from tests.engine.small import alone, silent, small_model, small_reader
from wpn_ds.data.batch import Batch, collate
from wpn_ds.data.examples import ExampleSet
from wpn_ds.data.layout import Layout, plan_step
from wpn_ds.engine import tabulate
from wpn_ds.engine.start import CachedTopK, FrozenModel, LabelRows
from wpn_ds.engine.tables import Tables
from wpn_ds.engine.tabulate import Tabulator, _split
from wpn_ds.errors import UserError
from wpn_ds.losses.likelihood import Distribution, TopK
from wpn_ds.objectives.terms import Role
from wpn_ds.settings.deepspeed import frozen_json

ROLES = frozenset({Role.WANTED, Role.RETAIN})
EXAMPLES = make_examples()


def retain_batches(form: str, order: list[int]) -> list[Batch]:
    """Batches of a step over all forget examples and the retain segments of ``order`` that have retain labels."""
    layout = Layout(48, 60, world_size=1, **FORMS[form])
    plan = plan_step(EXAMPLES, range(6), order, layout, roles=ROLES)
    rows = [rows for k, rows in enumerate(plan.micro_batches[0]) if Role.RETAIN in plan.roles(k)]
    return [collate(each, 0, roles=ROLES, flat=layout.flat) for each in rows]


def rows_of(batch: Batch) -> dict[Role, tuple[int, ...]]:
    return {Role.RETAIN: batch.retain_items}


def labelled(batch: Batch) -> list[tuple[int, int]]:
    """(retain segment, token) of every retain label, in order."""
    return [(i, t) for i in batch.retain_items for t in range(EXAMPLES.retain[i].answer_start, len(EXAMPLES.retain[i]))]


@pytest.fixture(params=[1, 10, 4096])
def block(request, monkeypatch) -> int:
    monkeypatch.setattr(tabulate, "_BLOCK_LABELS", request.param)
    return request.param


@pytest.mark.parametrize("form", FORMS)
def test_cached_states_are_those_of_the_labels_segments_alone(world, tmp_path, form, block) -> None:
    reader = small_reader(world, form)
    kept = Tabulator(reader, Tables(tmp_path, {}), silent).states(EXAMPLES.retain)
    for batch in retain_batches(form, [2, 0, 1, 0]):
        with kept.targets(batch, rows_of(batch)) as by_role:
            targets = by_role[Role.RETAIN]
            assert isinstance(targets, Distribution)
            plain = [alone(EXAMPLES.retain[i])[0][t - 1] for i, t in labelled(batch)]
            assert torch.allclose(targets.hidden, torch.stack(plain), rtol=1e-4, atol=1e-5)
            head = reader.engine.module.lm.get_output_embeddings()
            assert torch.equal(targets.weight, head.weight) and targets.weight is not head.weight
            assert not targets.weight.requires_grad


@pytest.mark.parametrize("form", FORMS)
def test_cached_top_tokens_are_those_of_the_labels_segments_alone(world, tmp_path, form, block) -> None:
    reader = small_reader(world, form)
    kept = Tabulator(reader, Tables(tmp_path, {}), silent).top_tokens(EXAMPLES.retain, 5)
    for batch in retain_batches(form, [1, 2, 0, 1]):
        with kept.targets(batch, rows_of(batch)) as by_role:
            targets = by_role[Role.RETAIN]
            assert isinstance(targets, TopK)
            plain = torch.stack([alone(EXAMPLES.retain[i])[1][t - 1] for i, t in labelled(batch)])
            best = plain.topk(5)
            assert targets.ids.dtype == torch.long and torch.equal(targets.ids, best.indices)
            assert torch.allclose(targets.logprobs, best.values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_frozen_model_says_what_the_tables_keep(world, tmp_path, form) -> None:
    reader = small_reader(world, form)
    frozen = FrozenModel(small_model().lm, True, frozen_json({}, "sharded"), world)
    kept = Tabulator(reader, Tables(tmp_path, {}), silent).states(EXAMPLES.retain)
    assert not any(p.requires_grad for p in frozen.model.parameters())
    logits = torch.randn(100, VOCABULARY, generator=torch.Generator().manual_seed(0))
    for batch in retain_batches(form, [2, 0, 1]):
        n = len(labelled(batch))
        losses = []
        for reference in (frozen, kept):
            with reference.targets(batch, rows_of(batch)) as targets:
                losses.append(targets[Role.RETAIN].losses(logits[:n].clone(), slice(0, n))[0])  # it works in place
        assert n > 0 and torch.allclose(*losses, rtol=1e-4, atol=1e-5)


def test_tables_are_built_once_and_a_number_of_tokens_has_its_own(world, tmp_path) -> None:
    built: list[str] = []

    def progress(items, what):
        built.append(what)
        return items

    tabulator = Tabulator(small_reader(world), Tables(tmp_path, {}), progress)
    for k in (5, 6, 5):
        tabulator.top_tokens(EXAMPLES.retain, k)
    for _ in range(2):
        tabulator.states(EXAMPLES.retain)
    assert len(built) == 3


def test_the_unknown_mass_is_what_the_kept_tokens_leave() -> None:
    kept = CachedTopK(
        torch.zeros(3, 2), torch.tensor([[0.5, 0.2], [0.9, 0.1], [0.3, 0.1]]).log(), LabelRows.of(ExampleSet().retain)
    )
    assert kept.unknown_mass() == (pytest.approx(0.3, abs=1e-6), pytest.approx(0.6, abs=1e-6))


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_blocks_of_segments_follow_each_other_with_about_as_many_labels_each(size) -> None:
    rows = LabelRows.of(ExampleSet(retain=[*EXAMPLES.retain] * 5).retain)
    blocks = _split(rows, size)
    assert [first for first, _ in blocks] == [0, *(last for _, last in blocks[:-1])] and blocks[-1][1] == 15
    longest = max(segment.answer_length for segment in EXAMPLES.retain)
    assert all(rows.start[last] - rows.start[first] < size + longest for first, last in blocks)
    assert len(blocks) <= len(rows) / size + 1
    assert _split(LabelRows.of(ExampleSet().retain), size) == []


# ---- the frozen model's configuration ----

POLICY = {
    "train_micro_batch_size_per_gpu": 1,
    "bf16": {"enabled": True},
    "optimizer": {"type": "AdamW"},
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/disk"}},
}


def test_a_frozen_model_has_the_policy_s_layout_without_its_optimizer() -> None:
    made = frozen_json(POLICY, "sharded")
    assert made == {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3},
    }
    assert "offload_optimizer" in POLICY["zero_optimization"], "the policy's own is left alone"


@pytest.mark.parametrize(("kind", "path"), [("cpu", "/disk"), ("nvme", "/disk/reference")])
def test_its_weights_go_where_the_flag_says_on_a_disk_into_a_folder_of_their_own(kind, path) -> None:
    of_parameters = frozen_json(POLICY, kind)["zero_optimization"]["offload_param"]
    assert (of_parameters["device"], of_parameters["nvme_path"]) == (kind, path)


def test_with_the_policy_s_weights_on_a_disk_those_of_the_frozen_model_lie_beside_them() -> None:
    own = {"device": "nvme", "nvme_path": "/disk", "buffer_size": 7}
    policy = {"zero_optimization": {"stage": 3, "offload_param": own}}
    expected = own | {"nvme_path": "/disk/reference"}
    assert frozen_json(policy, "sharded")["zero_optimization"]["offload_param"] == expected
    offloaded = frozen_json(policy, "cpu")["zero_optimization"]["offload_param"]
    assert (offloaded["device"], offloaded["buffer_size"]) == ("cpu", 7)


@pytest.mark.parametrize(
    ("zero", "kind", "message"),
    [
        ({"stage": 2}, "cpu", "--reference cpu needs ZeRO stage 3"),
        ({}, "nvme", "--reference nvme needs ZeRO stage 3"),
        ({"stage": 3}, "nvme", "--reference nvme: .* no nvme_path"),
    ],
)
def test_a_place_that_the_configuration_can_t_offer_is_one_line(zero, kind, message) -> None:
    with pytest.raises(UserError, match=message):
        frozen_json({"zero_optimization": zero}, kind)
