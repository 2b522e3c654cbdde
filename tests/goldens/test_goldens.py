"""Every recorded trajectory is reproduced, and every array in it compared or excused."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest

from optimkit import catalog
from tests.exempt import marks_of
from tests.goldens import adapters
from tests.goldens.golden import FOLDER, DamagedGolden, all_goldens, load, resolve

GOLDENS = all_goldens()

# -- which method needs which golden ----------------------------------------------------------

COVERED_BY: dict[str, str] = {
    "adam_hd": "hypergradient",
    "adamw_eg": "exponentiated_gradient",
    "adamw_8bit": "quantized_state",
    "am_adamw": "adaptive_memory",
    "am_sgd": "adaptive_memory",
    "apollo_mini": "apollo",
    "apply_proximal_decay": "adan",
    "by_kind": "muon",
    "clip_by_tracked_max": "stable_spam",
    "clip_spikes": "spam",
    "dale_langevin": "exponentiated_gradient",
    "dampened_trace": "exponentiated_gradient",
    "decay_after_step": "spam",
    "drift_adjusted_sgd": "drift_adjusted",
    "ema_momentum": "muon",
    "exponentiate_updates": "exponentiated_gradient",
    "fedhyper_client_local": "fedhyper",
    "fedhyper_global": "fedhyper",
    "flip_signs": "curl_descent",
    "gate_small_gradients": "classp",
    "gradient_friction": "diffgrad",
    "hybrid": "mkor",
    "hybrid_auon": "auon",
    "keep_signs": "exponentiated_gradient",
    "lamb": "mkor",
    "lanczos_learning_rate": "lanczos_lr",
    "last_layer_momentum": "scale_sgd",
    "mkor_h": "mkor",
    "momentum_reset": "spam",
    "normalize_by_tracked_norm": "stable_spam",
    "normalize_columns": "scale_sgd",
    "normalized_gradient_search": "gradient_regularized_newton",
    "orthogonal_to_params": "perp_grad",
    "orthogonalize_updates": "muon",
    "perp_adamw": "perp_grad",
    "perp_sgd": "perp_grad",
    "project_low_rank": "galore",
    "project_out": "coso",
    "project_radial": "adamp",
    "project_scale_offset": "normalize_and_project",
    "project_to_norm": "normalize_and_project",
    "refactorized": "weight_refactorization",
    "sam": "sharpness_aware",
    "quantize_state": "quantized_state",
    "scale_by_adam": "adamp",
    "scale_by_adan": "adan",
    "scale_by_adaptive_memory": "adaptive_memory",
    "scale_by_apollo": "apollo",
    "scale_by_belief": "adabelief",
    "scale_by_bias_correction": "fira",
    "scale_by_classp": "classp",
    "scale_by_cosh_rms": "auon",
    "scale_by_diffgrad": "diffgrad",
    "scale_by_fedhyper_client": "fedhyper",
    "scale_by_drift": "drift_adjusted",
    "scale_by_init_snr": "sgd_sai",
    "scale_by_lion": "lion",
    "scale_by_lion_k": "lion_k",
    "scale_by_matrix_shape": "muon",
    "scale_by_mkor": "mkor",
    "scale_by_muon": "muon",
    "scale_by_mup": "mup",
    "scale_by_rectified_belief": "adabelief",
    "scale_by_spam": "spam",
    "scale_by_snr": "snr_learning_rate",
    "scale_to_weight_norm": "mkor",
    "schedule_free_adamw": "schedule_free",
    "schedule_free_radam": "schedule_free",
    "schedule_free_sgd": "schedule_free",
    "sgd_hd": "hypergradient",
    "sign_constrained_sgd": "exponentiated_gradient",
    "snr_sgd": "snr_learning_rate",
    "sparse_momentum": "spam",
    "suppress_outliers": "root",
    "track_spike_score": "spam",
    "track_gradient_disorder": "gaqat",
    "tract_precondition": "tract",
    "weight_norm_adam": "gradnormlorp",
    "weight_normalized": "gradnormlorp",
    "with_averaged_params": "checkpoint_averaging",
}
"""Pieces and wrappers are verified through a method whose golden runs them."""

FIDELITY_CASES = tuple(
    name
    for name, record in catalog.records().items()
    if record.kind in ("recipe", "piece", "wrapper")
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=marks_of(catalog.find(name), "fidelity")) for name in FIDELITY_CASES],
)
def test_method_has_a_golden(name: str) -> None:
    method = COVERED_BY.get(name, name)
    assert any(golden.method == method for golden in GOLDENS.values()), (
        f"{name} has no golden {method}__*.npz; copy one, or name the method that covers it"
    )


# -- the goldens ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDENS)
def test_golden(name: str) -> None:
    golden = GOLDENS[name]
    errors = adapters.run(golden)
    worst = {array: error for array, error in errors.items() if not error <= golden.tolerance}
    assert not worst, f"{name} (tolerance {golden.tolerance:g}): {worst}"
    assert not adapters.uncompared(golden, errors)


@pytest.mark.parametrize("name", GOLDENS)
def test_signature(name: str) -> None:
    golden = GOLDENS[name]
    module = adapters.method_module(golden)
    protocols = getattr(module, "STANDS_FOR", {})
    names = [n for name in golden.factory_names for n in protocols.get(name, (name,))]
    factories = [resolve(name) for name in names]
    known = {p for factory in factories for p in inspect.signature(factory).parameters}
    known |= set(getattr(module, "DESCRIBED", ()))
    assert set(golden.meta["optimkit"]["kwargs"]) <= known


# -- the harness itself can fail --------------------------------------------------------------


def test_a_wrong_constant_turns_a_golden_red() -> None:
    golden = GOLDENS["lion__default"]
    assert adapters.run(golden)["params"] <= golden.tolerance
    assert adapters.run(golden, b2=0.9901)["params"] > 1e-3


def test_a_wrong_constant_in_a_projection_turns_a_golden_red() -> None:
    golden = GOLDENS["adamp__default"]
    assert adapters.run(golden, delta=0.05)["params"] > golden.tolerance


@pytest.mark.parametrize("keep", [0, 100, -200])
def test_a_damaged_golden_is_an_error(tmp_path: Path, keep: int) -> None:
    whole = (FOLDER / "lion__default.npz").read_bytes()
    damaged = tmp_path / "lion__damaged.npz"
    damaged.write_bytes(whole[:keep])
    with pytest.raises(DamagedGolden, match=r"lion__damaged\.npz"):
        load(damaged)


def test_a_golden_without_meta_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "lion__bare.npz"
    np.savez(path, params=np.zeros(3))
    with pytest.raises(DamagedGolden, match="cannot be read"):
        load(path)


def test_arrays_nobody_compares_are_found() -> None:
    golden = GOLDENS["adamp__default"]
    assert adapters.uncompared(golden, {"params": 0.0}) == sorted(
        name for name in golden.arrays if name.startswith("branch/")
    )
