import pytest


@pytest.fixture
def small_validation_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is scored is not the matter here: one row group is enough."""
    from pipeline.inference import evaluate

    groups = evaluate.scored_groups
    monkeypatch.setattr(evaluate, "scored_groups", lambda dataset: groups(dataset)[:1])
