"""The public functions refuse what does not fit, name it, and can be compiled around."""

import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fedmpt import kernels
from fedmpt.kernels.reference import POOLINGS

PAPER: dict[str, Any] = {"logit_scale": 100.0, "tau": 4.0, "reg": 0.2, "iterations": 10}
LOSS: dict[str, Any] = {"gamma_pos": 1.0, "gamma_neg": 2.0, "clip": 0.05}


def head_inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "tokens": normalize(torch.randn(3, 7, 8, generator=generator), dim=-1),
        "text": normalize(torch.randn(2, 5, 8, generator=generator), dim=-1),
        "gate": torch.rand(3, 2, generator=generator).softmax(1),
        "scale": torch.tensor(5.0),
        "bias": torch.tensor(-1.0),
        "labels": torch.randint(-1, 2, (3, 5), generator=generator, dtype=torch.int8),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": torch.zeros(2, 5, 9)}, "tokens has shape [3, 7, 8]; expected [B, M, D=9]"),
        ({"text": torch.zeros(5, 8)}, "text has shape [5, 8]; expected [N, C, D]"),
        (
            {"tokens": torch.zeros(3, 4, 7, 8)},
            "tokens has shape [3, 4, 7, 8]; expected [B, N=2, M, D=8]",
        ),
        ({"tokens": torch.zeros(3, 0, 8)}, "at least one patch, condition and label is needed"),
        ({"tokens": torch.zeros(3, 7, 8, dtype=torch.int8)}, "tokens is torch.int8; a floating-point"),
        (
            {"text": torch.zeros(2, 5, 8, device="meta")},
            "text is on meta, but the tensors before it are on cpu",
        ),
        (
            {"adapters": (torch.zeros(2, 4, 8), torch.zeros(2, 8, 3))},
            "adapters[1] has shape [2, 8, 3]; expected [N=2, D=8, r=4]",
        ),
        ({"pooling": "mean"}, "pooling is 'mean'; use one of transport, softmax, max"),
        ({"reg": 0.0}, "reg is 0.0; it must be above 0"),
        ({"tau": -1.0}, "tau is -1.0; it must be above 0"),
        ({"iterations": 0}, "iterations is 0; at least 1 is needed"),
    ],
)
def test_transport_names_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    inputs = head_inputs()
    arguments = {"tokens": inputs["tokens"], "text": inputs["text"], **PAPER, **change}
    with pytest.raises(ValueError, match=re.escape(message)):
        kernels.region_transport(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": torch.zeros(3, 3)}, "gate has shape [3, 3]; expected [B=3, N=2]"),
        ({"scale": torch.zeros(1)}, "scale has shape [1]; expected []"),
        ({"labels": torch.zeros(3, 4)}, "labels has shape [3, 4]; expected [B=3, C=5]"),
        ({"labels": torch.zeros(3, 5, device="meta")}, "labels is on meta"),
        ({"gamma_neg": -1.0}, "gamma_neg is -1.0; it must be at least 0"),
        ({"clip": 1.0}, "clip is 1.0; it must be at least 0 and below 1"),
    ],
)
def test_loss_names_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    inputs = head_inputs()
    arguments = {
        "psi": torch.zeros(3, 2, 5),
        **{name: inputs[name] for name in ("gate", "scale", "bias", "labels")},
        **LOSS,
        **change,
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        kernels.gated_asymmetric_loss(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3)}, "logits has shape [3]; expected [B, C]"),
        ({"logits": torch.zeros(3, 5, dtype=torch.int64)}, "logits is torch.int64; a floating-point tensor"),
        ({"labels": torch.zeros(2, 5)}, "labels has shape [2, 5]; expected [B=3, C=5]"),
        ({"labels": torch.zeros(3, 5, dtype=torch.complex64)}, "labels is torch.complex64; a real tensor"),
        ({"labels": torch.zeros(3, 5, device="meta")}, "labels is on meta"),
        ({"gamma_pos": float("nan")}, "gamma_pos is nan; it must be at least 0"),
    ],
)
def test_plain_loss_names_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        kernels.asymmetric_loss(
            **{"logits": torch.zeros(3, 5), "labels": torch.zeros(3, 5), **LOSS, **change}
        )


def test_non_contiguous_inputs_equal_contiguous_ones() -> None:
    inputs = head_inputs()
    tokens = inputs["tokens"].transpose(1, 2).contiguous().transpose(1, 2)
    text = torch.stack([inputs["text"], inputs["text"]], -1)[..., 0]
    assert not tokens.is_contiguous()
    assert not text.is_contiguous()
    found = kernels.region_transport(tokens, text, **PAPER)
    torch.testing.assert_close(found, kernels.region_transport(inputs["tokens"], inputs["text"], **PAPER))


@pytest.mark.parametrize("reg", [0.2, 0.01])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_head_compiles_as_one_graph_with_equal_loss_and_gradients(pooling: str, reg: float) -> None:
    inputs = head_inputs()
    options = PAPER | {"pooling": pooling, "reg": reg}
    adapters = 0.3 * torch.ones(2, 4, 8), 0.1 * torch.ones(2, 8, 4)
    variables = [
        value.requires_grad_() for value in (inputs["text"], *adapters, inputs["gate"], inputs["scale"])
    ]

    def loss(text: Tensor, down: Tensor, up: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
        psi = kernels.region_transport(inputs["tokens"], text, adapters=(down, up), **options)
        return kernels.gated_asymmetric_loss(psi, gate, scale, inputs["bias"], inputs["labels"], **LOSS)

    torch.compiler.reset()
    found = torch.compile(loss, backend="aot_eager", fullgraph=True)(*variables)
    expected = loss(*variables)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, variables), torch.autograd.grad(expected, variables)
    )


def test_the_plan_and_the_plain_loss_compile_as_one_graph() -> None:
    inputs = head_inputs()

    def both(tokens: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        psi, plan = kernels.region_transport(tokens, text, return_plan=True, **PAPER)
        return plan, kernels.asymmetric_loss(psi[:, 0], inputs["labels"], **LOSS)

    torch.compiler.reset()
    arguments = inputs["tokens"], inputs["text"]
    found = torch.compile(both, backend="aot_eager", fullgraph=True)(*arguments)
    torch.testing.assert_close(found, both(*arguments))


def test_importing_and_running_on_a_cpu_does_not_import_triton() -> None:
    program = (
        "import sys, torch\nfrom fedmpt import kernels\n"
        "kernels.asymmetric_loss(torch.zeros(1, 2), torch.ones(1, 2), gamma_pos=1., gamma_neg=2., clip=.05)\n"
        "assert not any(name.startswith('fedmpt.kernels.triton') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
