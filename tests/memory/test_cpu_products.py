"""The kernel for small batched products, and that compiled chunk functions go through it where it is wanted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hope_train.memory import cpu_products
from hope_train.memory.compiled import compile_with_budget

needs_kernel = pytest.mark.skipif(not cpu_products.wanted(), reason="this processor does not gain from the kernel")

SHAPES = [
    (3, 64, 64, 64),
    (2, 5, 7, 16),
    (2, 1, 64, 48),
    (4, 13, 33, 96),
    (1, 64, 1, 32),
    (2, 6, 20, 320),
    (3, 0, 4, 16),
]


def operand(batch: int, rows: int, columns: int, layout: str) -> Tensor:
    """[batch, rows, columns] with contiguous rows, contiguous columns, or neither."""
    if layout == "rows":
        return torch.randn(batch, rows, columns)
    if layout == "columns":
        return torch.randn(batch, columns, rows).mT
    return torch.randn(batch, rows, 2 * columns)[:, :, ::2]


@needs_kernel
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("left", ["rows", "columns", "neither"])
@pytest.mark.parametrize("right", ["rows", "columns", "neither"])
def test_equals_the_product_in_float64(shape: tuple[int, int, int, int], left: str, right: str) -> None:
    assert cpu_products.load(), "wanted here, but it could not be built"
    torch.manual_seed(0)
    batch, rows, inner, columns = shape
    a, b = operand(batch, rows, inner, left), operand(batch, inner, columns, right)
    got, want = torch.ops.hope.bmm(a, b), a.double() @ b.double()
    assert got.shape == want.shape
    bound = 2e-7 * inner * (a.abs().double() @ b.abs().double())  # inner roundings of half a unit in the last place
    assert ((got - want).abs() <= bound).all()
    out = torch.full((batch, rows, columns), torch.nan)
    torch.ops.hope.bmm.out(a, b, out=out)
    assert torch.equal(out, got)


@needs_kernel
@pytest.mark.parametrize("size", [16, 32, 64])
def test_inverses_of_unit_lower_triangles(size: int) -> None:
    """Within what the library's substitution in float32 is off, whatever stands on and above the diagonal."""
    assert cpu_products.load()
    torch.manual_seed(2)
    lower = torch.randn(2, 3, size, size) * torch.logspace(-3, 0, 6).view(2, 3, 1, 1) / size**0.5
    eye = torch.eye(size, dtype=torch.float64)
    want = torch.linalg.solve_triangular(lower.double(), eye.expand(2, 3, -1, -1), upper=False, unitriangular=True)
    library = torch.linalg.solve_triangular(lower, eye.float().expand(2, 3, -1, -1), upper=False, unitriangular=True)
    got = torch.ops.hope.unit_lower_inverse(lower)
    assert (got - want).abs().max() <= 4 * (library - want).abs().max()
    assert torch.equal(got, torch.ops.hope.unit_lower_inverse(lower.mT.contiguous().mT))
    assert torch.equal(got.triu(1), torch.zeros_like(got))


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2])
def test_more_threads_give_the_same_bits(threads: int) -> None:
    assert cpu_products.load()
    torch.manual_seed(1)
    a, b = torch.randn(9, 64, 64), torch.randn(9, 64, 64)
    before = torch.get_num_threads()
    alone = torch.cat([torch.ops.hope.bmm(a[i : i + 1], b[i : i + 1]) for i in range(9)])
    try:
        torch.set_num_threads(threads)
        assert torch.equal(torch.ops.hope.bmm(a, b), alone)
    finally:
        torch.set_num_threads(before)


@needs_kernel
@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, 5, 16)),
        (torch.zeros(2, 3, 4), torch.zeros(3, 4, 16)),
        (torch.zeros(2, 3, 4), torch.zeros(2, 4, 15)),
        (torch.zeros(2, 3, 4).double(), torch.zeros(2, 4, 16).double()),
    ],
)
def test_refuses_what_it_cannot_do(a: Tensor, b: Tensor) -> None:
    assert cpu_products.load()
    with pytest.raises(RuntimeError, match="hope::bmm"):
        torch.ops.hope.bmm(a, b)
    with pytest.raises(RuntimeError, match="hope::unit_lower_inverse"):
        torch.ops.hope.unit_lower_inverse(torch.zeros(2, 8, 8))


@pytest.fixture
def afresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """As on a machine where nothing has been built yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu_products.load.cache_clear()
    yield
    cpu_products.load.cache_clear()


@pytest.mark.usefixtures("afresh")
def test_another_processor_uses_the_compilers_products(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu_products, "wanted", lambda: False)
    assert not cpu_products.load()
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("compiler", ["missing", "broken"])
def test_without_a_compiler_that_works_a_line_says_so_once(
    compiler: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'a.cpp: in f' >&2\necho 'a.cpp:3: fatal error: no headers' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(cpu_products, "wanted", lambda: True)
    monkeypatch.setenv("CXX", str(tmp_path / compiler))
    assert not cpu_products.load()
    assert not cpu_products.load()
    out, error = capfd.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert error.startswith("warning: ")
    assert "the memories use the library's slower products" in error
    assert ("a.cpp:3: fatal error: no headers" if compiler == "broken" else "missing") in error
    cpu_products.load.cache_clear()
    monkeypatch.setenv("LOCAL_RANK", "1")  # the first rank of this machine has said it
    assert not cpu_products.load()
    assert capfd.readouterr() == ("", "")


@needs_kernel
@pytest.mark.slow
def test_compiled_functions_use_it_forward_and_backward() -> None:
    """float32 through the kernel, with gradients; float64 stays with the compiler's products."""

    def function(a: Tensor, b: Tensor) -> Tensor:
        return torch.tanh(a @ b.mT) @ b

    a, b = torch.randn(4, 32, 64, requires_grad=True), torch.randn(4, 32, 64, requires_grad=True)
    compiled = compile_with_budget(function, 1.0, own_products=True)
    compiled(a, b).sum().backward()  # compiling itself computes small products
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        got = torch.autograd.grad(compiled(a, b).square().sum(), (a, b))
    names = [event.name for event in profile.events() or []]
    assert names.count("hope::bmm") >= 6
    assert "aten::bmm" not in names
    want = torch.autograd.grad(function(a.double(), b.double()).square().sum(), (a, b))
    assert all((x - y).norm() < 1e-5 * y.norm() for x, y in zip(got, want, strict=True))
    wide = torch.autograd.grad(compiled(a.double(), b.double()).square().sum(), (a, b))
    assert all((x - y).norm() < 1e-6 * y.norm() for x, y in zip(wide, want, strict=True))
