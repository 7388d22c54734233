"""The one place for tolerances: relative error in the Euclidean norm against float64."""

from __future__ import annotations

import torch

EXACT = {torch.float64: 1e-12, torch.float32: 1e-5}
# Whole models: transformers keeps norms, rotary angles and some softmaxes in float32 whatever the model's dtype.
SCORES = {torch.float64: 1e-7, torch.float32: 1e-5}
GRADIENTS = {torch.float64: 1e-5, torch.float32: 1e-4}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """||actual - expected|| / ||expected||, over the entries that are finite in `expected`; others must be equal."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert actual.shape == expected.shape, f"shape {list(actual.shape)}, expected {list(expected.shape)}"
    finite = expected.isfinite()
    assert torch.equal(actual.isfinite(), finite), "non-finite entries differ"
    norm = expected[finite].norm()
    return float((actual[finite] - expected[finite]).norm() / norm.clamp(min=1e-30)) if finite.any() else 0.0


def assert_exact(actual: torch.Tensor, expected: torch.Tensor, name: str = "", *, slack: float = 1.0) -> None:
    """Within the contract of the dtype; `slack` for sums over many layers or for gradients that nearly cancel."""
    if float(expected.detach().abs().nan_to_num(posinf=0, neginf=0).max()) < 1e-13 * slack:
        assert float(actual.detach().abs().max()) < 1e-6, f"{name}: expected about zero"
        return
    error, limit = relative_error(actual, expected), EXACT[actual.dtype] * slack
    assert error <= limit, f"{name}: relative error {error:.2e} above {limit:.0e}"


def assert_as_good_as(actual, eager, expected, name: str = "", *, factor: float = 2.0) -> None:
    """16-bit contract: at most `factor` times the error that PyTorch's own path makes against float64."""
    error, allowed = relative_error(actual, expected), factor * relative_error(eager, expected) + 1e-6
    assert error <= allowed, f"{name}: relative error {error:.2e} above {allowed:.2e}"


def flat(tensors) -> torch.Tensor:
    """One vector of all entries of an iterable of tensors."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def assert_same_scores(actual: list, expected: list, name: str = "scores") -> None:
    """Matrices of a model against those of its plain forward."""
    assert [a.shape for a in actual] == [e.shape for e in expected]
    error, limit = relative_error(flat(actual), flat(expected)), SCORES[actual[0].dtype]
    assert error <= limit, f"{name}: relative error {error:.2e} above {limit:.0e}"


def assert_same_gradients(actual: dict, expected: dict, *, slack: float = 1.0) -> None:
    """Gradients by parameter name, each relative to itself or, where nearly zero, to 1e-3 of the whole."""
    assert actual.keys() == expected.keys(), f"gradients differ in {sorted(actual.keys() ^ expected.keys())}"
    whole = float(flat(expected.values()).double().norm())
    assert whole > 0, "expected a gradient"
    for name, e in expected.items():
        a, limit = actual[name], GRADIENTS[e.dtype] * slack
        error = float((a - e).double().norm()) / max(float(e.double().norm()), 1e-3 * whole)
        assert error <= limit, f"gradient of {name}: relative error {error:.2e} above {limit:.0e}"
