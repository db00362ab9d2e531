from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from wpn_ds.evaluate.separation import Separation, rounded

MEMBER = tuple(at < 30 for at in range(60))
GROUPS = tuple(f"f:{at}" for at in range(60))


def separation(shift: float, seed: int = 0) -> Separation:
    scores = np.random.default_rng(seed).normal(size=60) + shift * np.array(MEMBER)
    return Separation(tuple(map(rounded, scores.tolist())), MEMBER, GROUPS)


def test_a_model_is_held_against_another_on_the_same_prompts() -> None:
    known, fresh = separation(1.5), separation(0.2)
    more = known.above(fresh)
    assert more.value == pytest.approx(known.auc.value - fresh.auc.value) and 0 < more.low < more.value < more.high
    assert known.above(known).low == known.above(known).high == 0, "the resamples are the same"
    unpaired = separation(1.5, seed=1)
    assert more.high - more.low < unpaired.above(fresh).high - unpaired.above(fresh).low


def test_privleak_is_that_of_muse() -> None:
    """MUSE gives the label 1 to the held-out texts and scores them by how likely they are: 1 minus the usual area."""
    known, fresh = separation(1.5), separation(0.2)
    areas = [roc_auc_score([not member for member in MEMBER], one.scores) for one in (known, fresh)]
    leak = known.privleak(fresh)
    assert leak.value == pytest.approx(100 * (areas[0] - areas[1]) / areas[1])
    assert leak.low < leak.value < 0, "members are still known"
    assert separation(-1.5).privleak(fresh).value > 0, "members stand out as unlearned"
    assert fresh.privleak(fresh).value == 0
    assert known.privleak(separation(100.0)) is None, "nothing can be compared with what tells all members"
