"""Loss against FLOPs: smoothing, and how much sooner one curve arrives where another ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Curve = Sequence[tuple[float, float]]
"""Points (FLOPs, loss) by rising FLOPs."""

MODALITIES = ("text", "image", "all")


def smoothed(curve: Curve, window: int) -> list[tuple[float, float]]:
    """Means over `window` points in a row, of FLOPs as of losses.

    Since both are averaged, a curve keeps its place: equal curves stay equal, and one that is
    twice as fast stays so. A curve shorter than the window becomes one point.
    """
    window = max(1, min(window, len(curve)))
    if not curve:
        return []
    means = []
    for end in range(window, len(curve) + 1):
        part = curve[end - window : end]
        flops, loss = (sum(values) / window for values in zip(*part, strict=True))
        means.append((flops, loss))
    return means


def flops_to_reach(curve: Curve, loss: float) -> float | None:
    """FLOPs from which on a curve is at or below `loss`, on straight lines between its points.

    For good, not for the first time: a dip by chance would count, and the noisier curve win.
    None if the curve ends above. One that is never above has reached it by its first point.
    """
    above = [index for index, (_, value) in enumerate(curve) if value > loss]
    if not curve or (above and above[-1] == len(curve) - 1):
        return None
    if not above:
        return curve[0][0]
    before, after = curve[above[-1]], curve[above[-1] + 1]
    share = (before[1] - loss) / (before[1] - after[1])
    return before[0] + share * (after[0] - before[0])


def speed_up(dense: Curve, sparse: Curve) -> float | None:
    """eta (MoMa, 2407.21770, section 4): the sparse model reaches the dense one's last loss with
    1 / eta of its FLOPs. None if it does not reach it."""
    if not dense or not sparse:
        return None
    flops, loss = dense[-1]
    reached = flops_to_reach(sparse, loss)
    return None if reached is None else flops / reached


def mean(values: Sequence[float | None]) -> float | None:
    """Of all values; None if there are none, or one of them is None: "never" has no mean."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def curves_of(
    records: Sequence[Mapping[str, float]], prefix: str = "", flops_before: float = 0.0
) -> dict[str, list[tuple[float, float]]]:
    """Curves by modality out of a run's log.

    Args:
        prefix: "" for the training losses, "valid_" for those on validation data.
        flops_before: what another run had spent before this one began.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for name in MODALITIES:
        key = f"{prefix}{name}_nll"
        found[name] = [(flops_before + r["flops"], r[key]) for r in records if key in r]
    return found
