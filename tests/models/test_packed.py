"""States inside a model are those of the layer at a depth, and only layers up to it are trained, in every family."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from tests.models.families import CONFIGS, make
from wpn_ds.data.batch import collate
from wpn_ds.data.plan import Item, Segment
from wpn_ds.models.packed import PackedLM, layer_at, train_only
from wpn_ds.objectives.terms import Role


@pytest.mark.parametrize(
    ("layers", "depth", "expected"),
    [(32, 0.22, 7), (12, 0.22, 3), (2, 0.22, 1), (2, 0.9, 1), (1, 0.5, 1), (4, 0.99, 3)],
)
def test_a_depth_is_a_layer_that_is_neither_the_embedding_nor_the_normalised_last(layers, depth, expected) -> None:
    assert layer_at(LlamaConfig(num_hidden_layers=layers), depth) == expected


@pytest.mark.parametrize("family", CONFIGS)
def test_the_layer_whose_states_are_given_out_is_the_last_of_those_that_are_trained(family) -> None:
    lm = make(CONFIGS[family], "wpn_packed")
    train_only(lm, 0.5, 1)
    model = PackedLM(lm, packed=True, depth=0.5)
    first, *later = (module for module in lm.modules() if isinstance(module, GradientCheckpointingLayer))
    received: list[torch.Tensor] = []
    later[0].register_forward_pre_hook(
        lambda _, args, kwargs: received.append((*args, *kwargs.values())[0]), with_kwargs=True
    )
    segment = Segment((2, *range(5, 20)), 1, 4)
    output = model(collate(((Item(segment, Role.RETAIN, 0),),), 0, roles=frozenset({Role.RETAIN}), flat=True))
    torch.testing.assert_close(output.inner, received[0].flatten(0, 1))
    trained = {id(parameter) for parameter in lm.parameters() if parameter.requires_grad}
    assert trained and trained == {id(parameter) for parameter in first.parameters()}
    output.inner.sum().backward()
    assert all(parameter.grad is not None for parameter in first.parameters() if parameter.requires_grad)
