"""The bounds of elastic consistency as functions, an equation each, with its source.

Notation: p workers, tau staleness in server steps, alpha step size, T steps, L smoothness, c strong convexity (or
Polyak-Lojasiewicz) constant, sigma^2 gradient variance, M^2 second moment, gamma compressor error, B the constant of
E||x_t - v_t^i||^2 <= alpha^2 B^2 for every step t and worker i, which defines elastic consistency.
[EC]: Nadiradze et al., "Elastic consistency: a practical consistency model for distributed stochastic gradient
descent", AAAI 2021 (arXiv 2001.05918). "Derived": docs/explanation/theory.md gives the proof; the constants are ours.
"""

from __future__ import annotations

from math import inf, sqrt
from typing import NamedTuple

# What a constant B costs: rates of convergence. Each raises ValueError outside its condition on alpha.


def nonconvex_single(gap: float, alpha: float, T: int, L: float, B: float, sigma: float) -> float:
    """Bound on (1/T) SUM E||grad f(x_t)||^2, one push a step, alpha L <= 1, gap = f(x_0) - f*.

    2 gap/(alpha T) + L^2 alpha^2 B^2 + L alpha sigma^2  (N1, derived; [EC] theorem 1 is looser).
    """
    _require(alpha * L <= 1, "alpha L <= 1", alpha, L)
    return 2 * gap / (alpha * T) + (L * alpha * B) ** 2 + L * alpha * sigma**2


def nonconvex_parallel(
    gap: float, alpha: float, T: int, L: float, B: float, sigma: float, p: int, *, everybody: bool = False
) -> float:
    """The same for steps of |I_t| pushes of weight 1/p each, p/2 <= |I_t| <= p, alpha L <= 1.

    4 gap/(alpha T) + 2 L^2 alpha^2 B^2 + 2 L alpha sigma^2/p, and half of it if |I_t| = p always  (N2, derived).
    """
    _require(alpha * L <= 1, "alpha L <= 1", alpha, L)
    bound = 4 * gap / (alpha * T) + 2 * (L * alpha * B) ** 2 + 2 * L * alpha * sigma**2 / p
    return bound / 2 if everybody else bound


def nonconvex_any_size(gap: float, alpha: float, S: float, L: float, B: float, sigma: float, p: int) -> float:
    """The same, each step weighted by |I_t|, for 1 <= |I_t| <= p pushes of weight 1/p, S = SUM |I_t|/p, alpha L <= 1.

    2 gap/(alpha S) + L^2 alpha^2 B^2 + L alpha sigma^2/p  (N3, derived). |I_t| must not depend on its members' noise.
    """
    _require(alpha * L <= 1, "alpha L <= 1", alpha, L)
    return 2 * gap / (alpha * S) + (L * alpha * B) ** 2 + L * alpha * sigma**2 / p


def convex_single(square: float, alpha: float, T: int, L: float, c: float, B: float, sigma: float) -> float:
    """Bound on E||x_T - x*||^2, one push a step, alpha <= 1/(2L), square = ||x_0 - x*||^2.

    (1 - alpha c/2)^T square + 2 alpha sigma^2/c + 2 (2L + c) alpha^2 B^2/c  (C1, derived).
    """
    _require(2 * alpha * L <= 1, "alpha L <= 1/2", alpha, L)
    return (1 - alpha * c / 2) ** T * square + 2 * alpha * sigma**2 / c + 2 * (2 * L + c) * (alpha * B) ** 2 / c


def convex_parallel(
    square: float,
    alpha: float,
    T: int,
    L: float,
    c: float,
    B: float,
    sigma: float,
    p: int,
    *,
    everybody: bool = False,
) -> float:
    """The same for steps of p/2 <= |I_t| <= p pushes of weight 1/p each: sigma^2/p in place of sigma^2.

    The first factor is (1 - alpha c/4)^T, or as in `convex_single` if |I_t| = p always  (C2, derived).
    """
    _require(2 * alpha * L <= 1, "alpha L <= 1/2", alpha, L)
    shrunk = (1 - alpha * c / (2 if everybody else 4)) ** T
    return shrunk * square + 2 * alpha * sigma**2 / (c * p) + 2 * (2 * L + c) * (alpha * B) ** 2 / c


def polyak_lojasiewicz(
    gap: float, alpha: float, T: int, L: float, c: float, B: float, sigma: float, p: int = 1
) -> float:
    """Bound on E f(x_T) - f*, one push a step (p = 1) or p of them always, ||grad f||^2 >= 2c (f - f*), alpha L <= 1.

    (1 - alpha c)^T gap + L^2 alpha^2 B^2/(2c) + L alpha sigma^2/(2 c p)  (PL, derived).
    """
    _require(alpha * L <= 1, "alpha L <= 1", alpha, L)
    return (1 - alpha * c) ** T * gap + (L * alpha * B) ** 2 / (2 * c) + L * alpha * sigma**2 / (2 * c * p)


def _require(holds: bool, condition: str, alpha: float, L: float) -> None:
    if not holds:
        raise ValueError(f"the bound needs {condition}, got alpha = {alpha}, L = {L}")


# What constant B a system has.


def b_shared_memory(tau: float, M: float) -> float:
    """tau M: full steps applied at once, a copy misses at most tau of them, with inconsistent reads too (derived).

    [EC] has sqrt(d) tau M; the factor is lost between the 1-norm and the 2-norm, and is not needed.
    """
    return tau * M


def b_message_passing(p: int, tau: float, M: float, *, reapplies_own: bool = True) -> float:
    """(p - 1) tau M/p: pushes of weight 1/p, a copy misses at most tau rounds of everybody else's ([EC]).

    With p in place of p - 1 where a worker does not re-apply its own pushes under way (derived).
    """
    return (p - 1 if reapplies_own else p) * tau * M / p


def b_reapplied(facts: Facts) -> float:
    """r M: pushes of its own that a copy contains with other weights than the model, in all by r (derived).

    With plain SGD they cancel in x - v but for r. Else neither they nor the steps that the model made of them do.
    """
    return facts.reapplied * (facts.M_push if facts.plain else facts.M_push + facts.M)


def b_message_passing_variance(p: int, tau: float, sigma: float) -> float:
    """3 (p - 1) tau sigma/p: the own gradient in place of each missing one, alpha <= 1/(6 L tau) (derived; [EC])."""
    return 3 * (p - 1) * tau * sigma / p


def b_missed_steps(tau: float, share: float, M: float) -> float:
    """tau share M: steps of step scale `share`, a copy misses at most tau of them (derived)."""
    return tau * share * M


def b_stale_synchronous(p: int, bound: int, M: float) -> float:
    """(2 bound + 1)(p - 1) M/p: all that a copy can miss between pull and push, each of weight 1/p (derived)."""
    return (2 * bound + 1) * (p - 1) * M / p


def b_error_feedback(gamma: float, M: float) -> float:
    """sqrt(gamma)/(1 - sqrt(gamma)) M, attained by a scalar contraction; inf without a contraction (derived)."""
    return inf if gamma >= 1 else sqrt(gamma) / (1 - sqrt(gamma)) * M


def b_error_feedback_published(gamma: float, M: float) -> float:
    """sqrt((2 - gamma) gamma/(1 - gamma)^3) M ([EC])."""
    return inf if gamma >= 1 else sqrt((2 - gamma) * gamma / (1 - gamma) ** 3) * M


def b_error_feedback_single(gamma: float, M: float, p: int) -> float:
    """p sqrt(gamma)/(1 - sqrt(gamma)) M: full steps, p private residuals (derived)."""
    return p * b_error_feedback(gamma, M)


def b_crash(f: float, p: int, M: float) -> float:
    """f M/p: at most f <= p/2 crashes, or losses that are applied the round after ([EC])."""
    return f * M / p


def b_crash_variance(f: float, p: int, sigma: float) -> float:
    """3 f sigma/p: the receiver's own gradient in place of each missing one, alpha <= 1/(6L) ([EC], derived)."""
    return 3 * f * sigma / p


def b_norm_bounded(m: float, p: int, M: float) -> float:
    """m M/p: zero in place of at most m missing pushes of weight 1/p (derived; [EC] O(M))."""
    return m * M / p


def b_norm_bounded_announced(beta: float, M: float) -> float:
    """(1 - beta) M: workers announce their norms before the round closes (derived; [EC] O(M))."""
    return (1 - beta) * M


def b_variance_bounded(m: float, p: int, sigma: float, lateness: int = 1, M: float = 0.0) -> float:
    """3 sigma m/p + (lateness - 1) m M/(4p): an unbiased placeholder, alpha <= 1/(6L), equal data.

    The first term ([EC] 3 sigma; derived) is all if late gradients come within a round. An own gradient that replaces
    one late for `lateness` rounds was taken up to lateness - 1 steps of alpha M away from it (derived).
    """
    return 3 * sigma * m / p + max(0, lateness - 1) * m * M / (4 * p)


def b_own_placeholder(m: int, p: int, sigma: float) -> float:
    """sigma sqrt(m (m + 1))/p: the noise alone, exactly, of an own gradient for m missing ones (derived)."""
    return sigma * sqrt(m * (m + 1)) / p


def b_mean_placeholder(m: int, p: int, sigma: float) -> float:
    """sigma sqrt(m/(p (p - m))): the noise alone, exactly, of the mean of p - m for m missing ones (derived)."""
    return sigma * sqrt(m / (p * (p - m)))


def b_zero_placeholder(m: int, p: int, sigma: float, gradient: float) -> float:
    """sqrt(m^2 ||grad f||^2 + m sigma^2)/p, exactly, of zero for m missing pushes (derived)."""
    return sqrt((m * gradient) ** 2 + m * sigma**2) / p


def b_local_steps(H: int, M: float, p: int) -> float:
    """2 (p - 1)/p (H - 1) M: a local model H - 1 steps on, against the mean of all (derived)."""
    return 2 * (p - 1) / p * (H - 1) * M


# What a policy declares.

SMALL_STEP = "alpha <= 1/(6L)"
EQUAL_DATA = "equal data on all workers"
REPAID = "every late push is repaid"


def p_layer_empty(layer: int, layers: int, workers: int) -> float:
    """((L - l) / L)^U: that none of U workers has come to layer l of L (1 is the input's), each depth being as likely.

    Source: arXiv 2403.18375; backward runs from layer L to layer 1, so a worker lacks l if it stopped behind it.
    """
    return float(((layers - layer) / layers) ** workers)


class Facts(NamedTuple):
    """What a run measured: the quantities that constants are made of. Norms are 2-norms in gradient units.

    - `p`, `fewest`: most and fewest live workers at a time.
    - `M`: rms norm of a decoded push with plain SGD, else `M_applied`.
    - `M_push`: rms norm of a decoded push, as the server used it.
    - `M_applied`: rms of ||change of the model||/(alpha x step scale) over the server steps.
    - `sigma`: standard deviation of a gradient; `None` if no step used two, or SGD is not plain.
    - `tau`: largest staleness, in versions.
    - `shares`: largest sum of the step scales of the steps between a worker's copy and its use.
    - `owed`: m, most late gradients with a placeholder at the same time.
    - `lateness`: most server steps from a placeholder to its late gradient, the step with the placeholder included.
    - `lost`: late gradients that were discarded or never came.
    - `momentum`: of the optimizer, in [0, 1).
    - `plain`: whether the optimizer is SGD without momentum and weight decay.
    - `reapplied`: r, largest sum of weight/alpha of re-applied pushes; if plain, less what the model has of them.
    """

    p: int
    fewest: int
    M: float
    M_push: float = 0.0
    M_applied: float = 0.0
    sigma: float | None = None
    tau: int = 0
    shares: float = 0.0
    owed: int = 0
    lateness: int = 0
    lost: int = 0
    momentum: float = 0.0
    plain: bool = True
    reapplied: float = 0.0


class Bound(NamedTuple):
    """The constant B of E||x_t - v||^2 <= alpha^2 B^2, for every gradient used.

    - `value`: B in gradient units, >= 0; `None` if there is no constant.
    - `formula`: how it is made, as in "tau M/p"; without a constant the reason. The symbols tau, m, p, s, r, sigma and
      M are explained with their values in `B_theory_text`.
    - `conditions`: what the theorem needs, each in a few words. `verify` gives no verdict if one is broken.
    - `broken`: those of the conditions that the facts contradict.
    - `kind`: "declared" if B follows from the settings; "observed" if tau, or the number missing, is from the run.
    - `every_push`: D <= alpha B for every single push, not only in the mean: one push above it breaks the promise.
    """

    value: float | None
    formula: str
    conditions: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()
    kind: str = "declared"
    every_push: bool = False


def no_bound(reason: str) -> Bound:
    """No constant, and the `reason` in words, for a person to read."""
    return Bound(None, reason)


def exact(formula: str = "0: every push used is of the current version") -> Bound:
    """B = 0 for every push: D is always 0. `formula` says why."""
    return Bound(0.0, formula, every_push=True)


def late_norm(facts: Facts) -> float:
    """The rms of what a late gradient is to the model in the end, over its step scale: its norm/(1 - momentum).

    A gradient of 1 moves x by alpha (1 + mu + ... + mu^l), at most, l steps on; with Nesterov too (heavy ball).
    """
    return facts.M_push / (1 - facts.momentum)
