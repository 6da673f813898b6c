"""Batches of real text and real images that ship with installed packages: nothing is downloaded.

Batches are pure functions of a random key: `jax.eval_shape` gives the shapes of one of any size, unmade.
"""

import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

Batch = dict[str, jax.Array]

DIGIT_PIXELS = 8
CLASSES = 16
"""The ten digits, padded to 16 so that the class dimension splits over eight devices."""
MASK_TOKEN = 256
"""The first id after the 256 byte values."""
MASKED_SHARE = 0.15


@functools.cache
def text() -> np.ndarray:
    """The bytes (uint8) of Python's licence, or of its language reference where no licence is installed."""
    library = Path(os.__file__).parent
    for folder in (library, library.parent, library.parent.parent):
        for name in ("LICENSE.txt", "LICENSE"):
            path = folder / name
            if path.is_file():
                return np.frombuffer(path.read_bytes(), np.uint8)
    from pydoc_data import topics  # what help("topics") prints: part of every complete standard library

    return np.frombuffer("\n".join(topics.topics.values()).encode(), np.uint8)


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Scikit-learn's 1,797 handwritten digits: images float32 (n, 8, 8) from 0 to 1, labels int32 (n,)."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        message = "image models train on scikit-learn's digits; to fix: pip install scikit-learn"
        raise ModuleNotFoundError(message, name=error.name) from error
    pixels, labels = load_digits(return_X_y=True)
    images = np.asarray(pixels, np.float32).reshape(-1, DIGIT_PIXELS, DIGIT_PIXELS) / 16
    return images, np.asarray(labels, np.int32)


def next_token_batch(key: jax.Array, batch: int, seq: int, vocab: int) -> Batch:
    """Windows of text and the same windows one byte later: `inputs` and `targets`, int32 (batch, seq).

    Tokens are bytes; a vocabulary smaller than 256 folds them.
    """
    windows = _windows(key, batch, seq + 1) % vocab
    return {"inputs": windows[:, :-1], "targets": windows[:, 1:]}


def masked_batch(key: jax.Array, batch: int, seq: int, vocab: int) -> Batch:
    """Masked language modelling (Devlin et al. 2018, section 3.1): 15 % of the tokens are to be predicted.

    Of those, 80 % are replaced by `MASK_TOKEN`, 10 % by a random byte, 10 % stay. `inputs` and `targets` are
    int32 (batch, seq); `weights` is float32 (batch, seq), one where a prediction counts.
    """
    window_key, chosen_key, replacement_key, random_key = jax.random.split(key, 4)
    targets = _windows(window_key, batch, seq)
    chosen = jax.random.uniform(chosen_key, targets.shape) < MASKED_SHARE
    replacement = jax.random.uniform(replacement_key, targets.shape)
    random_bytes = jax.random.randint(random_key, targets.shape, 0, 256, jnp.int32)
    masked = jnp.where(replacement < 0.8, MASK_TOKEN, jnp.where(replacement < 0.9, random_bytes, targets))
    inputs = jnp.where(chosen, masked, targets)
    return {"inputs": inputs % vocab, "targets": targets % vocab, "weights": chosen.astype(jnp.float32)}


def digit_batch(key: jax.Array, batch: int, image: int = DIGIT_PIXELS) -> Batch:
    """Digits enlarged to `image` pixels a side.

    `images` is float32 (batch, image, image, 1), `labels` int32 (batch,).
    """
    if image < DIGIT_PIXELS or image % DIGIT_PIXELS:
        raise ValueError(f"image={image} is not a multiple of {DIGIT_PIXELS} pixels; to fix: set image=16 or 32")
    images, labels = digits()
    rows = jax.random.randint(key, (batch,), 0, len(labels))
    picked = jnp.asarray(images)[rows]
    scale = image // DIGIT_PIXELS
    enlarged = jnp.repeat(jnp.repeat(picked, scale, axis=1), scale, axis=2)
    return {"images": enlarged[..., None], "labels": jnp.asarray(labels)[rows]}


def _windows(key: jax.Array, batch: int, length: int) -> jax.Array:
    """Random windows of the text as int32 (batch, length); the text repeats where a window is longer."""
    corpus = jnp.asarray(text())
    starts = jax.random.randint(key, (batch, 1), 0, len(corpus))
    return corpus[(starts + jnp.arange(length)) % len(corpus)].astype(jnp.int32)
