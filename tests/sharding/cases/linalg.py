"""Rows for the linear-algebra rules."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def matrices(*shape, positive=False):
    """Well-conditioned square matrices, symmetric positive definite if asked."""
    x = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    eye = np.eye(shape[-1], dtype=np.float32)
    return x @ x.swapaxes(-1, -2) + eye if positive else x + 4 * eye


BATCH = (8, 2, 4, 4)
TRIANGLES = np.tril(matrices(*BATCH))
BANDS = [np.full((8, 4), value, np.float32) for value in (0.5, 4.0, 0.25)]

CASES = {
    "cholesky": (lax.linalg.cholesky, matrices(*BATCH, positive=True)),
    "lu": (lax.linalg.lu, matrices(*BATCH)),
    "lu_pivots_to_permutation": (
        lambda x: lax.linalg.lu_pivots_to_permutation(x, 4),
        np.tile(np.arange(4, dtype=np.int32), (8, 2, 1)),
    ),
    "qr": (lambda x: lax.linalg.qr(x, full_matrices=False), matrices(*BATCH)),
    "qr: pivoting": (lambda x: lax.linalg.qr(x, pivoting=True), matrices(*BATCH)),
    "householder_product": (lax.linalg.householder_product, matrices(*BATCH), f32(8, 2, 4)),
    "eigh": (lambda x: lax.linalg.eigh(x, symmetrize_input=False), matrices(*BATCH, positive=True)),
    "eig": (lambda x: lax.linalg.eig(x, compute_left_eigenvectors=True), matrices(*BATCH)),
    "svd": (lax.linalg.svd, matrices(*BATCH)),
    "svd: singular values alone": (lambda x: lax.linalg.svd(x, compute_uv=False), matrices(*BATCH)),
    "schur": (lax.linalg.schur, matrices(*BATCH)),
    "hessenberg": (lax.linalg.hessenberg, matrices(*BATCH)),
    "tridiagonal": (lax.linalg.tridiagonal, matrices(*BATCH, positive=True)),
    "triangular_solve: left": (
        lambda a, b: lax.linalg.triangular_solve(a, b, left_side=True, lower=True),
        TRIANGLES,
        f32(8, 2, 4, 16),
    ),
    "triangular_solve: right, transposed": (
        lambda a, b: lax.linalg.triangular_solve(a, b, transpose_a=True, lower=True),
        TRIANGLES,
        f32(8, 2, 16, 4),
    ),
    "triangular_solve: no batch": (
        lambda a, b: lax.linalg.triangular_solve(a, b, left_side=True, lower=True),
        TRIANGLES[0, 0],
        f32(4, 8),
    ),
    "tridiagonal_solve": (lax.linalg.tridiagonal_solve, *BANDS, f32(8, 4, 2)),
    "fft": (lambda x: lax.fft(x, "FFT", (16,)), jax.ShapeDtypeStruct((8, 16), jnp.complex64)),
    "fft: two dimensions of reals": (lambda x: lax.fft(x, "RFFT", (4, 8)), f32(8, 2, 4, 8)),
    "fft: inverse": (lambda x: lax.fft(x, "IRFFT", (8,)), jax.ShapeDtypeStruct((8, 5), jnp.complex64)),
}
