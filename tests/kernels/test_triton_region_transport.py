"""Region transport on Triton against float64, forward and every gradient.

An error may be twice that of PyTorch on the same rounded inputs, plus a share of the largest exact value, plus
two steps of the result's own subnormal numbers.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fedmpt import kernels
from fedmpt.kernels import dispatch, reference
from fedmpt.kernels import triton_region_transport as region

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = list(TOLERANCE)

pytestmark = pytest.mark.usefixtures("poisoned")


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call; defaults make the smallest odd one."""

    b: int = 2
    m: int = 13
    d: int = 24
    n: int = 2
    c: int = 5
    dtype: torch.dtype = torch.float32
    pooling: str = "transport"
    reg: float = 0.2
    iterations: int = 3
    rank: int = 0
    per_condition: bool = False
    logit_scale: float = 60.0
    tau: float = 4.0

    @property
    def options(self) -> dict[str, Any]:
        return {
            "logit_scale": self.logit_scale,
            "tau": self.tau,
            "reg": self.reg,
            "iterations": self.iterations,
            "pooling": self.pooling,
        }


def inputs_of(case: Case, device: str) -> list[Tensor]:
    """Tokens, text features and, for a rank above 0, adapters; all require gradients."""
    generator = torch.Generator().manual_seed(case.b + 10 * case.m + 100 * case.c + 1000 * case.d)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    common = normal(case.d)
    shape = (case.b, case.n, case.m) if case.per_condition else (case.b, case.m)
    tokens = normalize(common + normal(*shape, case.d), dim=-1).to(case.dtype)
    inputs = [tokens, normalize(common + normal(case.n, case.c, case.d), dim=-1)]
    if case.rank:
        inputs += [normal(case.n, case.rank, case.d) / case.d**0.5, 0.3 * normal(case.n, case.d, case.rank)]
    return [value.to(device).requires_grad_() for value in inputs]


def run(transport: Any, case: Case, inputs: list[Tensor]) -> list[Tensor]:
    """ψ, the plan, and the gradient of every input under a random, small upstream gradient."""
    psi, plan = transport(*inputs[:2], adapters=tuple(inputs[2:]) or None, return_plan=True, **case.options)
    generator = torch.Generator().manual_seed(7)
    upstream = 1e-5 * torch.randn(psi.shape, generator=generator) * 10 ** torch.randn(psi.shape[0], 1, 1)
    gradients = torch.autograd.grad(psi, inputs, upstream.to(psi))
    return [psi.detach(), plan, *gradients]


def conditioned(case: Case) -> float:
    """The share of error that float32 similarities cost: x = ℓ/τ is rounded, and the exponents are softmax(x)/λ."""
    return TOLERANCE[case.dtype] + torch.finfo(torch.float32).eps * case.logit_scale / case.tau / case.reg


def assert_equals_float64(
    case: Case, device: str, inputs: list[Tensor] | None = None, share: float | None = None
) -> None:
    share = share or TOLERANCE[case.dtype]
    inputs = inputs_of(case, device) if inputs is None else inputs
    rounded = [value.detach().to(case.dtype).requires_grad_() for value in inputs]
    exact_inputs = [value.detach().double().requires_grad_() for value in inputs]
    torch.manual_seed(3)
    found = run(region.region_transport, case, inputs)
    torch.manual_seed(3)
    same = run(reference.region_transport, case, rounded)
    torch.manual_seed(3)
    exact = run(reference.region_transport, case, exact_inputs)
    names = ["psi", "plan", "tokens", "text", "down", "up"]
    for name, kernel, torch_alike, truth in zip(names, found, same, exact, strict=False):
        kind = torch.finfo(kernel.dtype)  # the gradient of float16 tokens may be subnormal
        limit = 2 * (torch_alike - truth).abs().max() + share * truth.abs().max()
        limit += 2 * kind.smallest_normal * kind.eps
        error = (kernel.double() - truth).abs().max()
        assert error <= limit, f"{name}: error {error:.2e} above {limit:.2e} (NaN: not written)"
    columns = found[1].double().sum(2)
    assert (columns - 1 / case.c).abs().max() <= TOLERANCE[case.dtype] / case.c


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Every launch of a kernel with its compile-time choices, so that a test can tell which branch ran."""
    seen: list[dict[str, Any]] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            def launch(*args: Any, **constants: Any) -> Any:
                seen.append({"kernel": self.kernel.__name__, "grid": grid, **constants})
                return self.kernel[grid](*args, **constants)

            return launch

    for name in (
        "plane_kernel",
        "blocked_kernel",
        "plan_kernel",
        "label_gradient_kernel",
        "patch_gradient_kernel",
    ):
        monkeypatch.setattr(region, name, Recorder(getattr(region, name)))
    return seen


def tiles(launches: list[dict[str, Any]], kernel: str) -> list[tuple[int, int]]:
    return [(launch["BLOCK_M"], launch["BLOCK_C"]) for launch in launches if launch["kernel"] == kernel]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pooling", region.POOLING_CODES)
@pytest.mark.parametrize("rank", [0, 7])
def test_every_pooling_with_and_without_adapters(
    dtype: torch.dtype, pooling: str, rank: int, device, launches
) -> None:
    assert_equals_float64(Case(dtype=dtype, pooling=pooling, rank=rank), device)
    assert {launch["POOLING"] for launch in launches} == {region.POOLING_CODES[pooling]}
    assert {launch["ADAPTED"] for launch in launches} == {rank > 0}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("reg", "scaling"), [(reference.SCALING_REG, True), (0.019, False), (0.005, False)])
def test_a_small_reg_iterates_logarithms(
    dtype: torch.dtype, reg: float, scaling: bool, device, launches
) -> None:
    assert_equals_float64(Case(dtype=dtype, reg=reg, logit_scale=4.0), device)
    assert [launch["SCALING"] for launch in launches if launch["kernel"] == "plane_kernel"] == [scaling]


@pytest.mark.parametrize("reg", [0.2, reference.SCALING_REG, 0.005])
@pytest.mark.parametrize(
    ("m", "c", "iterations", "tau"), [(13, 20, 50, 4.0), (49, 80, 25, 4.0), (50, 20, 10, 0.5)]
)
def test_labels_iterations_and_sharp_costs_lose_no_precision(
    reg: float, m: int, c: int, iterations: int, tau: float, device
) -> None:
    case = Case(b=1, n=1, m=m, c=c, iterations=iterations, reg=reg, logit_scale=100.0, tau=tau)
    assert_equals_float64(case, device, share=conditioned(case))


@pytest.mark.parametrize(
    ("m", "c", "tile"),
    [
        (1, 1, (64, 32)),
        (50, 20, (64, 32)),
        (49, 80, (64, 128)),
        (65, 32, (256, 32)),
        (197, 33, (256, 64)),
        (197, 65, (256, 128)),
        (257, 3, (512, 16)),
        (257, 17, (512, 32)),
    ],
)
def test_a_plane_runs_in_the_smallest_tile_that_holds_it(
    m: int, c: int, tile: tuple[int, int], device, launches
):
    assert_equals_float64(Case(b=1, n=1, m=m, c=c, dtype=torch.float16), device)
    assert tiles(launches, "plane_kernel") == [tile]


def test_a_large_float32_plane_runs_in_its_own_tile(device, launches) -> None:
    assert_equals_float64(Case(b=1, n=1, m=197, c=20), device)
    assert tiles(launches, "plane_kernel") == [(256, 32)]


@pytest.mark.parametrize("pooling", region.POOLING_CODES)
@pytest.mark.parametrize(
    ("m", "c", "dtype", "rank"),
    [
        (13, 129, torch.float16, 0),
        (577, 9, torch.bfloat16, 3),
        (17, 33, torch.float32, 3),
        (257, 9, torch.float32, 3),
    ],
)
def test_larger_planes_take_the_second_path(
    m: int, c: int, dtype: torch.dtype, rank: int, pooling: str, device, launches
) -> None:
    assert_equals_float64(Case(b=1, n=2, m=m, c=c, dtype=dtype, rank=rank, pooling=pooling), device)
    assert len(tiles(launches, "blocked_kernel")) == 1
    assert not tiles(launches, "plane_kernel")


@pytest.mark.parametrize(("m", "c"), [(65, 33), (65, 65), (257, 17)])
def test_a_plane_that_fills_the_registers_stays_on_chip_for_scalings_only(m, c, device, launches) -> None:
    assert_equals_float64(Case(b=1, n=1, m=m, c=c, dtype=torch.float16, reg=0.01, logit_scale=4.0), device)
    assert_equals_float64(Case(b=1, n=1, m=m, c=c, dtype=torch.float16, rank=3), device)
    kernels = [
        launch["kernel"] for launch in launches if launch["kernel"] in ("plane_kernel", "blocked_kernel")
    ]
    assert kernels == ["blocked_kernel", "plane_kernel"]


@pytest.mark.parametrize(
    ("c", "dtype", "rank"),
    [(32, torch.float16, 17), (33, torch.float16, 17), (17, torch.float32, 17), (5, torch.float16, 33)],
)
def test_gradients_run_in_every_tile(c: int, dtype: torch.dtype, rank: int, device, launches) -> None:
    assert_equals_float64(Case(c=c, dtype=dtype, d=40, rank=rank), device)
    for kernel, known in (
        ("label_gradient_kernel", region.LABEL_GRADIENTS),
        ("patch_gradient_kernel", region.PATCH_GRADIENTS),
    ):
        tile = region.gradient_tile(known, c, dtype.itemsize)
        assert tiles(launches, kernel) == [(tile.m, tile.c)] * 2
    assert [launch["WRITE_NORM"] for launch in launches if "WRITE_NORM" in launch] == [False, True]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 5])
def test_tokens_of_their_own_per_condition(dtype: torch.dtype, rank: int, device) -> None:
    assert_equals_float64(Case(n=3, dtype=dtype, rank=rank, per_condition=True), device)


@pytest.mark.parametrize("d", [17, 192, 257, 1024])
def test_any_width(d: int, device) -> None:
    assert_equals_float64(Case(b=1, d=d, dtype=torch.float16), device)


def test_images_in_uneven_groups_sum_to_the_same_gradient(device, launches) -> None:
    assert_equals_float64(Case(b=9, m=13, n=1, c=2, dtype=torch.float16), device)
    grids = [launch["grid"] for launch in launches if launch["kernel"] == "label_gradient_kernel"]
    assert grids == [(1, 1, 5)]


def test_inputs_of_any_strides(device) -> None:
    case = Case(dtype=torch.float16, rank=4)
    plain = inputs_of(case, device)
    for permuted in (lambda t: t.mT.contiguous().mT, lambda t: torch.stack([t, t], 1).flatten(0, 1)[::2]):
        strided = [permuted(value.detach()).requires_grad_() for value in plain]
        assert not strided[0].is_contiguous()
        assert_equals_float64(case, device, strided)


@pytest.mark.parametrize("reg", [0.2, 0.005])
@pytest.mark.parametrize("label", ["identical", "one"])
def test_extremes_stay_exact(reg: float, label: str, device) -> None:
    case = Case(m=20, c=1 if label == "one" else 4, reg=reg, iterations=10, logit_scale=400.0)
    tokens, text = (value.detach() for value in inputs_of(case, device))
    tokens[:, 3] = text[0, 0]
    text[:, -1] = text[:, 0]
    inputs = [tokens.requires_grad_(), text.requires_grad_()]
    assert_equals_float64(case, device, inputs, share=conditioned(case))


def test_gradients_of_text_alone_launch_nothing_for_tokens(device, launches) -> None:
    tokens, text = inputs_of(Case(), device)
    region.region_transport(tokens.detach(), text, **Case().options).sum().backward()
    assert [launch["kernel"] for launch in launches] == ["plane_kernel", "label_gradient_kernel"]


def test_equal_inputs_give_equal_bits(device) -> None:
    case = Case(b=5, m=3, n=1, dtype=torch.float16, rank=3)
    first, second = (run_seeded(case, device) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def run_seeded(case: Case, device: str) -> list[Tensor]:
    torch.manual_seed(0)
    return run(region.region_transport, case, inputs_of(case, device))


def test_registered_operator_passes_torchs_own_checks(device) -> None:
    case = Case(b=1, m=3, n=1, c=2, dtype=torch.float16, rank=3)
    tokens, text, down, up = inputs_of(case, device)
    terms = [
        value.detach() for value in reference.adapter_terms(tokens, text, down, up, region.mixed_similarity)
    ]
    features = [value.detach().requires_grad_() for value in (tokens, text, *terms)]
    torch.library.opcheck(
        torch.ops.fedmpt.region_transport, (*features, 15.0, 0.2, 2, "transport"), rtol=2e-2, atol=1e-3
    )


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own
def test_public_functions_compile_as_one_graph(device, monkeypatch: pytest.MonkeyPatch, launches) -> None:
    monkeypatch.setattr(dispatch, "_takes_triton", lambda tensor: True)  # as on CUDA
    case = Case(b=2, m=3, n=1, dtype=torch.float16, rank=3)
    inputs = inputs_of(case, device)
    labels = torch.ones(2, case.c, dtype=torch.int8, device=device)
    gate, scalar = torch.ones(2, 1, device=device), torch.ones((), device=device)

    def loss(tokens: Tensor, text: Tensor, down: Tensor, up: Tensor) -> Tensor:
        psi = kernels.region_transport(tokens, text, adapters=(down, up), **case.options)
        return kernels.gated_asymmetric_loss(
            psi, gate, scalar, scalar, labels, gamma_pos=1.0, gamma_neg=2.0, clip=0.05
        )

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    found, expected = (torch.autograd.grad(function(*inputs), inputs) for function in (compiled, loss))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    assert tiles(launches, "plane_kernel")


def test_the_public_function_leaves_to_the_reference_what_the_kernels_do_not_take(
    device, monkeypatch: pytest.MonkeyPatch, launches
) -> None:
    monkeypatch.setattr(dispatch, "_takes_triton", lambda tensor: True)
    for case in (Case(dtype=torch.float64), Case(m=513), Case(m=1025, dtype=torch.float16), Case(rank=129)):
        inputs = inputs_of(case, device)
        psi = kernels.region_transport(*inputs[:2], adapters=tuple(inputs[2:]) or None, **case.options)
        assert psi.shape == (case.b, case.n, case.c)
    assert not launches
    kernels.region_transport(*inputs_of(Case(), device), **Case().options)
    assert launches
