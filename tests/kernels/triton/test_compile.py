"""Every kernel compiles for the GPUs that we name, at the tile sizes that serve.

`pytest -s` prints registers, shared memory and spills.
"""

from __future__ import annotations

import pytest

from tests.kernels.triton.compiled import ARCHS, SHARED_BYTES, Compiled, all_specs, compile_all

SPECS = {spec.name: spec for spec in all_specs()}


@pytest.fixture(scope="module", params=ARCHS, ids=lambda arch: f"sm_{arch}")
def of_arch(request: pytest.FixtureRequest) -> tuple[int, dict[str, Compiled]]:
    arch: int = request.param
    results = compile_all(arch)
    print(
        f"\n{'kernel':40} {'arch':>5} {'registers':>9} {'shared_bytes':>12} {'spilled_bytes':>13}"
    )
    for name, result in results.items():
        print(
            f"{name:40} sm_{arch} {result.registers:9} {result.shared_bytes:12} "
            f"{result.spilled_bytes:13}  {result.instructions}"
        )
    return arch, results


def test_all_kernels_compile_within_the_limits(of_arch: tuple[int, dict[str, Compiled]]) -> None:
    arch, results = of_arch
    assert set(results) == set(SPECS)
    for name, result in results.items():
        assert 0 < result.registers <= 255, name
        assert result.shared_bytes <= SHARED_BYTES[arch], name
        assert result.registers * 32 * SPECS[name].num_warps <= 65536, name


def test_hot_kernels_do_not_spill(of_arch: tuple[int, dict[str, Compiled]]) -> None:
    _, results = of_arch
    assert any(spec.hot for spec in SPECS.values())
    spilled = {n: r.spilled_bytes for n, r in results.items() if r.spilled_bytes and SPECS[n].hot}
    assert spilled == {}


def test_kernels_move_data_as_they_say(of_arch: tuple[int, dict[str, Compiled]]) -> None:
    _, results = of_arch
    for name, spec in SPECS.items():
        assert set(spec.instructions) <= set(results[name].instructions), name


def test_programs_that_run_together_fit(of_arch: tuple[int, dict[str, Compiled]]) -> None:
    arch, results = of_arch
    for name, spec in SPECS.items():
        if arch == 90:
            # Registers are handed out to a warp by 8 for each thread.
            registers = -(-results[name].registers // 8) * 8 * 32 * spec.num_warps
            assert spec.resident * registers <= 65536, name
            assert spec.resident * (results[name].shared_bytes + 1024) <= 228 * 1024, name
