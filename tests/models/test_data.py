"""The batches: real text and real digits."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from models import data
from models.common import JIT_ONCE


def test_masked_batches_hide_a_seventh_of_the_text() -> None:
    batch = JIT_ONCE(lambda key: data.masked_batch(key, 64, 128, 512))(jax.random.key(0))
    inputs, targets, chosen = (np.asarray(batch[name]) for name in ("inputs", "targets", "weights"))
    changed = inputs != targets
    assert not (changed & (chosen == 0)).any()
    assert chosen.mean() == pytest.approx(0.15, abs=0.02)
    assert (inputs == data.MASK_TOKEN).sum() / chosen.sum() == pytest.approx(0.8, abs=0.05)
    assert changed.sum() / chosen.sum() == pytest.approx(0.9, abs=0.05)


def test_targets_are_the_inputs_one_byte_later() -> None:
    batch = data.next_token_batch(jax.random.key(0), 4, 32, 256)
    np.testing.assert_array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])
    assert bytes(np.asarray(batch["inputs"][0], np.uint8)) in data.text().tobytes() * 2


def test_the_text_is_the_licence_of_python_or_its_reference(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    licence = tmp_path / "lib" / "LICENSE"
    licence.parent.mkdir()
    licence.write_text("Permission is granted")
    monkeypatch.setattr(data.os, "__file__", str(tmp_path / "lib" / "os.py"))
    assert data.text.__wrapped__().tobytes() == b"Permission is granted"
    licence.unlink()
    assert len(data.text.__wrapped__()) > 100_000


def test_missing_scikit_learn_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match="to fix: pip install scikit-learn"):
        data.digits.__wrapped__()


def test_digits_are_enlarged_without_blurring() -> None:
    small = data.digit_batch(jax.random.key(0), 4)
    large = data.digit_batch(jax.random.key(0), 4, image=24)
    np.testing.assert_array_equal(large["images"][:, ::3, ::3], small["images"])
    np.testing.assert_array_equal(large["images"][:, 2::3, 2::3], small["images"])
