"""Orthogonalised updates: every matrix replaced by nearly the nearest semi-orthogonal one."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import optax

from optimkit.layout import MatrixAxesOverride
from optimkit.leaves import check_match, check_real, narrow_like, widen
from optimkit.matrices.engine import leaf_axes, map_matrices
from optimkit.matrices.newton_schulz import KELLER, NsCoeffs, newton_schulz, ns_triples
from optimkit.matrices.parts import SplitOutputs, check_split, cut_outputs
from optimkit.numerics import check_count, check_range
from optimkit.protocols import GradientTransformation, Method, PyTree, transformation
from optimkit.transforms.momentum import ema_momentum


def orthogonalize_updates(
    ns_steps: int = 5,
    ns_coeffs: NsCoeffs = KELLER,
    eps: Any = 1e-7,
    ns_dtype: Any = "bfloat16",
    bucket: bool = True,
    *,
    matrix_axes: MatrixAxesOverride = None,
    split_outputs: SplitOutputs = None,
    axis_names: Sequence[str] | None = None,
) -> GradientTransformation:
    r"""Newton-Schulz on every matrix of the updates: :math:`U V^T` of :math:`U S V^T`, nearly.

    .. math::

        X \leftarrow \frac{X}{\|X\|_F + \epsilon}, \qquad
        \text{then, each step:} \quad A = X X^T, \quad X \leftarrow a X + (b A + c A A) X

    Every direction of the update gets about the same size, whatever its gradient was. Leaves of
    more axes are stacks of matrices (layers, experts), convolutions or attention kernels, each
    matrix with its own norm; matrices of one size go through one batched product.

    Args:
      ns_steps: number of steps, >= 1; 5 is the authors'.
      ns_coeffs: (a, b, c) for all steps, a sequence with a triple a step, ``"keller"``, ``"dion"``,
        ``"polar_express"`` (which normalises by 1.02 ||X||_F + 1e-6), or a function of
        (smaller side, larger side) that gives one of these.
      eps: added to the norm, >= 0.
      ns_dtype: dtype of the products, which accumulate in f32 at least; the authors' bfloat16
        costs 2 to 3% noise. Matrices travel between devices in it. None: the dtype of the updates,
        f32 at least.
      bucket: join matrices of one size across leaves; the numbers are the same without.
      matrix_axes: which axes are inputs and outputs where name and shape do not tell:
        ``{pattern: MatrixAxes}`` or ``(path, leaf) -> MatrixAxes``.
      split_outputs: ``{pattern: sizes}`` for kernels that are several matrices side by side, such
        as fused queries, keys and values: each part is orthogonalised on its own.
      axis_names: mesh axes among whose devices the matrices are divided; default all.

    Returns:
      A transformation without state. Vectors and scalars pass as they are: split them off with
      ``by_kind``. On a mesh each device orthogonalises its share of the matrices.

    Raises:
      ValueError: if an argument is out of range, the layout of a leaf is ambiguous, the sizes of a
        split do not add up, or the mesh lacks an axis.

    A zero matrix stays zero; a non-finite entry makes its own matrix NaN.

    >>> import jax.numpy as jnp
    >>> tx = orthogonalize_updates(ns_coeffs="dion", ns_dtype="float32")
    >>> updates, _ = tx.update({"kernel": jnp.array([[0.0, 5.0], [2.0, 0.0]])}, tx.init(None))
    >>> [[round(float(x), 1) for x in row] for row in updates["kernel"]]
    [[0.0, 1.0], [1.0, 0.0]]

    Reference: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
    """
    check_count(ns_steps=ns_steps, least=1)
    check_range(eps=eps, ge=0)
    if not callable(ns_coeffs):
        ns_triples(ns_coeffs, ns_steps)
    travel_dtype = None
    if ns_dtype is not None:
        if not jnp.issubdtype(jnp.dtype(ns_dtype), jnp.floating):
            raise ValueError(f"ns_dtype must be a floating-point dtype, got {ns_dtype!r}")
        # float16 lacks the range for what is not yet normalised: such matrices travel in f32.
        travel_dtype = jnp.promote_types(jnp.bfloat16, ns_dtype)
    kernel = functools.partial(
        newton_schulz, steps=ns_steps, coeffs=ns_coeffs, eps=eps, dtype=ns_dtype
    )

    def init(params: PyTree) -> optax.EmptyState:
        # An ambiguous layout, or a split that does not fit, shows before training starts.
        check_split(params, leaf_axes(params, matrix_axes), split_outputs)
        return optax.EmptyState()

    def update(
        updates: PyTree, state: optax.EmptyState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, optax.EmptyState]:
        del extra
        check_real(updates, "gradient")
        if params is not None:
            check_match(updates, params, what="gradient", like="the parameters")
        parts, axes, join = cut_outputs(updates, leaf_axes(updates, matrix_axes), split_outputs)
        done = map_matrices(
            kernel, parts, axes, dtype=travel_dtype, bucket=bucket, axis_names=axis_names
        )
        return join(done), state

    return transformation(init, update)


def scale_by_muon(
    momentum: Any = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    ns_coeffs: NsCoeffs = KELLER,
    eps: Any = 1e-7,
    momentum_form: Literal["ema", "sum"] = "ema",
    ns_dtype: Any = "bfloat16",
    bucket: bool = True,
    *,
    mu_dtype: Any = None,
    matrix_axes: MatrixAxesOverride = None,
    split_outputs: SplitOutputs = None,
    axis_names: Sequence[str] | None = None,
) -> GradientTransformation:
    """Muon's direction: momentum, then Newton-Schulz; no shape scale, rate or sign.

    The same as ``chain(ema_momentum(...), orthogonalize_updates(...))``.

    Args:
      momentum: decay of the momentum, in [0, 1).
      nesterov: mix the gradient into the momentum once more.
      ns_steps: Newton-Schulz steps, >= 1.
      ns_coeffs: their coefficients, see ``orthogonalize_updates``.
      eps: added to the norm, >= 0.
      momentum_form: ``"ema"`` or ``"sum"``; they give the same direction, up to ``eps``.
      ns_dtype: dtype of the products; None: f32, or f64 for f64 gradients.
      bucket: join matrices of one size across leaves.
      mu_dtype: dtype of the momentum; default f32, or f64 for f64 gradients.
      matrix_axes: which axes are inputs and outputs where name and shape do not tell.
      split_outputs: ``{pattern: sizes}`` for kernels that are several matrices side by side, such
        as fused queries, keys and values: each part is orthogonalised on its own.
      axis_names: mesh axes among whose devices the matrices are divided; default all.

    Returns:
      A transformation for matrices; 4 bytes of state a f32 parameter. Vectors get their momentum
      only: split them off with ``by_kind``.

    Raises:
      ValueError: if an argument is out of range, a gradient has another shape, or the layout of a
        leaf is ambiguous.

    >>> import jax.numpy as jnp
    >>> tx = scale_by_muon(ns_coeffs="dion", ns_dtype="float32")
    >>> w = {"kernel": jnp.zeros((2, 2))}
    >>> updates, _ = tx.update({"kernel": jnp.array([[0.0, 5.0], [2.0, 0.0]])}, tx.init(w))
    >>> [[round(float(x), 1) for x in row] for row in updates["kernel"]]
    [[0.0, 1.0], [1.0, 0.0]]

    Reference: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
    """
    check_range(momentum=momentum, ge=0, lt=1)
    inner = optax.chain(
        ema_momentum(momentum, nesterov=nesterov, form=momentum_form, mu_dtype=mu_dtype),
        orthogonalize_updates(
            ns_steps,
            ns_coeffs,
            eps,
            ns_dtype,
            bucket,
            matrix_axes=matrix_axes,
            split_outputs=split_outputs,
            axis_names=axis_names,
        ),
    )

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        check_real(updates, "gradient")
        new, state = inner.update(widen(updates), state, params, **extra)
        return narrow_like(new, updates), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


RECORDS = (
    Method(
        factory=orthogonalize_updates,
        kind="piece",
        summary="Newton-Schulz on every matrix of the updates",
        # Full products, so that the contract can compare to rounding.
        example={"ns_dtype": None},
        traced=("eps",),
        static=(
            "ns_steps",
            "ns_coeffs",
            "ns_dtype",
            "bucket",
            "matrix_axes",
            "split_outputs",
            "axis_names",
        ),
        position="middle",
        communication="matrix",
        response="proportional",  # vectors pass as they are
        state_bytes=0,
        moved_bytes=12,
        # Five steps multiply rounding by up to 3.44^5 = 485 where singular values are small.
        tolerance={"sharding": 5e-5, "compose": 2e-4},
        paper='Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024',
        reference="KellerJordan/Muon@857d1adc15:muon.py:zeropower_via_newtonschulz5",
        licence="MIT",
    ),
    Method(
        factory=scale_by_muon,
        kind="piece",
        summary="momentum, then Newton-Schulz",
        # Full products, so that the contract can compare to rounding.
        example={"ns_dtype": None},
        traced=("momentum", "eps"),
        static=(
            "nesterov",
            "ns_steps",
            "ns_coeffs",
            "momentum_form",
            "ns_dtype",
            "bucket",
            "mu_dtype",
            "matrix_axes",
            "split_outputs",
            "axis_names",
        ),
        position="middle",
        communication="matrix",
        response="proportional",  # vectors get their momentum only
        state_bytes=4,
        moved_bytes=20,
        # Five steps multiply rounding by up to 3.44^5 = 485 where singular values are small.
        tolerance={"sharding": 5e-5, "compose": 2e-4},
        paper='Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024',
        reference="KellerJordan/Muon@857d1adc15:muon.py:muon_update",
        licence="MIT",
    ),
)
