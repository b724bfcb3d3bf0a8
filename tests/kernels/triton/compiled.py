"""Compiles kernels for GPUs that need not be there, and reads what the compiler made of them.

Other rooms of this folder run kernels under the interpreter, where nothing can be compiled; so
`python -m tests.kernels.triton.compiled ARCH` does it in a process of its own and prints JSON.
Each `specs_*.py` beside this file has a list SPECS of the kernels that it wants compiled.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ARCHS = (80, 90)
HERE = Path(__file__).parent
ROOT = HERE.parents[2]
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
"""Shared memory that one program may have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSpec:
    """One kernel with the arguments that it is launched with on a GPU."""

    name: str
    """What is tried, unique among all specs."""
    kernel: Any
    """The `triton.jit` function."""
    signature: Mapping[str, str]
    """Types of the arguments that are no constants: "*bf16", "*i32", "i32", "fp32"."""
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    """The constants; also arguments that are None."""
    divisible: tuple[str, ...] = ()
    """Integers that are multiples of 16 at run time. Pointers are taken to be aligned."""
    num_warps: int = 4
    num_stages: int = 3
    hot: bool = False
    """Must not spill."""
    instructions: tuple[str, ...] = ()
    """Must stand in the PTX, named as in `Compiled.instructions`."""
    resident: int = 1
    """Programs that a multiprocessor of sm_90 must have registers and shared memory for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """What became of a kernel on one architecture."""

    registers: int
    """Per thread."""
    shared_bytes: int
    """Per program."""
    spilled_bytes: int
    """Per thread: local memory that the compiler needed."""
    instructions: dict[str, int]
    """How often memory and matrix instructions stand in the PTX, by their names without types:
    "ld.global.v4", "cp.async.16", "mma.sync", "wgmma.mma_async"."""


def all_specs() -> list[KernelSpec]:
    """Of all files of specs, checked for doubles."""
    names = sorted(path.stem for path in HERE.glob("specs_*.py"))
    modules = [importlib.import_module(f"tests.kernels.triton.{name}") for name in names]
    specs = [spec for module in modules for spec in module.SPECS]
    twice = [name for name, count in Counter(spec.name for spec in specs).items() if count > 1]
    if twice:
        raise ValueError(f"several kernel specs are called {twice}")
    return specs


def compiled(spec: KernelSpec, arch: int) -> Compiled:
    """Compiles for sm_`arch`; not under the interpreter."""
    import triton  # type: ignore[import-untyped]
    from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]
    from triton.compiler import ASTSource  # type: ignore[import-untyped]

    names = spec.kernel.arg_names
    given = set(spec.signature) | set(spec.constexprs)
    if given != set(names):
        raise ValueError(f"{spec.name}: the spec and the kernel differ in {given ^ set(names)}")
    signature = {name: spec.signature.get(name, "constexpr") for name in names}
    aligned = [
        (i,) for i, n in enumerate(names) if signature[n].startswith("*") or n in spec.divisible
    ]
    source = ASTSource(
        spec.kernel,
        signature,
        constexprs=dict(spec.constexprs),
        attrs={index: [["tt.divisibility", 16]] for index in aligned},
    )
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    result = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, spilled = _resources(result.asm["cubin"])
    return Compiled(
        registers=registers,
        shared_bytes=result.metadata.shared,
        spilled_bytes=spilled,
        instructions=_instructions(result.asm["ptx"]),
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack and local memory) per thread."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _instructions(ptx: str) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for line in ptx.splitlines():
        if match := re.search(r"\b(ld|st)\.global(?:\.\w+(?:::\w+)?)*?(\.v\d)?\.[bfu]\d+", line):
            counts[f"{match[1]}.global{match[2] or ''}"] += 1
        elif match := re.search(r"\bcp\.async\.c[ag]\S* .*?\], (0x\w+|\d+)", line):
            counts[f"cp.async.{int(match[1], 0)}"] += 1
        elif match := re.search(r"\b(mma\.sync|wgmma\.mma_async)\b", line):
            counts[match[1]] += 1
    return dict(sorted(counts.items()))


def compile_all(arch: int) -> dict[str, Compiled]:
    """Every spec for sm_`arch`, in a process without the interpreter.

    Raises:
        RuntimeError: a kernel does not compile; with what the process printed.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.triton.compiled", str(arch)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"kernels do not compile for sm_{arch}:\n{done.stdout}{done.stderr}")
    results = json.loads(done.stdout.splitlines()[-1])
    return {name: Compiled(**result) for name, result in results.items()}


def main(arch: int) -> None:
    results: dict[str, Any] = {}
    for spec in all_specs():
        try:
            results[spec.name] = asdict(compiled(spec, arch))
        except Exception as error:
            raise RuntimeError(f"{spec.name} does not compile for sm_{arch}") from error
    print(json.dumps(results))


if __name__ == "__main__":
    main(int(sys.argv[1]))
