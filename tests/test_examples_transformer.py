"""The small transformer, as a reader runs it: few steps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from in_this_process import run_example

from lightning_speedlimit import RunRecord

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("transformer") / "runs"


@pytest.fixture(scope="module")
def printed(output: Path) -> str:
    return run_example(
        ROOT / "examples" / "char_transformer.py", output, "--optimizer", "momentum", "--batch-size", "8"
    )


def test_it_learns_and_tells(printed: str) -> None:
    found = re.search(r"loss on all windows (\S+) -> (\S+), after", printed)
    assert found is not None
    first, last = map(float, found.groups())
    assert first == pytest.approx(torch.tensor(57.0).log().item(), abs=0.4)  # 57 letters, nearly even scores at first
    assert last < first - 0.5
    text = (ROOT / "examples" / "declaration.txt").read_text(encoding="utf-8")
    assert f"It read {text[32:48]!r} … and goes on " in printed
    assert f"where the text has {text[48:65]!r}" in printed
    assert "Speed limit of a training run" in printed
    assert re.search(r"Diagnosis\n\n- \w+", printed)


def test_its_record_is_where_it_says(printed: str, output: Path) -> None:
    found = re.search(r'RunRecord\.load\("(.+)"\)', printed)
    assert found is not None
    record = RunRecord.load(Path(found[1]))
    assert Path(found[1]).is_relative_to(output)
    assert record.summary().steps == 20
    assert 0 < record.summary().kinematic_efficiency <= 1
    assert record.run["batch_size"] == 8


def test_a_letter_sees_only_those_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import char_transformer

    alphabet, windows = char_transformer.read_text()
    assert len(alphabet) == 57
    text = char_transformer.TEXT.read_text(encoding="utf-8")
    assert "".join(alphabet[i] for i in windows[3]) == text[96:129]
    torch.manual_seed(0)
    model = char_transformer.CharTransformer(len(alphabet)).double()
    shown = windows[:2, :-1]
    changed = shown.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % len(alphabet)
    before, after = model(shown), model(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20], rtol=1e-12, atol=1e-12)
    assert (before[:, 20:] - after[:, 20:]).abs().max() > 1e-3
